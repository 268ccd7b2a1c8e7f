/* lodge io: the commands that read, write and ask. */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/parse.h"
#include "cli/io.h"
#include "loop/loop.h"

#define REQUEST_MAX 2147483136ull       /* QEMU's: 2 GiB less a sector */

struct args {
	bool compressed, zero, unmap, quiet, verbose, fua, no_fallback, vmstate, invalid, terse;
	int pattern;                    /* -1: none */
	bool s_given, l_given;
	uint64_t s, l;                  /* the part that -P looks at */
	const char *source;
	uint64_t off, len;
	unsigned lens;
};

/* --- arguments --- */

static int parse_pattern(const char *text, int *out)
{
	char *end;
	long v = strtol(text, &end, 0);
	if (!*text || *end || v < 0 || v > 255) {
		printf("%s is not a valid pattern byte\n", text);
		return -1;
	}
	*out = (int)v;
	return 0;
}

static int option(int c, const char *cmd, bool writes, struct args *a)
{
	switch (c) {
	case 'b': a->vmstate = true; return 0;
	case 'c': a->compressed = true; return 0;
	case 'C': a->terse = true; return 0;
	case 'f': a->fua = true; return 0;
	case 'i': a->invalid = true; return 0;
	case 'n': a->no_fallback = true; return 0;
	case 'p': return 0; /* nothing, as in QEMU */
	case 'q': a->quiet = true; return 0;
	case 'u': a->unmap = true; return 0;
	case 'v': a->verbose = true; return 0;
	case 'z': a->zero = true; return 0;
	case 'P': return parse_pattern(optarg, &a->pattern);
	case 's':
		if (writes) {
			a->source = optarg;
			return 0;
		}
		a->s_given = true;
		return io_number(optarg, &a->s);
	case 'l':
		a->l_given = true;
		return io_number(optarg, &a->l);
	}
	return io_usage(cmd);
}

/* Options, offset and lengths; several of these only with `vector`. */
static int parse(int argc, char **argv, const char *shorts, bool writes, bool vector, const char *name, struct args *a)
{
	uint64_t n;
	int c;
	*a = (struct args){ .pattern = -1 };
	optind = 0;
	while ((c = getopt(argc, argv, shorts)) >= 0) {
		if (option(c, name, writes, a))
			return -1;
	}
	if (argc - optind < 2 || (!vector && argc - optind > 2))
		return io_usage(name);
	if (io_number(argv[optind++], &a->off))
		return -1;
	for (; optind < argc; optind++, a->lens++) {
		if (io_number(argv[optind], &n))
			return -1;
		if (vector ? n > REQUEST_MAX || a->len + n > REQUEST_MAX : n > REQUEST_MAX && !a->no_fallback) {
			printf(vector ? "Argument '%s' exceeds maximum size %llu\n" : writes ? "length cannot exceed %2$llu without -n, given %1$s\n"
			       : "length cannot exceed %2$llu, given %1$s\n", argv[optind], REQUEST_MAX);
			return -1;
		}
		a->len += n;
	}
	return 0;
}

static int say(const char *text)
{
	puts(text);
	return -1;
}

static int no_vmstate(const struct args *a)
{
	return a->vmstate ? say("-b (the VM state) is not supported") : 0;
}

/* --- results --- */

static void report(const char *verb, const struct args *a, uint64_t began)
{
	char size[32], rate[32], took[40];
	if (a->quiet)
		return;
	double s = (double)(clock_host_ns() - began) / 1e9;
	s = s > 0 ? s : 1e-9;
	unsigned sec = (unsigned)s, hundredth = (unsigned)(s * 100) % 100;
	if (a->terse) {
		printf("%llu,1,%u:%02u:%02u.%02u,%.3f,%.3f\n", (unsigned long long)a->len, sec / 3600, sec / 60 % 60, sec % 60, hundredth,
		       (double)a->len / s, 1 / s);
		return;
	}
	if (sec >= 3600)
		snprintf(took, sizeof took, "%u:%02u:%02u.%02u", sec / 3600, sec / 60 % 60, sec % 60, hundredth);
	else
		snprintf(took, sizeof took, "%02u.%02u sec", sec, hundredth);
	printf("%s %llu/%llu bytes at offset %llu\n%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", verb, (unsigned long long)a->len,
	       (unsigned long long)a->len, (unsigned long long)a->off, io_bytes((double)a->len, size), took, io_bytes((double)a->len / s, rate), 1 / s);
}

static int failed(const char *verb, int r)
{
	printf("%s failed: %s\n", verb, strerror(-r));
	return -1;
}

static int writable(struct io *io)
{
	return block_read_only(io->b) ? io_fail("Block node is read-only") : 0;
}

/* Outside of the disk is an I/O error, as a guest sees it. */
static int outside(struct io *io, const struct args *a)
{
	return range_bad(a->off, a->len, block_length(io->b)) ? -EIO : 0;
}

static void dump(const uint8_t *buf, uint64_t off, uint64_t len)
{
	for (uint64_t i = 0; i < len; i += 16) {
		printf("%08llx:  ", (unsigned long long)(off + i));
		for (uint64_t k = i; k < MIN(i + 16, len); k++)
			printf("%02x ", buf[k]);
		putchar(' ');
		for (uint64_t k = i; k < MIN(i + 16, len); k++) {
			bool alnum = (buf[k] | 32) >= 'a' ? (buf[k] | 32) <= 'z' : buf[k] >= '0' && buf[k] <= '9';
			putchar(alnum ? buf[k] : '.');
		}
		puts("");
	}
}

/* A buffer that begins on a page or, with -m, just where O_DIRECT does not want it. */
struct buffer { void *base; uint8_t *p; };

static int buffer_get(struct io *io, struct buffer *b, uint64_t len)
{
	int r = posix_memalign(&b->base, 4096, len + 4096);
	b->p = r ? NULL : (uint8_t *)b->base + (io->misalign ? 16 : 0);
	if (r)
		b->base = NULL;
	return -r;
}

/* --- reading --- */

static int verify(const struct args *a, const uint8_t *buf)
{
	uint64_t n = a->l_given ? a->l : a->len - a->s;
	for (uint64_t i = 0; i < n; i++) {
		if (buf[a->s + i] != a->pattern) {
			printf("Pattern verification failed at offset %llu, %llu bytes\n", (unsigned long long)(a->off + a->s), (unsigned long long)n);
			return -1;
		}
	}
	return 0;
}

static int do_read(struct io *io, const struct args *a, const char *verb)
{
	struct buffer b;
	int bad = 0, r = buffer_get(io, &b, a->len);
	uint64_t began = clock_host_ns();
	if (!r && !(r = outside(io, a)))
		r = image_read(io->b, a->off, b.p, a->len);
	if (!r && a->pattern >= 0)
		bad = verify(a, b.p);
	if (!r && a->verbose)
		dump(b.p, a->off, a->len);
	if (!r)
		report("read", a, began);
	free(b.base);
	return r ? failed(verb, r) : bad;
}

static int cmd_read(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "bCl:pP:qs:v", false, false, "read", &a))
		return -1;
	if (a.pattern < 0 && (a.s_given || a.l_given))
		return io_usage("read");
	if (a.s > a.len || (a.l_given && a.l > a.len - a.s))
		return say("pattern verification range exceeds end of read data");
	return no_vmstate(&a) ? -1 : do_read(io, &a, "read");
}

static int cmd_readv(struct io *io, int argc, char **argv)
{
	struct args a;
	return parse(argc, argv, "CP:qv", false, true, "readv", &a) ? -1 : do_read(io, &a, "read");
}

static void aio_read(struct io *io, const void *args)
{
	do_read(io, args, "readv");
}

static int cmd_aio_read(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "CP:iqv", false, true, "aio_read", &a))
		return -1;
	if (a.invalid)
		puts("injecting invalid read request");
	else if (io->breaks)
		return io_aio_start(io, aio_read, &a, sizeof a);
	else
		do_read(io, &a, "readv");
	return 0; /* submitting it worked */
}

/* --- writing --- */

static int write_compressed(struct io *io, const struct args *a, const uint8_t *buf)
{
	struct image_info i;
	int r = image_info(io->b, &i);
	if (r == -ENOTSUP && i.cluster_size) /* a filter above the image */
		r = 0;
	for (uint64_t at = 0, n; !r && at < a->len; at += n) {
		n = MIN(a->len - at, (uint64_t)i.cluster_size);
		r = image_write_compressed(io->b, a->off + at, buf + at, n);
	}
	if (r != -ENOTSUP)
		image_info_free(&i);
	return r;
}

/* The file over and over. */
static int fill_from(const char *file, uint8_t *buf, uint64_t len)
{
	FILE *f = fopen(file, "rb");
	size_t n = f ? fread(buf, 1, len, f) : 0;
	bool bad = f && ferror(f);
	if (!f || bad)
		fprintf(stderr, "%s: %s\n", file, strerror(errno));
	else if (!n && len)
		fprintf(stderr, "%s: file is empty\n", file);
	if (f)
		fclose(f);
	if (!f || bad || (!n && len))
		return -1;
	for (uint64_t i = n; i < len; i++)
		buf[i] = buf[i - n];
	return 0;
}

static int do_write(struct io *io, const struct args *a, const char *verb)
{
	struct buffer b = { 0 };
	int r = a->zero ? 0 : buffer_get(io, &b, a->len);
	if (!r && !a->zero && a->source && fill_from(a->source, b.p, a->len)) {
		free(b.base);
		return -1;
	}
	if (!r && !a->zero && !a->source)
		memset(b.p, a->pattern >= 0 ? a->pattern : 0xcd, a->len);
	uint64_t began = clock_host_ns();
	if (!r)
		r = outside(io, a);
	if (!r && a->zero)
		r = a->no_fallback ? image_zero_quick(io->b, a->off, a->len, a->unmap) : image_zero(io->b, a->off, a->len, a->unmap);
	else if (!r)
		r = a->compressed ? write_compressed(io, a, b.p) : image_write(io->b, a->off, b.p, a->len);
	if (!r && a->fua)
		r = image_flush(io->b);
	free(b.base);
	if (r)
		return failed(verb, r);
	report("wrote", a, began);
	return 0;
}

static int write_options(const struct args *a)
{
	if (a->vmstate && a->zero)
		return say("-b and -z cannot be specified at the same time");
	if (a->fua && a->compressed)
		return say("-f and -b or -c cannot be specified at the same time");
	if (a->no_fallback && !a->zero)
		return say("-n requires -z to be specified");
	if (a->unmap && !a->zero)
		return say("-u requires -z to be specified");
	if (a->zero + (a->pattern >= 0) + (a->source != NULL) > 1)
		return say("Only one of -z, -P, and -s can be specified at the same time");
	return 0;
}

static int cmd_write(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "bcCfnpP:qs:uz", true, false, "write", &a) || write_options(&a) || no_vmstate(&a) || writable(io))
		return -1;
	return do_write(io, &a, "write");
}

static int cmd_writev(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "CfqP:", true, true, "writev", &a) || writable(io))
		return -1;
	return do_write(io, &a, "writev");
}

static void aio_write(struct io *io, const void *args)
{
	do_write(io, args, "aio_write");
}

static int cmd_aio_write(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "CfiP:quz", true, true, "aio_write", &a))
		return -1;
	if (a.zero && a.lens > 1)
		return say("-z supports only a single length parameter");
	if (a.unmap && !a.zero)
		return say("-u requires -z to be specified");
	if (writable(io))
		return -1;
	if (a.invalid)
		puts("injecting invalid write request");
	else if (io->breaks)
		return io_aio_start(io, aio_write, &a, sizeof a);
	else
		do_write(io, &a, "aio_write");
	return 0;
}

static int cmd_discard(struct io *io, int argc, char **argv)
{
	struct args a;
	if (parse(argc, argv, "Cq", false, false, "discard", &a) || writable(io))
		return -1;
	uint64_t began = clock_host_ns();
	int r = outside(io, &a);
	if (!r)
		r = image_discard(io->b, a.off, a.len);
	if (r)
		return failed("discard", r);
	report("discard", &a, began);
	return 0;
}

static int cmd_flush(struct io *io, int argc, char **argv)
{
	int r = image_flush(io->b);
	return r ? io_fail("flush failed: %s", strerror(-r)) : 0; /* standard output stays as qemu-io's */
}

static int cmd_aio_flush(struct io *io, int argc, char **argv)
{
	return io_aio_wait(io);
}

static int cmd_truncate(struct io *io, int argc, char **argv)
{
	static const char *const modes[] = { [PREALLOC_OFF] = "off", [PREALLOC_METADATA] = "metadata", [PREALLOC_FALLOC] = "falloc", [PREALLOC_FULL] = "full" };
	unsigned mode = PREALLOC_OFF;
	struct err err = { 0 };
	uint64_t size;
	int c;
	optind = 0;
	while ((c = getopt(argc, argv, "m:")) >= 0) {
		if (c != 'm')
			return io_usage("truncate");
		for (mode = 0; mode < ARRAY_SIZE(modes) && strcmp(modes[mode], optarg); mode++)
			;
		if (mode == ARRAY_SIZE(modes))
			return io_fail("Invalid preallocation mode '%s'", optarg);
	}
	if (optind != argc - 1)
		return io_usage("truncate");
	if (io_number(argv[optind], &size) || writable(io))
		return -1;
	return image_resize(io->b, size, (enum block_prealloc)mode, &err) ? io_fail("%s", err.msg) : 0;
}

/* --- asking --- */

static int cmd_length(struct io *io, int argc, char **argv)
{
	char size[32];
	puts(io_bytes((double)block_length(io->b), size));
	return 0;
}

static int cmd_info(struct io *io, int argc, char **argv)
{
	struct image_info i = { 0 };
	char a[32], b[32];
	bool qcow2 = !strcmp(image_format(io->b), "qcow2");
	int r = image_info(io->b, &i);
	uint64_t cover = (uint64_t)i.cluster_size * i.cluster_size / (i.extended_l2 ? 16 : 8);
	uint64_t end = qcow2 && !r && cover ? (block_length(io->b) + cover - 1) / cover * cover : 0;
	printf("format name: %s\ncluster size: %s\nvm state offset: %s\n", image_driver(io->b), io_bytes(i.cluster_size, a), io_bytes((double)end, b));
	if (qcow2 && !r)
		img_print_specific(&i);
	if (!r)
		image_info_free(&i);
	return 0;
}

/* A run of one kind from `off` on, at most to `end`. */
static int run_at(struct io *io, uint64_t off, uint64_t end, bool *present, uint64_t *len)
{
	struct block_extent e;
	*len = 0;
	while (off < end) {
		int r = image_map(io->b, image_backing(io->b), off, end - off, &e);
		if (r)
			return r;
		if (*len && e.present != *present)
			break;
		*present = e.present;
		*len += e.len;
		off += e.len;
	}
	return 0;
}

static int cmd_map(struct io *io, int argc, char **argv)
{
	char len[32], at[32];
	uint64_t n, size = block_length(io->b);
	bool present = false;
	for (uint64_t off = 0; off < size; off += n) {
		if (run_at(io, off, size, &present, &n))
			return failed("map", -EIO);
		printf("%s (0x%llx) bytes %s allocated at offset %s (0x%llx)\n", io_bytes((double)n, len), (unsigned long long)n, present ? "   " : "not",
		       io_bytes((double)off, at), (unsigned long long)off);
	}
	return 0;
}

static int cmd_alloc(struct io *io, int argc, char **argv)
{
	uint64_t off, len = 512, sum = 0, size = block_length(io->b), n;
	bool present = false;
	char at[32];
	if (io_number(argv[1], &off) || (argc > 2 && io_number(argv[2], &len)))
		return -1;
	len = off >= size ? 0 : MIN(len, size - off);
	for (uint64_t i = off; i < off + len; i += n) {
		if (run_at(io, i, off + len, &present, &n))
			return failed("is_allocated", -EIO);
		sum += present ? n : 0;
	}
	printf("%llu/%llu bytes allocated at offset %s\n", (unsigned long long)sum, (unsigned long long)len, io_bytes((double)off, at));
	return 0;
}

/* --- the rest --- */

static int cmd_sleep(struct io *io, int argc, char **argv)
{
	char *end;
	errno = 0;
	long ms = strtol(argv[1], &end, 0);
	if (errno || *end || ms < 0) {
		printf("%s is not a valid number\n", argv[1]);
		return -1;
	}
	img_sleep((double)ms / 1000);
	return 0;
}

static int cmd_sigraise(struct io *io, int argc, char **argv)
{
	uint64_t sig;
	if (io_number(argv[1], &sig))
		return -1;
	if (sig > 64) {
		printf("signal argument '%s' is too large to be a valid signal\n", argv[1]);
		return -1;
	}
	fflush(stdout);
	raise((int)sig);
	return 0;
}

static int cmd_abort(struct io *io, int argc, char **argv)
{
	fflush(stdout);
	abort();
}

#define REPORT " -C: figures in one line, for machines; -q: none\n"

const struct io_command io_commands[] = {
	{ "abort", NULL, cmd_abort, 0, 0, true, NULL, "end the program with abort(), as a crash would", NULL },
	{ "aio_flush", NULL, cmd_aio_flush, 0, 0, false, NULL, "wait for aio_ requests (without breakpoints they are done when their command ends)", NULL },
	{ "aio_read", NULL, cmd_aio_read, 2, -1, false, "[-Ciqv] [-P pattern] off len [len..]", "read; what fails is told, but is no failure of the command",
	  REPORT " -P BYTE: every byte must be this\n -i: count it as invalid and do nothing\n -v: show the bytes" },
	{ "aio_write", NULL, cmd_aio_write, 2, -1, false, "[-Cfiquz] [-P pattern] off len [len..]", "write; what fails is told, but is no failure of the command",
	  REPORT " -P BYTE: write this, not 0xcd\n -f: and make it stable\n -i: count it as invalid and do nothing\n -z: zeroes, without a buffer; -u: they may be unmapped" },
	{ "alloc", "a", cmd_alloc, 1, 2, false, "offset [count]", "how much of a range the image itself holds", NULL },
	{ "break", NULL, io_break, 2, 2, false, "event tag", "stop the next request that comes by a point (blkdebug's events)", NULL },
	{ "close", "c", io_close, 0, 0, false, NULL, "close the image", NULL },
	{ "discard", "d", cmd_discard, 2, -1, false, "[-Cq] off len", "forget what a range holds", REPORT },
	{ "flush", "f", cmd_flush, 0, 0, false, NULL, "make stable what was written", NULL },
	{ "help", "?", io_help, 0, 1, true, "[command]", "this list, or a command's options", NULL },
	{ "info", "i", cmd_info, 0, 0, false, NULL, "what the image is", NULL },
	{ "length", "l", cmd_length, 0, 0, false, NULL, "the disk's size", NULL },
	{ "map", NULL, cmd_map, 0, 0, false, NULL, "which ranges the image itself holds", NULL },
	{ "open", "o", io_open, 1, -1, true, "[-rsnkU] [-i aio] [-t cache] [-d discard] [-o options] [path]", "open an image",
	  " -r: to read only\n -s: writes go to a temporary file\n -n: -t none\n -U: whatever others do with it (with -r)\n -k: -i native\n"
	  " -i MODE: threads, native, io_uring\n -t MODE: cache mode\n -d MODE: unmap or ignore\n -o OPTIONS: as --image-opts; the path is its file" },
	{ "quit", "q", io_quit, 0, 0, true, NULL, "end the program", NULL },
	{ "read", "r", cmd_read, 2, -1, false, "[-abCqv] [-P pattern [-s off] [-l len]] off len", "read",
	  REPORT " -P BYTE: every byte must be this\n -s OFF, -l LEN: look at this part of them only\n -v: show the bytes\n -p: nothing" },
	{ "readv", NULL, cmd_readv, 2, -1, false, "[-Cqv] [-P pattern] off len [len..]", "read as much as the lengths say together",
	  REPORT " -P BYTE: every byte must be this\n -v: show the bytes" },
	{ "remove_break", NULL, io_remove_break, 1, 1, false, "tag", "forget a breakpoint; who stands there goes on", NULL },
	{ "reopen", NULL, io_reopen, 0, -1, false, "[(-r|-w)] [-c cache] [-o options]", "close the image and open it in another way",
	  " -r: to read only\n -w: to write\n -c MODE: cache mode\n -o OPTIONS: as with open" },
	{ "resume", NULL, io_resume, 1, 1, false, "tag", "let a request go on that stands at a breakpoint", NULL },
	{ "sigraise", NULL, cmd_sigraise, 1, 1, true, "signal", "send the program a signal, by number", NULL },
	{ "sleep", NULL, cmd_sleep, 1, 1, true, "ms", "wait so many milliseconds", NULL },
	{ "truncate", "t", cmd_truncate, 1, 3, false, "[-m prealloc_mode] off", "change the disk's size", NULL },
	{ "wait_break", NULL, io_wait_break, 1, 1, false, "tag", "wait until a request stands at a breakpoint", NULL },
	{ "write", "w", cmd_write, 2, -1, false, "[-bcCfnquz] [-P pattern | -s source_file] off len", "write",
	  REPORT " -P BYTE: this, not 0xcd\n -s FILE: the file's bytes, over and over\n -c: compressed, whole clusters\n -f: and make it stable\n"
	  " -z: zeroes, without a buffer; -u: they may be unmapped; -n: fail where that would mean writing them\n -p: nothing" },
	{ "writev", NULL, cmd_writev, 2, -1, false, "[-Cfq] [-P pattern] off len [len..]", "write as much as the lengths say together",
	  REPORT " -P BYTE: this, not 0xcd\n -f: and make it stable" },
	{ 0 },
};
