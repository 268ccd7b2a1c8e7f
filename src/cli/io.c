/*
 * lodge io: qemu-io's words for tests: read, write, aio_read, aio_write, writev, readv, flush, discard, truncate, length,
 * alloc, map, sleep, quit. aio_ commands are done at once; aio_flush has nothing to wait for.
 */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/parse.h"
#include "cli/img.h"

struct io { struct block *b; struct img_open o; bool failed, quit; };

struct io_args {
	bool compressed, zero, unmap, quiet, verbose, fua, check, no_report;
	bool terse;             /* -C: the report in numbers alone */
	int pattern;            /* -1: none */
	uint64_t off, len;
	char *rest[8];
	int nrest;
};

static int bad(struct io *io, const char *what, const char *arg)
{
	printf("%s -- %s\n", what, arg);
	io->failed = true;
	return -1;
}

static int split(char *line, char **argv, int max)
{
	int n = 0;
	for (char *save = NULL, *w = strtok_r(line, " \t\r\n", &save); w && n < max; w = strtok_r(NULL, " \t\r\n", &save))
		argv[n++] = w;
	return n;
}

static int parse_args(struct io *io, int argc, char **argv, const char *shorts, struct io_args *a)
{
	int c;
	uint64_t v;
	*a = (struct io_args){ .pattern = -1 };
	optind = 0;
	opterr = 0;
	while ((c = getopt(argc, argv, shorts)) >= 0) {
		switch (c) {
		case 'c': a->compressed = true; break;
		case 'z': a->zero = true; break;
		case 'u': a->unmap = true; break;
		case 'q': a->quiet = true; break;
		case 'v': a->verbose = true; break;
		case 'f': a->fua = true; break;
		case 'C': a->terse = true; break;
		case 'P':
			if (parse_u64(optarg, &v) || v > 255)
				return bad(io, "non-numeric or too big pattern", optarg);
			a->pattern = (int)v;
			break;
		default: return bad(io, "invalid option for", argv[0]);
		}
	}
	for (; optind < argc && a->nrest < 8; optind++)
		a->rest[a->nrest++] = argv[optind];
	return 0;
}

static int parse_range(struct io *io, struct io_args *a)
{
	uint64_t n;
	if (a->nrest < 2)
		return bad(io, "offset and length are needed by", "the command");
	if (parse_size(a->rest[0], 1, &a->off))
		return bad(io, "non-numeric offset argument", a->rest[0]);
	for (int i = 1; i < a->nrest; i++) { /* readv and writev: several lengths */
		if (parse_size(a->rest[i], 1, &n))
			return bad(io, "non-numeric length argument", a->rest[i]);
		a->len += n;
	}
	return a->len > INT32_MAX && !a->zero ? bad(io, "length exceeds maximum of 2147483647", a->rest[1]) : 0;
}

static void report(const char *verb, const struct io_args *a, const struct timespec *t0)
{
	struct timespec t1;
	char size[32], rate[32];
	if (a->quiet)
		return;
	clock_gettime(CLOCK_MONOTONIC, &t1);
	double s = (double)(t1.tv_sec - t0->tv_sec) + (double)(t1.tv_nsec - t0->tv_nsec) / 1e9;
	s = s > 0 ? s : 1e-9;
	if (a->terse) {
		printf("%llu,1,%02d.%02d,%.3f,%.3f\n", (unsigned long long)a->len, (int)s, (int)(s * 100) % 100, (double)a->len / s, 1 / s);
		return;
	}
	printf("%s %llu/%llu bytes at offset %llu\n%s, 1 ops; %02d.%02d sec (%s/sec and %.4f ops/sec)\n", verb, (unsigned long long)a->len,
	       (unsigned long long)a->len, (unsigned long long)a->off, img_human(a->len, size), (int)s, (int)(s * 100) % 100,
	       img_human((uint64_t)((double)a->len / s), rate), 1 / s);
}

static int failed(struct io *io, const char *verb, int r)
{
	printf("%s failed: %s\n", verb, strerror(-r));
	io->failed = true;
	return r;
}

static void dump(const uint8_t *buf, uint64_t off, uint64_t len)
{
	for (uint64_t i = 0; i < len; i += 16) {
		printf("%08llx:  ", (unsigned long long)(off + i));
		for (uint64_t k = i; k < MIN(i + 16, len); k++)
			printf("%02x ", buf[k]);
		putchar(' ');
		for (uint64_t k = i; k < MIN(i + 16, len); k++)
			putchar(buf[k] >= 0x20 && buf[k] < 0x7f ? buf[k] : '.');
		puts("");
	}
}

static int io_read(struct io *io, int argc, char **argv)
{
	struct io_args a;
	struct timespec t0;
	if (parse_args(io, argc, argv, "CqvP:", &a) || parse_range(io, &a))
		return -1;
	uint8_t *buf = malloc(a.len + 1);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	int r = buf ? image_read(io->b, a.off, buf, a.len) : -ENOMEM;
	if (r == -EINVAL)
		r = -EIO;
	if (r) {
		free(buf);
		return failed(io, "read", r);
	}
	for (uint64_t i = 0; a.pattern >= 0 && i < a.len; i++) {
		if (buf[i] != a.pattern) {
			printf("Pattern verification failed at offset %llu, %llu bytes\n", (unsigned long long)a.off, (unsigned long long)a.len);
			io->failed = true;
			break;
		}
	}
	if (a.verbose)
		dump(buf, a.off, a.len);
	report("read", &a, &t0);
	free(buf);
	return 0;
}

static int compressed(struct io *io, const struct io_args *a, const uint8_t *buf)
{
	struct image_info i;
	int r = image_info(io->b, &i);
	for (uint64_t at = 0, n; !r && at < a->len; at += n) {
		n = MIN(a->len - at, (uint64_t)i.cluster_size);
		r = image_write_compressed(io->b, a->off + at, buf + at, n);
	}
	if (r != -ENOTSUP)
		image_info_free(&i);
	return r;
}

static int io_write(struct io *io, int argc, char **argv)
{
	struct io_args a;
	struct timespec t0;
	if (parse_args(io, argc, argv, "cCfquzP:", &a) || parse_range(io, &a))
		return -1;
	uint8_t *buf = a.zero ? NULL : malloc(a.len + 1);
	int r = buf || a.zero ? 0 : -ENOMEM;
	clock_gettime(CLOCK_MONOTONIC, &t0);
	if (buf)
		memset(buf, a.pattern >= 0 ? a.pattern : 0xcd, a.len);
	if (!r && a.zero)
		r = image_zero(io->b, a.off, a.len, a.unmap);
	else if (!r)
		r = a.compressed ? compressed(io, &a, buf) : image_write(io->b, a.off, buf, a.len);
	if (!r && a.fua)
		r = image_flush(io->b);
	free(buf);
	if (r == -EINVAL && range_bad(a.off, a.len, block_length(io->b)))
		r = -EIO;
	if (r)
		return failed(io, "write", r);
	report("wrote", &a, &t0);
	return 0;
}

static int io_discard(struct io *io, int argc, char **argv)
{
	struct io_args a;
	struct timespec t0;
	if (parse_args(io, argc, argv, "Cq", &a) || parse_range(io, &a))
		return -1;
	clock_gettime(CLOCK_MONOTONIC, &t0);
	int r = image_discard(io->b, a.off, a.len);
	if (r)
		return failed(io, "discard", r);
	report("discard", &a, &t0);
	return 0;
}

static int io_flush(struct io *io, int argc, char **argv)
{
	int r = image_flush(io->b);
	return r ? failed(io, "flush", r) : 0;
}

static int io_nothing(struct io *io, int argc, char **argv)
{
	return 0;
}

static int io_truncate(struct io *io, int argc, char **argv)
{
	struct err err = { 0 };
	uint64_t size;
	if (argc < 2 || parse_size(argv[argc - 1], 1, &size))
		return bad(io, "non-numeric truncate argument", argc < 2 ? "" : argv[argc - 1]);
	if (image_resize(io->b, size, PREALLOC_OFF, &err)) {
		printf("%s\n", err.msg);
		io->failed = true;
	}
	return 0;
}

static int io_length(struct io *io, int argc, char **argv)
{
	char size[32];
	printf("%s\n", img_human(block_length(io->b), size));
	return 0;
}

static int io_map(struct io *io, int argc, char **argv)
{
	struct block_extent e;
	char len[32], at[32];
	for (uint64_t off = 0; off < block_length(io->b); off += e.len) {
		if (image_map(io->b, image_backing(io->b), off, block_length(io->b) - off, &e))
			return failed(io, "map", -EIO);
		printf("%s (0x%llx) bytes %s allocated at offset %s (0x%llx)\n", img_human(e.len, len), (unsigned long long)e.len,
		       e.present ? "    " : "not", img_human(off, at), (unsigned long long)off);
	}
	return 0;
}

static int io_alloc(struct io *io, int argc, char **argv)
{
	uint64_t off, len = 512, sum = 0;
	struct block_extent e;
	if (argc < 2 || parse_size(argv[1], 1, &off) || (argc > 2 && parse_size(argv[2], 1, &len)) || range_bad(off, len, block_length(io->b)))
		return bad(io, "invalid argument", "alloc");
	for (uint64_t at = off; at < off + len; at += e.len) {
		if (image_map(io->b, image_backing(io->b), at, off + len - at, &e))
			return failed(io, "is_allocated", -EIO);
		sum += e.present ? e.len : 0;
	}
	printf("%llu/%llu bytes allocated at offset %llu\n", (unsigned long long)sum, (unsigned long long)len, (unsigned long long)off);
	return 0;
}

static int io_sleep(struct io *io, int argc, char **argv)
{
	usleep((argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 0) * 1000);
	return 0;
}

static int io_quit(struct io *io, int argc, char **argv)
{
	io->quit = true;
	return 0;
}

static const struct { const char *name; int (*fn)(struct io *io, int argc, char **argv); } commands[] = {
	{ "read", io_read }, { "r", io_read }, { "readv", io_read }, { "rv", io_read }, { "aio_read", io_read }, { "write", io_write },
	{ "w", io_write }, { "writev", io_write }, { "wv", io_write }, { "aio_write", io_write }, { "discard", io_discard },
	{ "d", io_discard }, { "flush", io_flush }, { "f", io_flush }, { "aio_flush", io_nothing }, { "truncate", io_truncate },
	{ "t", io_truncate }, { "length", io_length }, { "l", io_length }, { "map", io_map }, { "alloc", io_alloc }, { "a", io_alloc },
	{ "sleep", io_sleep }, { "quit", io_quit }, { "q", io_quit },
};

static void command(struct io *io, const char *text)
{
	char *line = strdup(text), *argv[64];
	int argc = line ? split(line, argv, 63) : 0;
	if (argc) {
		argv[argc] = NULL;
		unsigned i = 0;
		while (i < ARRAY_SIZE(commands) && strcmp(commands[i].name, argv[0]))
			i++;
		if (i < ARRAY_SIZE(commands))
			commands[i].fn(io, argc, argv);
		else
			bad(io, "command not found", argv[0]);
	}
	fflush(stdout);
	free(line);
}

int io_main(int argc, char **argv)
{
	struct io io = { .o = { .write = true } };
	const char *cmds[256];
	unsigned n = 0;
	int c;
	while ((c = getopt(argc, argv, "hVc:d:f:rsnmkt:i:U")) >= 0) {
		switch (c) {
		case 'c':
			if (n < ARRAY_SIZE(cmds))
				cmds[n++] = optarg;
			break;
		case 'f': io.o.format = optarg; break;
		case 'r': io.o.write = false; break;
		case 'n': io.o.cache = "none"; break;
		case 't': io.o.cache = optarg; break;
		case 'U': io.o.shared = true; break;
		case 'd':
			io.o.discard_ignore = !strcmp(optarg, "ignore") || !strcmp(optarg, "off");
			if (!io.o.discard_ignore && strcmp(optarg, "unmap") && strcmp(optarg, "on"))
				return img_fail("Invalid discard option: %s", optarg);
			break;
		case 'i':
			if (strcmp(optarg, "threads"))
				return img_fail("-i %s is not supported: images are read and written by this thread (-i threads)", optarg);
			break;
		case 'k': case 'm': return img_fail("-%c is not supported", c);
		case 'V': puts("qemu-io version 7.2 (Lodge " LODGE_VERSION ")"); return 0;
		case 's': return img_fail("-s is not supported; make an overlay with 'lodge img create -b'");
		case '?': return 1;     /* getopt told why */
		default: puts("Usage: lodge io [-rnU] [-f FMT] [-t CACHE] [-d DISCARD] [-c COMMAND]... FILE"); return 0;
		}
	}
	if (optind != argc - 1)
		return img_fail("io: one image file name is needed");
	io.b = img_open(argv[optind], &io.o);
	if (!io.b)
		return 1;
	for (unsigned i = 0; i < n && !io.quit; i++)
		command(&io, cmds[i]);
	char line[4096];
	while (!n && !io.quit && fgets(line, sizeof line, stdin))
		command(&io, line);
	int r = block_close_checked(io.b);
	if (r)
		printf("flush failed: %s\n", strerror(-r));
	return io.failed || r;
}
