/* lodge img: dispatch, and what the verbs share. */
#include "cli/img.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/parse.h"
#include "cli/serve.h"
#include "cli/tool.h"

const char img_missing[] = "Expecting one image file name";

#define IMG "[--object objectdef] [--image-opts] "
/* The words of each verb: for --help, and which long options it takes (img_getopt). */
static const struct { const char *name, *args; int (*fn)(int argc, char **argv); } verbs[] = {
	{ "amend", IMG "[-p] [-q] [-f fmt] [-t cache] [--force] -o options filename", img_amend },
	{ "bench", "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain] [-o offset] [--pattern=pattern] "
	  "[-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] [--image-opts] filename", img_bench },
	{ "bitmap", "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b source_file [-F source_fmt]] [-g granularity] "
	  "[--object objectdef] [--image-opts | -f fmt] filename bitmap", img_bitmap },
	{ "check", IMG "[-q] [-f fmt | --format=fmt] [--output=ofmt] [-r [leaks | all] | --repair=...] [-T src_cache] [-U] filename", img_check },
	{ "commit", IMG "[-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] filename", img_commit },
	{ "compare", IMG "[-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2", img_compare },
	{ "convert", IMG "[--target-image-opts] [--target-is-zero] [--bitmaps [--skip-broken-bitmaps]] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] "
	  "[-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] [-S sparse_size] "
	  "[-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename [filename2 [...]] output_filename", img_convert },
	{ "create", "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]", img_create },
	{ "dd", IMG "[-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output", img_dd },
	{ "info", IMG "[-f fmt | --format=fmt] [--output=ofmt] [--backing-chain] [-U] filename", img_info },
	{ "map", IMG "[-f fmt | --format=fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] [-U] filename", img_map },
	{ "measure", "[--output=ofmt] [-O output_fmt] [-o options] [--size N | " IMG "[-f fmt] [-l snapshot_param] [-U] filename]", img_measure },
	{ "snapshot", IMG "[-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] filename", img_snapshot },
	{ "rebase", IMG "[-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] -b backing_file [-F backing_fmt] filename", img_rebase },
	{ "resize", IMG "[-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename [+ | -]size", img_resize },
};

int img_fail(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int r = tool_fail("qemu-img", "", fmt, ap);
	va_end(ap);
	return r;
}

int img_usage(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int r = tool_fail("qemu-img", "; try 'qemu-img --help'", fmt, ap);
	va_end(ap);
	return r;
}

int img_cache(const char *mode, enum block_cache *c)
{
	return tool_cache(mode, c) ? 0 : img_fail("Invalid cache option: %s", mode);
}

/* What --object, --image-opts and --target-image-opts said: of the program, not of any machine. */
static struct { struct tls_store objects; struct throttle_set groups; bool image_opts, target_opts; } given;

const struct tls_store *img_objects(void)
{
	return &given.objects;
}

int img_add_object(const char *text, struct err *err)
{
	return serve_object(&given.objects, &given.groups, text, err);
}

bool img_image_opts(void)
{
	return given.image_opts;
}

struct block *img_open(const char *file, const struct img_open *o)
{
	struct block_opts b = { .file = file, .format = o->format, .read_only = !o->write, .shared = o->shared, .peek = !o->write && !o->still && !o->snapshot, .as_is = o->as_is,
				.no_backing = o->no_backing, .discard_unmap = !o->discard_ignore, .internal = o->internal, .aio = o->aio, .polled = o->polled, .snapshot = o->snapshot, .copy_on_read = o->copy_on_read };
	struct err err = { 0 };
	struct block *blk;
	if (o->cache && img_cache(o->cache, &b.cache))
		return NULL;
	struct keyvals l = { 0 };
	bool opts = o->options || (o->target ? given.target_opts : given.image_opts && !o->plain);
	b.tls = &given.objects;
	b.throttles = &given.groups;
	if (opts && o->format) {
		img_fail("--image-opts and --format are mutually exclusive");
		return NULL;
	}
	int r = opts ? keyvals_parse(&l, "--image-opts", file, "driver", &err) : 0;
	b.options = opts ? &l : NULL;
	if (!r)
		r = block_open(&blk, &b, NULL, NULL, &err);
	if (r && o->program)
		fprintf(stderr, "%s: can't open device %s: %s\n", o->program, file, err.msg);
	else if (r)
		img_fail("Could not open '%s': %s", file, err.msg);
	keyvals_free(&l);
	return r ? NULL : blk;
}

int img_io_failed(const char *file, const char *what, int error)
{
	const char *todo = error == -ENOSPC || error == -EDQUOT ? "; make room there, or choose another place" :
		error == -EFBIG ? "; no longer file is allowed there (file system, ulimit -f): choose another place" : "";
	return img_fail("%s: %s: %s%s", file, what, strerror(-error), todo);
}

int img_file_failed(const char *file, const char *message)
{
	size_t n = strlen(file);
	bool named = !strncmp(message, file, n) && message[n] == ':';
	return img_fail("%s%s%s", named ? "" : file, named ? "" : ": ", message);
}

int64_t img_size(const char *text, const char *what)
{
	return img_size_most(text, what, INT64_MAX);
}

int64_t img_count(const char *text, const char *what, int64_t most)
{
	char *end;
	errno = 0;
	unsigned long v = strtoul(text, &end, 0);
	if (!errno && end != text && !*end && v <= (unsigned long)most)
		return (int64_t)v;
	img_fail("Invalid %s specified", what);
	return -1;
}

int64_t img_size_most(const char *text, const char *what, int64_t most)
{
	uint64_t v;
	int r = parse_size(text, 1, &v);
	if (!r && v <= (uint64_t)most)
		return (int64_t)v;
	if (r == -ERANGE || !r)
		img_fail("Invalid %s specified. Must be between 0 and %lld.", what, (long long)most);
	else
		img_fail("Invalid %s specified. You may use k, M, G, T, P or E suffixes for "
			 "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.", what);
	return -1;
}

static bool has_long(const char *args, const char *name)
{
	size_t n = strlen(name);
	for (const char *p = args; (p = strstr(p, "--")); p += 2) {
		if (!strncmp(p + 2, name, n) && !strchr("abcdefghijklmnopqrstuvwxyz-", p[2 + n]))
			return true;
	}
	return false;
}

/* Those of `all` that the verb takes. */
static void options_of(const char *verb, const struct option *all, struct option *out)
{
	const char *args = "";
	for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++) {
		if (!strcmp(verbs[i].name, verb))
			args = verbs[i].args;
	}
	for (; all->name; all++) {
		if (all->val == 'h' || (all->val == 'U' ? strstr(args, "[-U]") != NULL : has_long(args, all->name)))
			*out++ = *all;
	}
	*out = *all;
}

int img_getopt(int argc, char **argv, const char *shorts)
{
	static const struct option longs[] = {
		{ "help", no_argument, 0, 'h' }, { "object", required_argument, 0, OPT_OBJECT },
		{ "image-opts", no_argument, 0, OPT_IMAGE_OPTS }, { "target-image-opts", no_argument, 0, OPT_TARGET_OPTS },
		{ "force-share", no_argument, 0, 'U' }, { "output", required_argument, 0, OPT_OUTPUT },
		{ "backing-chain", no_argument, 0, OPT_BACKING_CHAIN }, { "size", required_argument, 0, OPT_SIZE },
		{ "preallocation", required_argument, 0, OPT_PREALLOC }, { "shrink", no_argument, 0, OPT_SHRINK },
		{ "start-offset", required_argument, 0, OPT_START }, { "max-length", required_argument, 0, OPT_LENGTH },
		{ "flush-interval", required_argument, 0, OPT_FLUSH }, { "pattern", required_argument, 0, OPT_PATTERN },
		{ "no-drain", no_argument, 0, OPT_NO_DRAIN }, { "salvage", no_argument, 0, OPT_SALVAGE },
		{ "target-is-zero", no_argument, 0, OPT_TARGET_ZERO }, { "bitmaps", no_argument, 0, OPT_BITMAPS },
		{ "skip-broken-bitmaps", no_argument, 0, OPT_SKIP_BROKEN }, { "force", no_argument, 0, OPT_FORCE },
		{ "add", no_argument, 0, OPT_BITMAP_ADD }, { "remove", no_argument, 0, OPT_BITMAP_ADD + BITMAP_REMOVE },
		{ "clear", no_argument, 0, OPT_BITMAP_ADD + BITMAP_CLEAR }, { "enable", no_argument, 0, OPT_BITMAP_ADD + BITMAP_ENABLE },
		{ "disable", no_argument, 0, OPT_BITMAP_ADD + BITMAP_DISABLE }, { "merge", required_argument, 0, OPT_BITMAP_ADD + BITMAP_MERGE },
		{ "format", required_argument, 0, 'f' }, { "repair", required_argument, 0, 'r' }, { 0 },
	};
	struct option mine[ARRAY_SIZE(longs)];
	options_of(argv[0], longs, mine);
	opterr = 0;
	int c = getopt_long(argc, argv, shorts, mine, NULL);
	if (c == ':') {
		img_usage("missing argument for option '%s'", argv[optind - 1]);
		exit(1);
	}
	if (c == '?') {
		img_usage("unrecognized option '%s'", argv[optind - 1]);
		exit(1);
	}
	if (c == OPT_OBJECT) {
		struct err err = { 0 };
		int r = serve_object(&given.objects, &given.groups, optarg, &err);
		if (r < 0)
			img_fail("%s", err.msg);
		if (r)
			exit(r > 0 ? 0 : strcmp(argv[0], "compare") ? 1 : 2);
	}
	given.image_opts |= c == OPT_IMAGE_OPTS;
	given.target_opts |= c == OPT_TARGET_OPTS;
	if (c == OPT_OBJECT || c == OPT_IMAGE_OPTS || c == OPT_TARGET_OPTS)
		return img_getopt(argc, argv, shorts);
	if (c == 'h') {
		img_main(2, (char *[]){ (char[]){ "img" }, (char[]){ "--help" }, NULL });
		exit(0);
	}
	return c;
}

int img_output(const char *text, bool *json)
{
	*json = !strcmp(text, "json");
	return *json || !strcmp(text, "human") ? 0 : img_fail("--output must be used with human or json as argument.");
}

void img_json_string(const char *s)
{
	putchar('"');
	for (; *s; s++) {
		unsigned char c = (unsigned char)*s;
		if (c == '"' || c == '\\')
			printf("\\%c", c);
		else if (c < 0x20)
			printf("\\u%04X", c);
		else
			putchar(c);
	}
	putchar('"');
}

static int version_of(const char *v, unsigned *version)
{
	*version = !strcmp(v, "0.10") || !strcmp(v, "v2") ? 2 : 3;
	return *version == 2 || !strcmp(v, "1.1") || !strcmp(v, "v3") ? 0 : img_fail("Invalid parameter '%s'", v);
}

static int flag(const char *key, const char *v, bool *b)
{
	return parse_bool(v, b) ? img_fail("Parameter '%s' expects 'on' or 'off'", key) : 0;
}

int img_create_options(struct image_create *c, struct keyvals *l, struct img_create_seen *seen)
{
	struct err err = { 0 };
	const char *v;
	uint64_t n;
	int r = 0;
	bool qcow2 = !strcmp(c->format, "qcow2");
#define GET(key) (!r && (v = keyvals_get(l, key)))
	if (GET("size")) {
		int64_t s = img_size(v, "image size");
		r = s < 0;
		c->size = (uint64_t)s;
		seen->size = true;
	}
	if (GET("preallocation"))
		r = tool_prealloc(v, &c->prealloc) ? 0 : img_fail("Invalid parameter '%s'", v), seen->prealloc = seen->other = true;
	if (!qcow2)
		return r ? r : keyvals_end(l, "qemu-img: -o", &err) ? img_fail("%s", err.msg) : 0;
	if (GET("backing_file"))
		c->backing = v, seen->other = true;
	if (GET("backing_fmt"))
		c->backing_format = v, seen->other = true;
	if (GET("cluster_size")) {
		r = parse_size(v, 1, &n) || n > UINT32_MAX ? img_fail("Cluster size must be a power of two between 512 and 2048k") : 0;
		c->cluster_size = (uint32_t)n;
		seen->other = true;
		if (!r && !n)
			r = img_fail("Cluster size must be a power of two between 512 and 2048k");
	}
	if (GET("compat"))
		r = version_of(v, &c->version), seen->version = true, seen->compat = v;
	if (GET("compression_type")) {
		c->zstd = !strcmp(v, "zstd");
		seen->other = true;
		r = c->zstd || !strcmp(v, "zlib") ? 0 : img_fail("Invalid parameter '%s'", v);
	}
	if (GET("encryption")) {
		bool on = false;
		r = flag("encryption", v, &on), seen->encryption = seen->other = true;
		if (!r && on)
			r = img_fail("encrypted images are not supported");
	}
	if (GET("data_file"))
		c->data_file = v, seen->other = true;
	if (GET("data_file_raw"))
		r = flag("data_file_raw", v, &c->data_raw), seen->data_raw = true;
	if (GET("extended_l2"))
		r = flag("extended_l2", v, &c->extended_l2), seen->other = true;
	if (GET("lazy_refcounts"))
		r = flag("lazy_refcounts", v, &c->lazy_refcounts), seen->lazy = true;
	if (GET("refcount_bits")) {
		r = parse_u64(v, &n) || n > 64 ? img_fail("Refcount width must be a power of two and may not exceed 64 bits") : 0;
		c->refcount_bits = (unsigned)n;
		seen->refcount_bits = true;
	}
#undef GET
	return r ? r : keyvals_end(l, "-o", &err) ? img_fail("%s", err.msg) : 0;
}

static volatile sig_atomic_t asked;

static void on_usr1(int sig)
{
	(void)sig;
	asked = 1;
}

/* Without -p, SIGUSR1 asks how far it is. */
void img_progress(bool on, double percent)
{
	if (!on && asked) {
		asked = 0;
		fprintf(stderr, "    (%3.2f/100%%)\n", percent);
	}
	if (!on)
		return;
	printf("    (%3.2f/100%%)\r", percent);
	fflush(stdout);
}

/* Three significant digits, as QEMU's size_to_str() shows them. */
const char *img_human(uint64_t bytes, char buf[32])
{
	static const char *const units[] = { "", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei" };
	unsigned i = 0;
	double v = (double)bytes;
	while (v / 1024 >= 1000.0 / 1024 && i < 6 && v >= 1000) {
		v /= 1024;
		i++;
	}
	snprintf(buf, 32, "%0.3g %sB", v, units[i]);
	return buf;
}

static void help(void)
{
	puts("qemu-img version 7.2 (Lodge " LODGE_VERSION ")\nusage: qemu-img [standard options] command [command options]\n"
	     "QEMU disk image utility, by Lodge\n\n"
	     "    '-h', '--help'       display this help and exit\n"
	     "    '-V', '--version'    output version information and exit\n\nCommand syntax:");
	for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++)
		printf("  %s %s\n", verbs[i].name, verbs[i].args);
	puts("\nSupported formats: qcow2 raw vdi vhdx vmdk vpc (the last four can only be read)");
}

static void print_log(enum log_level level, const char *line, void *opaque)
{
	fprintf(stderr, "qemu-img: %s%s\n", level == LOG_ERROR ? "" : "warning: ", line);
}

int img_main(int argc, char **argv)
{
	if (argc < 2)
		return img_usage("Not enough arguments");
	if (!strcmp(argv[1], "-h") || !strcmp(argv[1], "--help"))
		return help(), 0;
	if (!strcmp(argv[1], "-V") || !strcmp(argv[1], "--version"))
		return puts("qemu-img version 7.2 (Lodge " LODGE_VERSION ")"), 0;
	log_set_sink(print_log, NULL, LOG_WARN);
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = on_usr1, .sa_flags = SA_RESTART }, NULL);
	for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++) {
		if (!strcmp(argv[1], verbs[i].name)) {
			optind = 1;
			int status = verbs[i].fn(argc - 1, argv + 1);
			if (fflush(stdout) && !status)
				status = 1;
			return status;
		}
	}
	return img_usage("Command not found: %s", argv[1]);
}
