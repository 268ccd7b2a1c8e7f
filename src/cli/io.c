/* lodge io: options, the command line of the program and of its commands, opening and closing. */
#include "cli/io.h"

#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/log.h"
#include "base/parse.h"
#include "cli/serve.h"
#include "cli/tool.h"

int io_fail(const char *fmt, ...)
{
	va_list ap;
	fflush(stdout);
	fputs("qemu-io: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	return -1;
}

int io_number(const char *text, uint64_t *out)
{
	int r = parse_size(text, 1, out);
	if (!r && *out <= INT64_MAX)
		return 0;
	printf("Parsing error: %s -- %s\n", !r || r == -ERANGE ? "argument too large" : "non-numeric argument, or extraneous/unrecognized suffix", text);
	return -1;
}

const char *io_bytes(double v, char buf[32])
{
	static const char *const units[] = { "bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	unsigned i = 0;
	for (; v >= 1024 && i < ARRAY_SIZE(units) - 1; i++)
		v /= 1024;
	int n = snprintf(buf, 32, "%.3f", v);
	if (n > 4 && !strcmp(buf + n - 4, ".000"))
		n -= 4;
	snprintf(buf + n, 32 - (size_t)n, " %s", units[i]);
	return buf;
}

/* --- help --- */

static void one_line(const struct io_command *c)
{
	printf("%s %s%s-- %s\n", c->name, c->args ? c->args : "", c->args ? " " : "", c->line);
}

static const struct io_command *find(const char *name)
{
	for (const struct io_command *c = io_commands; c->name; c++)
		if (!strcmp(c->name, name) || (c->alt && !strcmp(c->alt, name)))
			return c;
	return NULL;
}

int io_usage(const char *name)
{
	one_line(find(name));
	return -1;
}

int io_help(struct io *io, int argc, char **argv)
{
	if (argc > 1) {
		const struct io_command *c = find(argv[1]);
		if (!c) {
			printf("command %s not found\n", argv[1]);
			return -1;
		}
		one_line(c);
		if (c->more)
			printf("\n%s\n", c->more);
		return 0;
	}
	for (const struct io_command *c = io_commands; c->name; c++)
		one_line(c);
	puts("\nUse 'help commandname' for extended help.");
	return 0;
}

int io_quit(struct io *io, int argc, char **argv)
{
	io->quit = true;
	return 0;
}

/* --- which image --- */

static void forget(struct io_image *i)
{
	free(i->file);
	free(i->format);
	free(i->options);
	free(i->cache);
	*i = (struct io_image){ 0 };
}

static char *copy(const char *s)
{
	return s ? strdup(s) : NULL;
}

/* Commas in a file name are doubled where options are text. */
static void append_escaped(char *to, const char *from)
{
	for (to += strlen(to); *from; from++) {
		if (*from == ',')
			*to++ = ',';
		*to++ = *from;
	}
	*to = 0;
}

/* The options with the file among them, as --image-opts takes them. NULL: out of memory. */
static char *options_text(const struct io_image *i)
{
	size_t n = strlen(i->options) + 2 * strlen(i->file ? i->file : "") + strlen(i->format ? i->format : "") + 64;
	char *s = malloc(n);
	if (!s)
		return NULL;
	bool driver = strstr(i->options, "driver=") || !strchr(i->options, '=');
	snprintf(s, n, "%s%s%s%s", driver ? "" : "driver=", driver ? "" : i->format ? i->format : "raw", driver ? "" : ",", i->options);
	if (i->file) {
		strcat(s, strstr(i->options, "driver=file") ? ",filename=" : ",file.filename=");
		append_escaped(s, i->file);
	}
	return s;
}

static int open_as(struct io *io)
{
	const struct io_image *i = &io->as;
	if (i->shared && !i->read_only)
		return io_fail("can't open device %s: force-share=on can only be used with read-only images", i->file ? i->file : "");
	char *text = i->options ? options_text(i) : NULL;
	if (i->options && !text)
		return io_fail("out of memory");
	struct img_open o = { .format = text ? NULL : i->format, .cache = i->cache ? i->cache : "writethrough", .write = !i->read_only, .shared = i->shared,
			      .discard_ignore = i->discard_ignore, .snapshot = i->snapshot, .copy_on_read = i->copy_on_read, .options = text != NULL, .plain = true, .program = "qemu-io" };
	io->b = img_open(text ? text : i->file, &o);
	free(text);
	return io->b ? 0 : -1;
}

static int close_image(struct io *io)
{
	io_aio_end(io);
	int r = block_close_checked(io->b);
	io->b = NULL;
	if (r)
		io_fail("flush failed: %s", strerror(-r));
	return r;
}

int io_close(struct io *io, int argc, char **argv)
{
	int r = close_image(io);
	forget(&io->as);
	return r;
}

static int bad_cache(const char *mode)
{
	enum block_cache c;
	return tool_cache(mode, &c) ? 0 : io_fail("Invalid cache option: %s", mode);
}

static int discard_mode(const char *mode, bool *ignore)
{
	*ignore = !strcmp(mode, "ignore") || !strcmp(mode, "off");
	return *ignore || !strcmp(mode, "unmap") || !strcmp(mode, "on") ? 0 : io_fail("Invalid discard option: %s", mode);
}

/* Requests are done one after the other whatever it says. As in QEMU native wants the page cache out of the way. */
static int aio_mode(const char *mode, bool *native)
{
	*native = !strcmp(mode, "native");
	return *native || !strcmp(mode, "threads") || !strcmp(mode, "io_uring") ? 0 : io_fail("Invalid aio option: %s", mode);
}

static int native_needs_direct(const struct io_image *i)
{
	if (i->cache && (!strcmp(i->cache, "none") || !strcmp(i->cache, "directsync") || !strcmp(i->cache, "off")))
		return 0;
	return io_fail("can't open device %s: aio=native was specified, but it requires cache.direct=on, which was not specified.", i->file ? i->file : "");
}

/* What the program's options and those of `open` have in common: 1 for one that is none of them. */
static int common_option(int c, struct io_image *i, bool *native)
{
	switch (c) {
	case 'r': i->read_only = true; return 0;
	case 's': i->snapshot = true; return 0;
	case 'U': i->shared = true; return 0;
	case 'n':
	case 't':
		free(i->cache);
		i->cache = strdup(c == 'n' ? "none" : optarg);
		return bad_cache(i->cache ? i->cache : "");
	case 'd': return discard_mode(optarg, &i->discard_ignore);
	case 'k': *native = true; return 0;
	case 'i': return aio_mode(optarg, native);
	case 'C': i->copy_on_read = true; return 0;
	}
	return 1;
}

int io_open(struct io *io, int argc, char **argv)
{
	struct io_image i = { 0 };
	bool native = false;
	int c, r = 0;
	optind = 0;
	while (!r && (c = getopt(argc, argv, "snCro:ki:t:d:U")) >= 0) {
		r = common_option(c, &i, &native);
		if (c == 'o') {
			free(i.options);
			i.options = strdup(optarg);
			r = 0;
		} else if (r > 0) {
			r = io_usage("open");
		}
	}
	if (!r && optind < argc - 1)
		r = io_usage("open");
	if (!r && optind == argc && !i.options)
		r = io_usage("open");
	if (!r && io->b)
		r = io_fail("file open already, try 'help close'");
	if (!r && optind < argc)
		i.file = strdup(argv[optind]);
	if (!r && native)
		r = native_needs_direct(&i);
	if (r) {
		forget(&i);
		return r;
	}
	forget(&io->as);
	io->as = i;
	return open_as(io);
}

/* The image is closed and opened again: in between somebody else may lock it. */
int io_reopen(struct io *io, int argc, char **argv)
{
	struct io_image *i = &io->as;
	bool r_given = false, w_given = false;
	const char *cache = NULL, *opts = NULL;
	int c;
	optind = 0;
	while ((c = getopt(argc, argv, "c:o:rw")) >= 0) {
		switch (c) {
		case 'c': cache = optarg; break;
		case 'o': opts = optarg; break;
		case 'r': r_given = true; break;
		case 'w': w_given = true; break;
		default: return io_usage("reopen");
		}
		if (r_given && w_given)
			return io_fail("Only one -r/-w option may be given");
	}
	if (optind != argc)
		return io_usage("reopen");
	if (cache && bad_cache(cache))
		return -1;
	if (opts && strstr(opts, "driver="))
		return io_fail("Cannot change the option 'driver'");
	if (i->snapshot)
		return io_fail("an image that was opened with -s cannot be reopened: its changes would be lost");
	struct io_image n = { .file = copy(i->file), .format = copy(i->format ? i->format : image_format(io->b)), .cache = copy(cache ? cache : i->cache),
			      .options = copy(opts ? opts : i->options), .read_only = r_given || (i->read_only && !w_given), .shared = i->shared,
			      .discard_ignore = i->discard_ignore, .copy_on_read = i->copy_on_read };
	if (close_image(io)) {
		forget(&n);
		return -1;
	}
	struct io_image old = *i;
	*i = n;
	if (!open_as(io)) {
		forget(&old);
		return 0;
	}
	forget(i);
	*i = old;
	open_as(io); /* as it was */
	return -1;
}

/* --- the program --- */

static int split(char *line, char **argv, int max)
{
	int n = 0;
	for (char *save = NULL, *w = strtok_r(line, " \t\r\n", &save); w && n < max; w = strtok_r(NULL, " \t\r\n", &save))
		argv[n++] = w;
	return n;
}

static int bad_count(const struct io_command *c, int n)
{
	fprintf(stderr, "bad argument count %d to %s, expected ", n, c->name);
	if (c->max < 0)
		fprintf(stderr, "at least %d arguments\n", c->min);
	else if (c->min == c->max)
		fprintf(stderr, "%d arguments\n", c->min);
	else
		fprintf(stderr, "between %d and %d arguments\n", c->min, c->max);
	return -1;
}

static int command(struct io *io, const char *text)
{
	char *line = strdup(text), *argv[256];
	int argc = line ? split(line, argv, 255) : 0, r = line ? 0 : -1;
	if (argc) {
		argv[argc] = NULL;
		const struct io_command *c = find(argv[0]);
		if (!c) {
			fprintf(stderr, "command \"%s\" not found\n", argv[0]);
			r = -1;
		} else if (argc - 1 < c->min || (c->max >= 0 && argc - 1 > c->max)) {
			r = bad_count(c, argc - 1);
		} else if (!io->b && !c->no_file) {
			fputs("no file open, try 'help open'\n", stderr);
			r = -1;
		} else {
			opterr = 1;
			r = c->fn(io, argc, argv);
		}
	}
	fflush(stdout);
	free(line);
	return r;
}

static void usage(void)
{
	puts("Usage: qemu-io [OPTIONS]... [-c STRING]... [file]\nRead and write a disk image, for tests (lodge io, in qemu-io's words)\n\n"
	      "  --object OBJECTDEF   tls-creds-x509, tls-creds-psk, secret\n  --image-opts         FILE is a list of image options\n"
	      "  -c, --cmd STRING     do this command; without any they come from standard input\n"
	      "  -f, --format FMT     the image's format (raw, qcow2, ...)\n  -r, --read-only      do not write\n"
	      "  -s, --snapshot       writes go to a temporary file\n  -n, --nocache        not through the page cache: -t none\n"
	      "  -m, --misalign       buffers that O_DIRECT would not take\n  -k, --native-aio     as -i native\n"
	      "  -i, --aio=MODE       threads, native or io_uring; requests are done one after the other with all of them\n"
	      "  -t, --cache=MODE     none, writeback, writethrough (default), directsync, unsafe\n  -d, --discard=MODE   unmap (default) or ignore\n"
	      "  -C, --copy-on-read   what a read finds in a backing file is written to the image\n  -U, --force-share    whatever others do with the image; with -r\n  -h, --help           this text\n"
	      "  -V, --version        the version\n\nSee 'qemu-io -c help' for information on available commands.");
}

enum { OPT_IO_OBJECT = 256, OPT_IO_IMAGE_OPTS };

struct run { const char *cmds[1024]; unsigned n; bool image_opts, native; };

static int option(struct io *io, struct run *run, int c)
{
	struct err err = { 0 };
	int r = common_option(c, &io->as, &run->native);
	if (r <= 0)
		return r;
	switch (c) {
	case 'c':
		if (run->n == ARRAY_SIZE(run->cmds))
			return io_fail("too many commands");
		run->cmds[run->n++] = optarg;
		return 0;
	case 'f': free(io->as.format); io->as.format = strdup(optarg); return 0;
	case 'm': io->misalign = true; return 0;
	case 'T': return io_fail("-T is not supported: there is nothing to trace");
	case OPT_IO_IMAGE_OPTS: run->image_opts = true; return 0;
	case OPT_IO_OBJECT:
		r = img_add_object(optarg, &err);
		return r < 0 ? io_fail("%s", err.msg) : r;
	case 'V': puts("qemu-io version 7.2 (Lodge " LODGE_VERSION ")"); return 1;
	case 'h': usage(); return 1;
	}
	usage();
	return -1;
}

static int open_given(struct io *io, const struct run *run, const char *name)
{
	struct io_image *i = &io->as;
	if (run->image_opts && i->format)
		return io_fail("--image-opts and -f are mutually exclusive");
	*(run->image_opts ? &i->options : &i->file) = strdup(name);
	return run->native && native_needs_direct(i) ? -1 : open_as(io);
}

static void print_log(enum log_level level, const char *line, void *opaque)
{
	fflush(stdout);
	fprintf(stderr, "qemu-io: %s%s\n", level == LOG_ERROR ? "" : "warning: ", line);
}

static int run_all(struct io *io, const struct run *run)
{
	char line[8192];
	int failed = 0;
	for (unsigned i = 0; i < run->n && !io->quit; i++)
		failed |= command(io, run->cmds[i]) < 0;
	while (!run->n && !io->quit) {
		fputs("qemu-io> ", stdout);
		fflush(stdout);
		if (!fgets(line, sizeof line, stdin))
			break;
		failed |= command(io, line) < 0;
	}
	return failed;
}

int io_main(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "help", 0, 0, 'h' }, { "version", 0, 0, 'V' }, { "cmd", 1, 0, 'c' }, { "format", 1, 0, 'f' }, { "read-only", 0, 0, 'r' },
		{ "snapshot", 0, 0, 's' }, { "nocache", 0, 0, 'n' }, { "copy-on-read", 0, 0, 'C' }, { "misalign", 0, 0, 'm' },
		{ "native-aio", 0, 0, 'k' }, { "aio", 1, 0, 'i' }, { "cache", 1, 0, 't' }, { "discard", 1, 0, 'd' }, { "trace", 1, 0, 'T' },
		{ "force-share", 0, 0, 'U' }, { "object", 1, 0, OPT_IO_OBJECT }, { "image-opts", 0, 0, OPT_IO_IMAGE_OPTS }, { 0 },
	};
	struct io io = { 0 };
	struct run run = { 0 };
	int c, r = 0;
	log_set_sink(print_log, NULL, LOG_WARN);
	while (!r && (c = getopt_long(argc, argv, "hVc:d:f:rsnCmki:t:T:U", longs, NULL)) >= 0)
		r = option(&io, &run, c);
	if (!r && argc - optind > 1) {
		usage();
		r = -1;
	}
	if (!r && optind < argc)
		r = open_given(&io, &run, argv[optind]);
	if (!r && run_all(&io, &run))
		r = -1;
	if (io.b && close_image(&io))
		r = -1;
	forget(&io.as);
	return r < 0;
}
