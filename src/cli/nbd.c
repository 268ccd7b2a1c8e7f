/* lodge nbd: serve an image over NBD, in the words of qemu-nbd 7.2. */
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/parse.h"
#include "cli/img.h"
#include "cli/backends.h"
#include "cli/serve.h"
#include "cli/tool.h"
#include "loop/loop.h"

enum { OPT_CACHE = 256, OPT_AIO, OPT_DISCARD, OPT_DETECT, OPT_NBD_OBJECT, OPT_TLS, OPT_AUTHZ, OPT_NBD_IMAGE_OPTS, OPT_FORK, OPT_PID, OPT_SELINUX };
enum { WORKERS = 16, LISTEN_MAX = 64 };

struct nbd_args {
	const char *port, *bind, *socket, *name, *desc, *format, *tls, *authz, *pidfile, *connect, *bitmap, *file, *aio, *detect;
	char *snapshot_id;
	uint64_t shared, offset;
	bool persistent, list, fork, image_opts, depth, verbose, seen_cache, seen_discard, socket_given;
	struct block_opts b;
	struct tls_store objects;
	struct throttle_set groups;
};

static int fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static int fail(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int r = tool_fail("qemu-nbd", "", fmt, ap);
	va_end(ap);
	return r;
}

static void help(void)
{
	puts("Usage: qemu-nbd [OPTIONS] FILE\n  or:  qemu-nbd -L [OPTIONS]\nServe a disk image over NBD (lodge nbd, in qemu-nbd's words)\n\n"
	     "  -h, --help                display this help and exit\n  -V, --version             output version information and exit\n\n"
	     "Connection properties:\n"
	     "  -p, --port=PORT           port to listen on (default `10809')\n  -b, --bind=IFACE          interface to bind to (default `0.0.0.0')\n"
	     "  -k, --socket=PATH         path to the unix socket\n  -e, --shared=NUM          device can be shared by NUM clients (default '1', 0: any number)\n"
	     "  -t, --persistent          don't exit on the last connection\n  -v, --verbose             say why connections failed\n"
	     "  -x, --export-name=NAME    expose export by name (default is empty string)\n  -D, --description=TEXT    export a human-readable description\n\n"
	     "Exposing part of the image:\n  -o, --offset=OFFSET       offset into the image\n"
	     "  -B, --bitmap=NAME         expose a persistent dirty bitmap (qemu:dirty-bitmap:NAME)\n"
	     "  -A, --allocation-depth    expose the allocation depth (qemu:allocation-depth)\n\n"
	     "General purpose options:\n  -L, --list                list exports available from another NBD server\n"
	     "  --object type,id=ID,...   tls-creds-x509, tls-creds-psk, authz-simple, authz-list, authz-list-file, secret\n"
	     "  --tls-creds=ID            use id of an earlier --object to provide TLS\n  --tls-authz=ID            use id of an earlier --object to provide authorization\n"
	     "  --fork                    fork off the server process and exit the parent once the server is running\n"
	     "  --pid-file=PATH           store the server's process ID in the given file\n\n"
	     "Kernel NBD client support:\n  -c, --connect=DEV         connect FILE to the local NBD device DEV\n  -d, --disconnect          disconnect the specified device\n\n"
	     "Block device options:\n  -f, --format=FORMAT       set image format (raw, qcow2, ...)\n  -r, --read-only           export read-only\n"
	     "  -s, --snapshot            writes go to a temporary file\n"
	     "  -l, --load-snapshot=SNAPSHOT_PARAM\n                            export an internal snapshot, read-only:\n"
	     "                            'snapshot.id=[ID],snapshot.name=[NAME]' or '[ID_OR_NAME]'\n"
	     "  -n, --nocache             disable host cache\n      --cache=MODE          none, writeback (default), writethrough, directsync, unsafe\n"
	     "      --aio=MODE            threads (default), native or io_uring\n      --discard=MODE        ignore (default) or unmap\n"
	     "      --detect-zeroes=MODE  off (default), on or unmap\n      --image-opts          treat FILE as a full set of image options\n\n"
	     "Sockets passed by a service manager (LISTEN_FDS) are used instead of -p, -b and -k.");
}

/* --- -L --- */

static void print_export(const struct nbd_export_info *x)
{
	static const char *const names[] = { NULL, "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero" };
	printf(" export: '%s'\n", x->name);
	if (x->desc && *x->desc)
		printf("  description: %s\n", x->desc);
	if (x->flags & 1) {
		printf("  size:  %llu\n  flags: 0x%x (", (unsigned long long)x->size, x->flags);
		for (unsigned i = 1; i < ARRAY_SIZE(names); i++) {
			if (x->flags >> i & 1)
				printf(" %s", names[i]);
		}
		puts(" )");
	}
	if (x->min_block)
		printf("  min block: %u\n  opt block: %u\n  max block: %u\n", x->min_block, x->opt_block, x->max_block);
	if (x->ncontexts)
		printf("  available meta contexts: %u\n", x->ncontexts);
	for (unsigned i = 0; i < x->ncontexts; i++)
		printf("   %s\n", x->contexts[i]);
}

static int list_exports(const struct nbd_args *a)
{
	struct nbd_config c = { .fd = -1, .tls_creds = (char *)(uintptr_t)a->tls };
	struct nbd_export_info *v;
	struct err err = { 0 };
	unsigned n;
	if (a->file)
		return fail("List mode is incompatible with a file name");
	c.path = (char *)(uintptr_t)a->socket;
	c.host = (char *)(uintptr_t)(a->bind ? a->bind : "localhost");
	c.port = (char *)(uintptr_t)(a->port ? a->port : "10809");
	int r = nbd_list(&c, &a->objects, &v, &n, &err);
	if (r) {
		nbd_list_free(v, n);
		return fail("%s", err.msg);
	}
	printf("exports available: %u\n", n);
	for (unsigned i = 0; i < n; i++)
		print_export(&v[i]);
	nbd_list_free(v, n);
	return 0;
}

/* --- the command line --- */

static int snapshot_param(struct nbd_args *a, const char *text)
{
	struct keyvals l;
	struct err err = { 0 };
	if (strncmp(text, "snapshot.", 9)) {
		a->snapshot_id = strdup(text);
		return 0;
	}
	if (keyvals_parse(&l, "-l", text, NULL, &err))
		return fail("%s", err.msg);
	const char *id = keyvals_get(&l, "snapshot.id"), *name = keyvals_get(&l, "snapshot.name");
	a->snapshot_id = id || name ? strdup(id ? id : name) : NULL;
	int r = a->snapshot_id && !keyvals_end(&l, "-l", &err) ? 0 : fail("Invalid snapshot parameter '%s'", text);
	keyvals_free(&l);
	return r;
}

static int cache_option(struct nbd_args *a, const char *mode)
{
	if (a->seen_cache)
		return fail("-n and --cache can only be specified once");
	a->seen_cache = true;
	return tool_cache(mode, &a->b.cache) ? 0 : fail("Invalid cache mode `%s'", mode);
}

/* Options that say how the image is used. */
static int image_option(struct nbd_args *a, int c)
{
	switch (c) {
	case 'n':
		return cache_option(a, "none");
	case OPT_CACHE:
		return cache_option(a, optarg);
	case OPT_AIO:
		if (a->aio)
			return fail("--aio can only be specified once");
		a->aio = optarg;
		return 0;
	case OPT_DISCARD:
		if (a->seen_discard)
			return fail("--discard can only be specified once");
		a->seen_discard = true;
		a->b.discard_unmap = !strcmp(optarg, "unmap") || !strcmp(optarg, "on");
		return a->b.discard_unmap || !strcmp(optarg, "ignore") || !strcmp(optarg, "off") ? 0 : fail("Invalid discard mode `%s'", optarg);
	case OPT_DETECT:
		a->detect = optarg;
		return 0;
	case 'r': a->b.read_only = true; return 0;
	case 's': a->b.snapshot = true; return 0;
	case 'l': return snapshot_param(a, optarg);
	case 'f': a->format = optarg; return 0;
	case OPT_NBD_IMAGE_OPTS: a->image_opts = true; return 0;
	case 'A': a->depth = true; return 0;
	case 'B': a->bitmap = optarg; return 0;
	case 'o': return parse_size(optarg, 1, &a->offset) ? fail("Invalid offset '%s'", optarg) : 0;
	}
	return -1;
}

static int other_option(struct nbd_args *a, int c)
{
	struct err err = { 0 };
	int r;
	switch (c) {
	case 'p': a->port = optarg; return 0;
	case 'b': a->bind = optarg; return 0;
	case 'k': a->socket = optarg; return *optarg == '/' ? 0 : fail("socket path must be absolute");
	case 'e': return parse_u64(optarg, &a->shared) || a->shared > INT32_MAX ? fail("Invalid shared device number '%s'", optarg) : 0;
	case 't': a->persistent = true; return 0;
	case 'v': a->verbose = true; return 0;
	case 'x': a->name = optarg; return strlen(optarg) > 4096 ? fail("export name '%s' too long", optarg) : 0;
	case 'D': a->desc = optarg; return strlen(optarg) > 4096 ? fail("export description '%s' too long", optarg) : 0;
	case 'L': a->list = true; return 0;
	case 'c': a->connect = optarg; return 0;
	case OPT_NBD_OBJECT:
		r = serve_object(&a->objects, &a->groups, optarg, &err);
		if (r > 0)
			exit(0);
		return r ? fail("%s", err.msg) : 0;
	case OPT_TLS: a->tls = optarg; return 0;
	case OPT_AUTHZ: a->authz = optarg; return 0;
	case OPT_FORK: a->fork = true; return 0;
	case OPT_PID: a->pidfile = optarg; return 0;
	case 'T': return fail("-T is not supported: there is no tracing");
	case OPT_SELINUX: return fail("--selinux-label is not supported");
	}
	return fail("-%c is not supported", c);
}

/* -1: go on; else the exit status. */
static int parse_args(struct nbd_args *a, int argc, char **argv)
{
	static const struct option longs[] = {
		{ "help", 0, 0, 'h' }, { "version", 0, 0, 'V' }, { "port", 1, 0, 'p' }, { "bind", 1, 0, 'b' }, { "socket", 1, 0, 'k' },
		{ "shared", 1, 0, 'e' }, { "persistent", 0, 0, 't' }, { "verbose", 0, 0, 'v' }, { "export-name", 1, 0, 'x' },
		{ "description", 1, 0, 'D' }, { "offset", 1, 0, 'o' }, { "allocation-depth", 0, 0, 'A' }, { "bitmap", 1, 0, 'B' },
		{ "list", 0, 0, 'L' }, { "object", 1, 0, OPT_NBD_OBJECT }, { "tls-creds", 1, 0, OPT_TLS }, { "tls-authz", 1, 0, OPT_AUTHZ },
		{ "trace", 1, 0, 'T' }, { "fork", 0, 0, OPT_FORK }, { "pid-file", 1, 0, OPT_PID }, { "selinux-label", 1, 0, OPT_SELINUX },
		{ "connect", 1, 0, 'c' }, { "disconnect", 1, 0, 'd' }, { "format", 1, 0, 'f' }, { "read-only", 0, 0, 'r' }, { "snapshot", 0, 0, 's' },
		{ "load-snapshot", 1, 0, 'l' }, { "nocache", 0, 0, 'n' }, { "cache", 1, 0, OPT_CACHE }, { "aio", 1, 0, OPT_AIO },
		{ "discard", 1, 0, OPT_DISCARD }, { "detect-zeroes", 1, 0, OPT_DETECT }, { "image-opts", 0, 0, OPT_NBD_IMAGE_OPTS }, { 0 },
	};
	struct err err = { 0 };
	int c;
	while ((c = getopt_long(argc, argv, "hVb:o:p:rsnc:dvk:e:f:tl:x:T:D:AB:L", longs, NULL)) != -1) {
		if (c == 'h')
			return help(), 0;
		if (c == 'V')
			return puts("qemu-nbd 7.2 (Lodge " LODGE_VERSION ")"), 0;
		if (c == 'd') {
			const char *dev = optarg ? optarg : optind < argc ? argv[optind] : NULL;
			if (!dev)
				return fail("-d needs the name of a device");
			return nbd_dev_disconnect(dev, &err) ? fail("%s", err.msg) : (printf("%s disconnected\n", dev), 0);
		}
		if (c == '?')
			return 1;       /* getopt told why */
		int r = image_option(a, c);
		if (r == -1)
			r = other_option(a, c);
		if (r)
			return r;
	}
	if (optind < argc - 1 || (optind == argc && !a->list))
		return fail("Invalid number of arguments; try 'qemu-nbd --help'");
	a->file = optind < argc ? argv[optind] : NULL;
	return -1;
}

static int check_args(struct nbd_args *a)
{
	struct err err = { 0 };

	/* These depend on others, which may come behind them. */
	if (block_aio_key("--aio", a->aio, &a->b, &err) || detect_zeroes_key("--detect-zeroes", a->detect, &a->b, &err))
		return fail("%s", err.msg);
	if (a->connect && (a->socket || a->port || a->bind))
		return fail("Device connection is incompatible with -p, -b and -k");
	if (a->tls && a->connect)
		return fail("TLS is not supported with a host device");
	if (a->authz && !a->tls)
		return fail("TLS authorization needs TLS credentials");
	if (a->authz && a->list)
		return fail("TLS authorization is incompatible with export list");
	if (a->image_opts && a->format)
		return fail("--image-opts and -f are mutually exclusive");
	return 0;
}

/* --- serving --- */

struct running { struct nbd_args *a; struct serve sv; struct workers *w; struct iothread *io; struct block *blk; struct nbd_server *s; struct image_bits bits; int dev; };

static void client_gone(void *opaque, unsigned left)
{
	struct running *r = opaque;
	if (!left && !r->a->persistent)
		serve_end(&r->sv);
}

static int open_image(struct running *r, struct err *err)
{
	struct nbd_args *a = r->a;
	struct keyvals l = { 0 };
	a->b.file = a->file;
	a->b.format = a->format;
	a->b.tls = &a->objects;
	a->b.throttles = &a->groups;
	a->b.internal = a->snapshot_id;
	a->b.read_only |= a->snapshot_id != NULL;
	bool ring = a->b.aio == AIO_NATIVE || a->b.aio == AIO_IO_URING;
	int ret = workers_create(&r->w, NULL, WORKERS, err);
	if (!ret && ring)
		ret = iothread_create(&r->io, err); /* completions of io_uring arrive there */
	if (!ret && a->image_opts) {
		ret = keyvals_parse(&l, "--image-opts", a->file, "driver", err);
		a->b.options = &l;
	}
	if (!ret)
		ret = block_open(&r->blk, &a->b, r->io ? iothread_loop(r->io) : NULL, r->w, err);
	if (ret)
		err_prefix(err, "Failed to blk_new_open '%s'", a->file);
	keyvals_free(&l);
	a->b.options = NULL;
	return ret;
}

static int make_server(struct running *r, struct nbd_export *e, struct err *err)
{
	struct nbd_args *a = r->a;
	struct nbd_server_opts o = { .max_clients = (unsigned)a->shared, .verbose = a->verbose, .closed = client_gone, .opaque = r };
	int ret = 0;
	if (a->tls)
		ret = tls_find_creds(&a->objects, a->tls, true, &o.tls, err);
	if (!ret && a->authz)
		ret = tls_find_authz(&a->objects, a->authz, &o.authz, err);
	if (!ret)
		ret = open_image(r, err);
	if (ret)
		return ret;
	uint64_t size = block_length(r->blk);
	if (a->offset && a->offset >= size)
		return err_set(err, -EINVAL, "Offset (%llu) has to be smaller than image size (%llu)", (unsigned long long)a->offset, (unsigned long long)size);
	*e = (struct nbd_export){ .name = a->name ? a->name : "", .desc = a->desc, .blk = r->blk, .off = a->offset, .len = size - a->offset,
				  .writable = !block_read_only(r->blk), .multi_conn = a->shared != 1, .depth = a->depth };
	if (r->io) {
		o.loop = iothread_loop(r->io);
		o.senders = r->w;
	}
	ret = a->bitmap ? serve_bitmap(e, a->bitmap, &r->bits, err) : 0;
	if (!ret)
		ret = nbd_server_new(&r->s, &o, err);
	return ret ? ret : nbd_server_add(r->s, e, err);
}

static void *device_thread(void *arg)
{
	struct running *r = arg;
	int e = nbd_dev_run(r->dev);
	if (e)
		log_error("%s: %s", r->a->connect, strerror(-e));
	serve_end(&r->sv);
	return NULL;
}

static int connect_device(struct running *r, const struct nbd_export *e, struct err *err)
{
	int sv[2];
	pthread_t t;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		return err_set_errno(err, -errno, "socket pair");
	r->dev = nbd_dev_attach(r->a->connect, sv[0], e, err);
	if (r->dev < 0) {
		close(sv[0]);
		close(sv[1]);
		return r->dev;
	}
	int ret = nbd_server_client(r->s, sv[1], true, err);
	if (!ret && pthread_create(&t, NULL, device_thread, r))
		ret = err_set(err, -EAGAIN, "cannot start a thread");
	else if (!ret)
		pthread_detach(t);
	return ret;
}

/* Where clients come from. */
static int listen_all(struct running *r, struct err *err)
{
	struct nbd_args *a = r->a;
	int fds[LISTEN_MAX], n = 0, ret = 0;
	unsigned passed = serve_passed();
	if (passed && (a->socket || a->port || a->bind))
		return err_set(err, -EINVAL, "Cannot specify a socket when using socket activation");
	for (unsigned i = 0; i < passed && n < LISTEN_MAX; i++)
		fds[n++] = 3 + (int)i;
	if (!passed && a->socket) {
		fds[0] = nbd_listen_unix(a->socket, err);
		n = fds[0] < 0 ? fds[0] : 1;
	} else if (!passed) {
		n = nbd_listen_tcp(a->bind ? a->bind : "0.0.0.0", a->port ? a->port : "10809", fds, LISTEN_MAX, err);
	}
	a->socket_given = n > 0 && !passed && a->socket;
	for (int i = 0; i < n; i++) {
		if (!ret)
			ret = nbd_server_listen(r->s, fds[i], err);
		else
			close(fds[i]);
	}
	return n < 0 ? n : ret;
}

static int serve_image(struct nbd_args *a)
{
	struct running r = { .a = a, .dev = -1 };
	struct nbd_export e;
	struct err err = { 0 };
	int ret = serve_start(&r.sv, &err);
	if (!ret && (a->fork || a->connect))
		ret = serve_fork(&r.sv, &err);
	if (!ret)
		ret = make_server(&r, &e, &err);
	if (!ret)
		ret = a->connect ? connect_device(&r, &e, &err) : listen_all(&r, &err);
	if (!ret && a->connect)
		fprintf(stderr, "NBD device %s is now connected to %s\n", a->connect, a->file);
	if (!ret)
		ret = serve_ready(&r.sv, a->pidfile, &err);
	if (!ret)
		serve_wait(&r.sv);
	if (r.dev >= 0)
		nbd_dev_disconnect(a->connect, NULL);
	nbd_server_free(r.s);
	if (a->socket_given)
		unlink(a->socket);
	if (ret)
		fail("%s", err.msg);
	int lost = block_close_checked(r.blk);
	if (r.io)
		iothread_destroy(r.io);
	workers_destroy(r.w);
	free(r.bits.bits);
	return ret ? 1 : lost ? fail("%s: %s", a->file, strerror(-lost)) : 0;
}

static void print_log(enum log_level level, const char *line, void *opaque)
{
	fprintf(stderr, "qemu-nbd: %s%s\n", level == LOG_ERROR ? "" : "warning: ", line);
}

int nbd_main(int argc, char **argv)
{
	struct nbd_args a = { .shared = 1 };
	int status = parse_args(&a, argc, argv);
	log_set_sink(print_log, NULL, LOG_WARN);
	if (status < 0)
		status = check_args(&a);
	else
		goto out;
	if (!status)
		status = a.list ? list_exports(&a) : serve_image(&a);
out:
	tls_store_free(&a.objects);
	throttle_set_free(&a.groups);
	free(a.snapshot_id);
	return status;
}
