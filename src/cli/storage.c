/* lodge storage-daemon: disks for others, in the words of qemu-storage-daemon 7.2. Options take effect in their order. */
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/parse.h"
#include "base/util.h"
#include "block/image.h"
#include "cli/backends.h"
#include "cli/options.h"
#include "cli/serve.h"
#include "export/export.h"
#include "loop/loop.h"

enum { WORKERS = 16, LISTEN_MAX = 16 };
enum { OPT_SD_BLOCKDEV = 256, OPT_SD_CHARDEV, OPT_SD_DAEMONIZE, OPT_SD_EXPORT, OPT_SD_MONITOR, OPT_SD_NBD, OPT_SD_OBJECT, OPT_SD_PIDFILE };

struct storage {
	struct vm_opts o;               /* nodes and objects, as -blockdev and -object leave them */
	struct throttle_set groups;
	struct workers *w;
	struct { const char *name; struct block *blk; } *nodes;
	struct { char *id; struct vhost_blk *v; } *exports;
	char **sockets;                 /* to remove at the end */
	unsigned nnodes, nexports, nsockets;
	struct nbd_server *nbd;
	unsigned max_clients;
	const char *pidfile;
	struct serve sv;
};

static void help(void)
{
	puts("Usage: qemu-storage-daemon [options]\nServe disks to other programs (lodge storage-daemon, in qemu-storage-daemon's words)\n\n"
	     "  -h, --help             display this help and exit\n  -V, --version          output version information and exit\n\n"
	     "  --blockdev [driver=]<driver>,node-name=<N>[,discard=ignore|unmap]\n             [,cache.direct=on|off][,cache.no-flush=on|off]\n"
	     "             [,read-only=on|off][,driver specific parameters...]\n                         formats, filters (" BLOCK_FILTERS "),\n                         file, host_device, nbd, null-co, null-aio\n\n"
	     "  --daemonize            daemonize the process, and have the parent exit once startup is complete\n\n"
	     "  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]\n           [,description=<text>][,writable=on|off][,allocation-depth=on|off]\n"
	     "                         export the node over NBD (requires --nbd-server)\n\n"
	     "  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,\n           addr.type=unix,addr.path=<socket-path>[,writable=on|off]\n"
	     "           [,logical-block-size=<block-size>][,num-queues=<num-queues>]\n                         export the node as a vhost-user-blk device over a UNIX socket\n"
	     "  --export [type=]vhost-user-blk,...,addr.type=fd,addr.str=<fd>[,...]\n                         the same over a descriptor that listens\n\n"
	     "  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>\n               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]\n"
	     "  --nbd-server addr.type=unix,addr.path=<path>[,...]\n                         start an NBD server for exporting block nodes\n\n"
	     "  --object <type>,id=<id>[,...]\n                         tls-creds-x509, tls-creds-psk, authz-simple, authz-list, authz-list-file,\n"
	     "                         secret, throttle-group\n\n  --pidfile <path>       write process ID to a file after startup");
}

static struct block *find_open(struct storage *s, const char *name)
{
	for (unsigned i = 0; i < s->nnodes; i++) {
		if (!strcmp(s->nodes[i].name, name))
			return s->nodes[i].blk;
	}
	return NULL;
}

/* The node of that name, opened when it is first asked for. */
static int get_node(struct storage *s, const char *name, struct block **out, struct err *err)
{
	struct vm_node *n = NULL;
	struct block_opts bo;
	*out = name ? find_open(s, name) : NULL;
	if (*out)
		return 0;
	for (unsigned i = 0; name && i < s->o.nnodes; i++) {
		const char *have = keyvals_get(&s->o.nodes[i].opts, "node-name");
		if (have && !strcmp(have, name))
			n = &s->o.nodes[i];
	}
	if (!n)
		return err_set(err, -ENOENT, "Cannot find device='' nor node-name='%s'", name ? name : "");
	int r = node_block_opts(&s->o, n, &bo, NULL, err);
	while (!r && s->groups.n < s->o.nthrottles) {
		const struct vm_throttle *t = &s->o.throttles[s->groups.n];

		if (throttle_set_add(&s->groups, t->name, &t->limits, NULL, NULL))
			r = err_set(err, -ENOMEM, "out of memory");
	}
	bo.tls = &s->o.tls;
	bo.throttles = &s->groups;
	if (!r)
		r = block_open(out, &bo, NULL, s->w, err);
	if (r)
		return r;
	vmopts_grow(&s->nodes, &s->nnodes, sizeof *s->nodes);
	s->nodes[s->nnodes - 1].name = vmopts_printf(&s->o, "%s", name);
	s->nodes[s->nnodes - 1].blk = *out;
	return 0;
}

static void remember_socket(struct storage *s, const char *path)
{
	vmopts_grow(&s->sockets, &s->nsockets, sizeof *s->sockets);
	s->sockets[s->nsockets - 1] = vmopts_printf(&s->o, "%s", path);
}

/* addr.type=unix|inet|fd; sockets that listen, how many, -errno. */
static int listen_address(struct storage *s, struct keyvals *l, const char *what, bool inet, int *fds, struct err *err)
{
	const char *type = keyvals_get(l, "addr.type"), *path = keyvals_get(l, "addr.path"), *str = keyvals_get(l, "addr.str");
	const char *host = keyvals_get(l, "addr.host"), *port = keyvals_get(l, "addr.port");
	uint64_t fd;
	if (type && !strcmp(type, "unix") && path) {
		fds[0] = nbd_listen_unix(path, err);
		if (fds[0] >= 0)
			remember_socket(s, path);
		return fds[0] < 0 ? fds[0] : 1;
	}
	if (type && !strcmp(type, "inet") && inet && host && port)
		return nbd_listen_tcp(host, port, fds, LISTEN_MAX, err);
	if (type && !strcmp(type, "fd") && str && !parse_u64(str, &fd) && fd <= INT32_MAX) {
		fds[0] = (int)fd;
		return 1;
	}
	return err_set(err, -EINVAL, "%s: addr.type=unix,addr.path=%s or addr.type=fd,addr.str= is needed", what, inet ? ", addr.type=inet,addr.host=,addr.port=" : "");
}

static int opt_nbd_server(struct storage *s, const char *arg, struct err *err)
{
	struct nbd_server_opts so = { 0 };
	struct keyvals l;
	int fds[LISTEN_MAX], n = -1;
	uint64_t max = 0;
	int r = keyvals_parse(&l, "--nbd-server", arg, NULL, err);
	if (r)
		return r;
	const char *tls = keyvals_get(&l, "tls-creds"), *authz = keyvals_get(&l, "tls-authz");
	if (s->nbd)
		r = err_set(err, -EEXIST, "NBD server already running");
	if (!r && tls)
		r = tls_find_creds(&s->o.tls, tls, true, &so.tls, err);
	if (!r && authz)
		r = tls ? tls_find_authz(&s->o.tls, authz, &so.authz, err) : err_set(err, -EINVAL, "--nbd-server: tls-authz needs tls-creds");
	if (!r)
		r = keyvals_u64(&l, "--nbd-server", "max-connections", 0, 100000, &max, err);
	so.max_clients = s->max_clients = (unsigned)max;
	if (!r && (n = listen_address(s, &l, "--nbd-server", true, fds, err)) < 0)
		r = n;
	if (!r)
		r = keyvals_end(&l, "--nbd-server", err);
	if (!r)
		r = nbd_server_new(&s->nbd, &so, err);
	for (int i = 0; i < n; i++) {
		if (!r)
			r = nbd_server_listen(s->nbd, fds[i], err);
		else
			close(fds[i]);
	}
	keyvals_free(&l);
	return r;
}

static int export_nbd(struct storage *s, struct keyvals *l, struct block *b, const char *node, bool writable, struct err *err)
{
	const char *name = keyvals_get(l, "name"), *desc = keyvals_get(l, "description");
	bool depth = false;
	int r = keyvals_bool(l, "--export", "allocation-depth", &depth, err);
	if (!r && !s->nbd)
		r = err_set(err, -EINVAL, "NBD server not running (give --nbd-server first)");
	if (!r && (keyvals_get(l, "bitmap") || keyvals_get(l, "bitmaps.0")))
		r = err_set(err, -ENOTSUP, "--export: bitmaps are not supported by the storage daemon yet (lodge nbd -B shows one)");
	if (!r && writable && block_read_only(b))
		r = err_set(err, -EINVAL, "Cannot export read-only node as writable");
	if (!r)
		r = keyvals_end(l, "--export", err);
	struct nbd_export e = { .name = name ? name : node, .desc = desc, .blk = b, .len = block_length(b), .writable = writable,
				.multi_conn = s->max_clients != 1, .depth = depth };
	return r ? r : nbd_server_add(s->nbd, &e, err);
}

static int export_vhost(struct storage *s, struct keyvals *l, struct block *b, const char *id, bool writable, struct err *err)
{
	struct vhost_blk_opts o = { .id = id, .blk = b, .writable = writable };
	struct vhost_blk *v;
	uint64_t queues = 1, bs = 0;
	int fds[LISTEN_MAX], n = -1;
	int r = keyvals_u64(l, "--export", "num-queues", 1, 64, &queues, err);
	if (!r)
		r = keyvals_u64(l, "--export", "logical-block-size", 512, 32768, &bs, err);
	o.num_queues = (unsigned)queues;
	o.block_size = (uint32_t)bs;
	if (!r)
		r = vhost_blk_new(&v, &o, err);
	if (r)
		return r;
	n = listen_address(s, l, "--export vhost-user-blk", false, fds, err);
	if (n < 0)
		r = n;
	if (!r)
		r = keyvals_end(l, "--export", err);
	if (!r && (r = vhost_blk_serve(v, fds[0], false, err)))
		close(fds[0]);
	if (r) {
		vhost_blk_free(v);
		return r;
	}
	vmopts_grow(&s->exports, &s->nexports, sizeof *s->exports);
	s->exports[s->nexports - 1].id = vmopts_printf(&s->o, "%s", id);
	s->exports[s->nexports - 1].v = v;
	return 0;
}

static int opt_export(struct storage *s, const char *arg, struct err *err)
{
	struct keyvals l;
	struct block *b = NULL;
	bool writable = false;
	int r = keyvals_parse(&l, "--export", arg, "type", err);
	if (r)
		return r;
	const char *type = keyvals_get(&l, "type"), *id = keyvals_get(&l, "id"), *node = keyvals_get(&l, "node-name");
	if (!type || !id || !node)
		r = err_set(err, -EINVAL, "--export: %s= is missing", !type ? "type" : !id ? "id" : "node-name");
	for (unsigned i = 0; !r && i < s->nexports; i++)
		r = strcmp(s->exports[i].id, id) ? 0 : err_set(err, -EEXIST, "Block export id '%s' is already in use", id);
	if (!r)
		r = keyvals_bool(&l, "--export", "writable", &writable, err);
	if (!r)
		r = get_node(s, node, &b, err);
	if (!r && !strcmp(type, "nbd"))
		r = export_nbd(s, &l, b, node, writable, err);
	else if (!r && !strcmp(type, "vhost-user-blk"))
		r = export_vhost(s, &l, b, id, writable, err);
	else if (!r)
		r = err_set(err, -ENOTSUP, "--export: type=%s is not supported (nbd, vhost-user-blk)", type);
	keyvals_free(&l);
	return r;
}

static int option(struct storage *s, int c, struct err *err)
{
	int r;
	switch (c) {
	case OPT_SD_BLOCKDEV: return opt_blockdev(&s->o, optarg, err);
	case OPT_SD_OBJECT:
		r = opt_object(&s->o, optarg, err);
		if (r == OPT_DONE)
			exit(0);
		return r;
	case OPT_SD_EXPORT: return opt_export(s, optarg, err);
	case OPT_SD_NBD: return opt_nbd_server(s, optarg, err);
	case OPT_SD_PIDFILE: s->pidfile = optarg; return 0;
	case OPT_SD_DAEMONIZE: return 0;
	case OPT_SD_CHARDEV:
	case OPT_SD_MONITOR: return err_set(err, -ENOTSUP, "--%s is not supported by the storage daemon yet", c == OPT_SD_CHARDEV ? "chardev" : "monitor");
	case 'T': return err_set(err, -ENOTSUP, "-T is not supported: there is no tracing");
	}
	return err_set(err, -EINVAL, "Unexpected argument: %s", optind <= 1 ? "" : "see --help");
}

static const struct option longs[] = {
	{ "blockdev", 1, 0, OPT_SD_BLOCKDEV }, { "chardev", 1, 0, OPT_SD_CHARDEV }, { "daemonize", 0, 0, OPT_SD_DAEMONIZE }, { "export", 1, 0, OPT_SD_EXPORT },
	{ "help", 0, 0, 'h' }, { "monitor", 1, 0, OPT_SD_MONITOR }, { "nbd-server", 1, 0, OPT_SD_NBD }, { "object", 1, 0, OPT_SD_OBJECT },
	{ "pidfile", 1, 0, OPT_SD_PIDFILE }, { "trace", 1, 0, 'T' }, { "version", 0, 0, 'V' }, { 0 },
};

static int start(struct storage *s, int argc, char **argv, bool fork, struct err *err)
{
	int c, r = serve_start(&s->sv, err);
	if (!r && fork)
		r = serve_fork(&s->sv, err);
	if (!r)
		r = workers_create(&s->w, NULL, WORKERS, err);
	optind = 1;
	while (!r && (c = getopt_long(argc, argv, "hT:V", longs, NULL)) >= 0)
		r = option(s, c, err);
	if (!r && optind < argc)
		r = err_set(err, -EINVAL, "Unexpected argument: %s", argv[optind]);
	for (unsigned i = 0; !r && i < s->o.nnodes; i++) { /* those that no export asked for: what is wrong with them is told now */
		const char *name = keyvals_get(&s->o.nodes[i].opts, "node-name");
		struct block *b;

		if (name && !node_is_child(&s->o, name))
			r = get_node(s, name, &b, err);
	}
	return r ? r : serve_ready(&s->sv, s->pidfile, err);
}

static int finish(struct storage *s)
{
	int lost = 0;
	for (unsigned i = 0; i < s->nexports; i++)
		vhost_blk_free(s->exports[i].v);
	nbd_server_free(s->nbd);
	for (unsigned i = 0; i < s->nnodes; i++) {
		int r = block_close_checked(s->nodes[i].blk);
		if (r)
			fprintf(stderr, "qemu-storage-daemon: %s: %s\n", s->nodes[i].name, strerror(-r));
		lost = lost ? lost : r;
	}
	for (unsigned i = 0; i < s->nsockets; i++)
		unlink(s->sockets[i]);
	workers_destroy(s->w);
	free(s->exports);
	free(s->nodes);
	free(s->sockets);
	throttle_set_free(&s->groups);
	vmopts_free(&s->o);
	return lost;
}

static void print_log(enum log_level level, const char *line, void *opaque)
{
	fprintf(stderr, "qemu-storage-daemon: %s%s\n", level == LOG_ERROR ? "" : "warning: ", line);
}

int storage_main(int argc, char **argv)
{
	struct storage s = { 0 };
	struct err err = { 0 };
	bool fork = false;
	int c;
	while ((c = getopt_long(argc, argv, "hT:V", longs, NULL)) >= 0) {
		if (c == 'h')
			return help(), 0;
		if (c == 'V')
			return puts("qemu-storage-daemon version 7.2 (Lodge " LODGE_VERSION ")"), 0;
		if (c == '?')
			return 1;
		fork |= c == OPT_SD_DAEMONIZE;
	}
	log_set_sink(print_log, NULL, LOG_WARN);
	vmopts_init(&s.o, true);
	int r = start(&s, argc, argv, fork, &err);
	if (r)
		fprintf(stderr, "qemu-storage-daemon: %s\n", err.msg);
	else
		serve_wait(&s.sv);
	return finish(&s) || r;
}
