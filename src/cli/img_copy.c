/*
 * lodge img: verbs that move data: convert, compare, dd, bench.
 *
 * convert writes to a new file beside the target and renames it when everything is written, so that an
 * interrupted run leaves nothing under the final name (not with -n or a device). A few threads take the
 * source in order, piece by piece; compressing and reading run in parallel.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "block/nbd.h"
#include "cli/img.h"

enum { PIECE = 2 << 20, COMPARE_PIECE = 512 << 10, THREADS_MAX = 16, BENCH_THREADS = 64 };

static bool all_zero(const uint8_t *p, uint64_t n)
{
	return !n || (!p[0] && !memcmp(p, p + 1, n - 1));
}

struct convert {
	struct block **src, *dst;
	unsigned nsrc;
	uint64_t size, next, done, unit;
	uint64_t sparse;                /* shortest run of zeroes to leave out, 0: none */
	bool compress, blank, progress, salvage, has_backing, offload;
	struct img_rate rate;
	pthread_mutex_t lock;
	int error;
	bool write_error;
};

/* Part of the sources' concatenation that is in one of them. */
static struct block *source_at(struct convert *v, uint64_t off, uint64_t *in, uint64_t *left)
{
	for (unsigned i = 0; i < v->nsrc; i++) {
		uint64_t len = block_length(v->src[i]);
		if (off < len) {
			*in = off;
			*left = len - off;
			return v->src[i];
		}
		off -= len;
	}
	*in = 0;
	*left = UINT64_MAX;
	return NULL; /* behind the last one */
}

/* 0, -errno; *zero: nothing but zeroes there, buf not filled. *hole: comes from the common backing file. */
static int read_piece(struct convert *v, uint64_t off, uint8_t *buf, uint64_t len, bool *zero)
{
	*zero = true;
	for (uint64_t done = 0, n; done < len; done += n) {
		uint64_t in, left;
		struct block *b = source_at(v, off + done, &in, &left);
		struct block_extent e;
		n = MIN(len - done, left);
		int r = b ? image_map(b, NULL, in, n, &e) : 0;
		if (r)
			return r;
		if (b)
			n = MIN(n, e.len);
		if (!b || e.zero) {
			memset(buf + done, 0, n);
			continue;
		}
		*zero = false;
		r = image_read(b, in, buf + done, n);
		if (r && v->salvage) {
			memset(buf + done, 0, n);
			r = 0;
		}
		if (r)
			return r;
	}
	return 0;
}

static int write_zero(struct convert *v, uint64_t off, uint64_t len)
{
	return v->blank && v->sparse ? 0 : v->sparse ? image_zero(v->dst, off, len, true) : -EAGAIN;
}

/* Runs of data and of at least v->sparse bytes of zeroes. */
static int write_sparse(struct convert *v, uint64_t off, const uint8_t *buf, uint64_t len)
{
	uint64_t step = MAX(v->sparse, 512u), start = 0;
	int r = 0;
	for (uint64_t at = 0; !r && at <= len; at += step) {
		bool end = at >= len, zero = !end && all_zero(buf + at, MIN(step, len - at));
		if (!end && !zero)
			continue;
		if (start < MIN(at, len))
			r = image_write(v->dst, off + start, buf + start, MIN(at, len) - start);
		if (!r && zero)
			r = write_zero(v, off + at, MIN(step, len - at));
		start = at + step;
	}
	if (!r && start < len && len % step)
		r = image_write(v->dst, off + start, buf + start, len - start);
	return r;
}

static int write_compressed(struct convert *v, uint64_t off, const uint8_t *buf, uint64_t len)
{
	int r = 0;
	for (uint64_t at = 0, n; !r && at < len; at += n) {
		n = MIN(len - at, v->unit);
		if (!all_zero(buf + at, n) || !v->blank)
			r = image_write_compressed(v->dst, off + at, buf + at, n);
	}
	return r;
}

/* With a backing file given (-B) what the sources themselves do not hold is left to it. */
static bool left_to_backing(struct convert *v, uint64_t off, uint64_t len)
{
	uint64_t in, left;
	struct block *b = v->has_backing ? source_at(v, off, &in, &left) : NULL;
	struct block_extent e;
	return b && !image_map(b, image_backing(b), in, MIN(len, left), &e) && !e.present && e.len >= MIN(len, left);
}

/* -C: the kernel copies, or shares blocks, where both ends are plain files. False: do it the other way. */
static bool copy_offload(struct convert *v, uint64_t off, uint64_t len)
{
	for (uint64_t done = 0, n; done < len; done += n) {
		uint64_t in, left;
		struct block *b = source_at(v, off + done, &in, &left);
		n = MIN(len - done, left);
		if (b && image_copy_range(b, in, v->dst, off + done, n, v->blank))
			return false;
		if (!b && !v->blank)
			return false;
	}
	return true;
}

static int copy_piece(struct convert *v, uint64_t off, uint8_t *buf, uint64_t len)
{
	bool zero;
	if (left_to_backing(v, off, len) || (v->offload && copy_offload(v, off, len)))
		return 0;
	int r = read_piece(v, off, buf, len, &zero);
	if (r)
		return r;
	if (zero && v->sparse) {
		r = write_zero(v, off, len);
	} else if (v->compress) {
		r = write_compressed(v, off, buf, len);
	} else {
		r = v->sparse ? write_sparse(v, off, buf, len) : image_write(v->dst, off, buf, len);
	}
	if (r)
		__atomic_store_n(&v->write_error, true, __ATOMIC_RELAXED);
	return r;
}

static void *copier(void *opaque)
{
	struct convert *v = opaque;
	uint8_t *buf = NULL;
	if (posix_memalign((void **)&buf, 4096, PIECE))
		buf = NULL;
	pthread_mutex_lock(&v->lock);
	while (!v->error && v->next < v->size) {
		uint64_t off = v->next, len = MIN(v->size - off, (uint64_t)PIECE);
		v->next += len;
		double wait = img_rate_wait(&v->rate, len);
		pthread_mutex_unlock(&v->lock);
		img_sleep(wait);
		int r = buf ? copy_piece(v, off, buf, len) : -ENOMEM;
		pthread_mutex_lock(&v->lock);
		if (r && !v->error)
			v->error = r;
		v->done += len;
		img_progress(v->progress, (double)v->done * 100.0 / (double)v->size);
	}
	pthread_mutex_unlock(&v->lock);
	free(buf);
	return NULL;
}

static int copy_all(struct convert *v, unsigned threads)
{
	pthread_t t[THREADS_MAX];
	unsigned n = 0;
	pthread_mutex_init(&v->lock, NULL);
	while (n + 1 < MIN(threads, THREADS_MAX) && !pthread_create(&t[n], NULL, copier, v))
		n++;
	copier(v);
	while (n)
		pthread_join(t[--n], NULL);
	pthread_mutex_destroy(&v->lock);
	return v->error;
}

/* --- the target --- */

/* An interrupted run removes what it was making. Set before the signals are caught. */
static char *volatile unfinished;

static void on_signal(int sig)
{
	if (unfinished)
		unlink(unfinished);
	signal(sig, SIG_DFL);
	raise(sig);
}

static int make_target(struct image_create *cr, char **final)
{
	struct err err = { 0 };
	struct stat st;
	char *tmp = NULL;
	*final = NULL;
	if (!cr->data_file && !block_name_is_protocol(cr->file) && (stat(cr->file, &st) || S_ISREG(st.st_mode))) {
		char *real = realpath(cr->file, NULL); /* a link's target is replaced, not the link */
		*final = real ? real : strdup(cr->file);
		if (!*final || asprintf(&tmp, "%s.lodge-%d.part", *final, (int)getpid()) < 0)
			return img_fail("out of memory");
		/* Somebody uses the old one? Then it is not ours to replace. */
		struct img_open o = { .format = "raw", .write = true, .plain = true };
		struct block *old = real ? img_open(real, &o) : NULL;
		if (real && !old) {
			free(tmp);
			return 1;
		}
		block_close(old);
		cr->file = tmp;
		unfinished = tmp;
		signal(SIGINT, on_signal);
		signal(SIGTERM, on_signal);
		signal(SIGHUP, on_signal);
		if (real && !stat(real, &st)) {
			int fd = open(tmp, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, st.st_mode & 0777);
			if (fd >= 0)
				close(fd);
		}
	}
	return image_create(cr, &err) ? img_fail("%s: error while converting %s: %s", *final ? *final : cr->file, cr->format, err.msg) : 0;
}

struct convert_args { struct image_create cr; const char *options, *cache, *src_cache; bool no_create, quiet, target_zero, bitmaps, skip_broken, sparse_given; unsigned threads; int64_t sparse; };

static int open_sources(struct convert *v, char **files, unsigned n, const struct img_open *o)
{
	v->src = calloc(n, sizeof *v->src);
	for (; v->src && v->nsrc < n; v->nsrc++) {
		v->src[v->nsrc] = img_open(files[v->nsrc], o);
		if (!v->src[v->nsrc])
			return 1;
		v->size += block_length(v->src[v->nsrc]);
	}
	return v->src ? 0 : img_fail("out of memory");
}

static int convert(struct convert *v, struct convert_args *a)
{
	struct img_create_seen seen = { 0 };
	struct keyvals l = { 0 };
	struct err err = { 0 };
	struct image_info i;
	char *final = NULL;
	const char *target = a->cr.file;
	int r = *a->options && keyvals_parse(&l, "-o", a->options, NULL, &err) ? img_fail("%s", err.msg) : 0;
	a->cr.cluster_size = 65536;
	if (!r)
		r = img_create_options(&a->cr, &l, &seen);
	if (!seen.size)
		a->cr.size = v->size;
	if (!r && v->compress && strcmp(a->cr.format, "qcow2"))
		r = img_fail("error while converting: Compression not supported for this file format");
	v->has_backing = a->cr.backing;
	if (!r && a->cr.backing && !a->cr.backing_format)
		r = img_fail("%s: Could not create image: Backing file specified without backing format (use -F)", a->cr.file);
	v->blank = (!a->no_create && !a->cr.backing) || a->target_zero;
	if (!r && !a->no_create)
		r = make_target(&a->cr, &final);
	if (!final && strcmp(a->cr.format, "qcow2")) /* a device or a server keeps what it had */
		v->blank = a->target_zero;
	struct img_open o = { .format = a->cr.format, .write = true, .cache = a->cache, .no_backing = !a->no_create, .target = true };
	v->dst = r ? NULL : img_open(a->cr.file, &o);
	r = r || !v->dst;
	if (!r && block_length(v->dst) < v->size)
		r = img_fail("output file is smaller than input file");
	if (!r && !image_info(v->dst, &i)) {
		v->unit = i.cluster_size;
		image_info_free(&i);
	}
	v->sparse = (uint64_t)a->sparse;
	if (!r && copy_all(v, v->compress ? MAX(a->threads, 2u) : a->threads))
		r = img_fail("error while %s: %s", v->write_error ? "writing" : "reading", strerror(-v->error));
	if (!r && a->bitmaps)
		r = img_copy_bitmaps(v->dst, v->src[0], a->skip_broken);
	int c = block_close_checked(v->dst); /* waits for the disk unless the cache mode is unsafe, the default, as QEMU */
	if (!r && c)
		r = img_fail("%s: cannot write: %s", target, strerror(-c));
	if (!r && final && rename(a->cr.file, final))
		r = img_fail("%s: %s", final, strerror(errno));
	if (final && r && a->cr.file != target) /* never what was there before */
		unlink(a->cr.file);
	unfinished = NULL;
	if (a->cr.file != target)
		free((char *)(uintptr_t)a->cr.file);
	free(final);
	keyvals_free(&l);
	if (!r)
		img_progress(v->progress, 100);
	if (!r && v->progress)
		puts("");
	return r;
}

int img_convert(int argc, char **argv)
{
	struct convert v = { 0 };
	struct convert_args a = { .options = "", .cache = "unsafe", .threads = 8, .sparse = 4096 };
	struct img_open so = { 0 };
	int c;
	image_create_init(&a.cr);
	while ((c = img_getopt(argc, argv, ":hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:")) >= 0) {
		switch (c) {
		case 'f': so.format = optarg; break;
		case 'O': a.cr.format = optarg; break;
		case 'B': a.cr.backing = optarg; break;
		case 'F': a.cr.backing_format = optarg; break;
		case 'c': v.compress = true; break;
		case 'o': a.options = *a.options && *optarg ? (asprintf((char **)(uintptr_t)&a.options, "%s,%s", a.options, optarg) < 0 ? "" : a.options) : optarg; break;
		case 'l': so.internal = !strncmp(optarg, "snapshot.name=", 14) ? optarg + 14 : !strncmp(optarg, "snapshot.id=", 12) ? optarg + 12 : optarg; break;
		case 'S':
			a.sparse_given = true;
			a.sparse = img_size(optarg, "buffer size for sparse output");
			if (a.sparse < 0 || a.sparse % 512 || a.sparse > PIECE)
				return a.sparse < 0 ? 1 : img_fail("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %u. "
								   "Select 0 to disable sparse detection (fully allocates output).", PIECE);
			break;
		case 'p': v.progress = true; break;
		case 't': a.cache = optarg; break;
		case 'T': so.cache = optarg; break;
		case 'q': a.quiet = true; break;
		case 'n': a.no_create = true; break;
		case 'U': so.shared = true; break;
		case 'C': v.offload = true; break;
		case 'r': {
			int64_t limit = img_size(optarg, "rate limit");
			if (limit < 0)
				return 1;
			v.rate.limit = (uint64_t)limit;
			break;
		}
		case OPT_BITMAPS: a.bitmaps = true; break;
		case OPT_SKIP_BROKEN: a.skip_broken = true; break;
		case OPT_SALVAGE: v.salvage = true; break;
		case OPT_TARGET_ZERO: a.target_zero = true; break;
		case 'm':
			a.threads = (unsigned)strtoul(optarg, NULL, 10);
			if (a.threads < 1 || a.threads > 16)
				return img_fail("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16");
			break;
		}
	}
	if (a.quiet)
		v.progress = false;
	if (img_options_help(a.options, a.cr.format, false))
		return 0;
	if (v.offload && (v.compress || a.sparse_given))
		return img_fail("Cannot enable copy offloading when -%c is used", v.compress ? 'c' : 'S');
	if (a.skip_broken && !a.bitmaps)
		return img_fail("Use of --skip-broken-bitmaps requires --bitmaps");
	if (argc - optind < 2)
		return img_usage("Must specify image file name");
	if (a.bitmaps && argc - optind > 2)
		return img_fail("Copying bitmaps only possible with single source");
	a.cr.tls = img_objects();
	if (a.target_zero && !a.no_create)
		return img_fail("--target-is-zero requires use of -n flag");
	if (v.compress && !a.sparse)
		a.sparse = 4096;
	a.cr.file = argv[argc - 1];
	int r = open_sources(&v, argv + optind, (unsigned)(argc - 1 - optind), &so);
	/* More threads than processors only wait for each other, unless a server is what they wait for. */
	bool remote = nbd_is_name(a.cr.file);
	for (unsigned i = 0; i < v.nsrc; i++)
		remote |= block_is_remote(v.src[i]);
	a.threads = remote ? a.threads : MIN(a.threads, (unsigned)MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L));
	if (!r)
		r = convert(&v, &a);
	for (unsigned i = 0; i < v.nsrc; i++)
		block_close(v.src[i]);
	free(v.src);
	return r;
}

/* --- compare --- */

struct compare { struct block *b[2]; bool strict, quiet, progress; uint8_t *buf[2]; };

static int different(const struct compare *c, const char *what, uint64_t off)
{
	if (!c->quiet)
		printf("%s%llu!\n", what, (unsigned long long)off);
	return 1;
}

static uint64_t first_difference(const uint8_t *a, const uint8_t *b, uint64_t n)
{
	uint64_t i = 0;
	while (i < n && a[i] == b[i])
		i++;
	return i;
}

/* Both or one (the longer, against zeroes) from `off`; *n how far. */
static int compare_some(struct compare *c, uint64_t off, uint64_t *n)
{
	struct block_extent e[2];
	bool there[2], zero[2];
	for (int i = 0; i < 2; i++) {
		uint64_t len = block_length(c->b[i]);
		there[i] = off < len;
		e[i] = (struct block_extent){ .zero = true };
		if (there[i]) {
			*n = MIN(*n, len - off);
			if (image_map(c->b[i], NULL, off, *n, &e[i]))
				return img_fail("Sector allocation test failed"), 3;
			*n = MIN(*n, e[i].len);
		}
		zero[i] = e[i].zero;
	}
	if (c->strict && there[0] && there[1] && e[0].data != e[1].data)
		return different(c, "Strict mode: Offset ", off) ? 1 : 0;
	if (zero[0] && zero[1])
		return 0;
	for (int i = 0; i < 2; i++) {
		if (zero[i])
			memset(c->buf[i], 0, *n);
		else if (image_read(c->b[i], off, c->buf[i], *n))
			return img_fail("Error while reading offset %llu", (unsigned long long)off), 4;
	}
	if (!memcmp(c->buf[0], c->buf[1], *n))
		return 0;
	return different(c, "Content mismatch at offset ", off + first_difference(c->buf[0], c->buf[1], *n) / 512 * 512);
}

int img_compare(int argc, char **argv)
{
	struct compare k = { 0 };
	struct img_open o[2] = { { 0 }, { 0 } };
	int c, r = 0;
	while ((c = img_getopt(argc, argv, ":hf:F:T:pqsU")) >= 0) {
		switch (c) {
		case 'f': o[0].format = optarg; break;
		case 'F': o[1].format = optarg; break;
		case 'T': o[0].cache = o[1].cache = optarg; break;
		case 'p': k.progress = true; break;
		case 'q': k.quiet = true; break;
		case 's': k.strict = true; break;
		case 'U': o[0].shared = o[1].shared = true; break;
		}
	}
	if (optind != argc - 2)
		return img_usage("Expecting two image file names"), 2;
	for (int i = 0; i < 2 && !r; i++) {
		k.b[i] = img_open(argv[optind + i], &o[i]);
		/* On a page: the kernel's copy is several times slower to anywhere else. */
		r = !k.b[i] || posix_memalign((void **)&k.buf[i], 4096, COMPARE_PIECE) ? 2 : 0;
	}
	if (!r && k.strict && block_length(k.b[0]) != block_length(k.b[1])) {
		if (!k.quiet)
			puts("Strict mode: Image size mismatch!");
		r = 1;
	} else if (!r) {
		uint64_t la = block_length(k.b[0]), lb = block_length(k.b[1]), size = MAX(la, lb);
		if (la != lb && !k.quiet)
			puts("Warning: Image size mismatch!");
		for (uint64_t off = 0, n; !r && off < size; off += n) {
			n = MIN(size - off, (uint64_t)COMPARE_PIECE);
			r = compare_some(&k, off, &n);
			img_progress(k.progress, (double)off * 100.0 / (double)size);
		}
		if (!r && !k.quiet)
			puts("Images are identical.");
	}
	for (int i = 0; i < 2; i++) {
		block_close(k.b[i]);
		free(k.buf[i]);
	}
	return r;
}

/* --- dd --- */

int img_dd(int argc, char **argv)
{
	struct img_open o = { 0 };
	struct image_create cr;
	const char *in = NULL;
	struct err err = { 0 };
	int64_t bs = 512, count = -1, skip = 0;
	int c;
	image_create_init(&cr);
	while ((c = img_getopt(argc, argv, ":hf:O:U")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'O')
			cr.format = optarg;
		else if (c == 'U')
			o.shared = true;
	}
	for (; optind < argc; optind++) {
		char *eq = strchr(argv[optind], '=');
		if (!eq)
			return img_fail("unrecognized operand %s", argv[optind]);
		*eq = 0;
		if (!strcmp(argv[optind], "if"))
			in = eq + 1;
		else if (!strcmp(argv[optind], "of"))
			cr.file = eq + 1;
		else if (!strcmp(argv[optind], "bs"))
			bs = img_size(eq + 1, "bs");
		else if (!strcmp(argv[optind], "count"))
			count = img_size(eq + 1, "count");
		else if (!strcmp(argv[optind], "skip"))
			skip = img_size(eq + 1, "skip");
		else
			return img_fail("unrecognized operand %s", argv[optind]);
	}
	if (!in || !cr.file)
		return img_fail("Must specify both input and output file names");
	if (bs <= 0 || bs > INT32_MAX || skip < 0)
		return img_fail("invalid number: bs must be from 1 to 2147483647");
	struct block *src = img_open(in, &o), *dst = NULL;
	uint8_t *buf = malloc((size_t)bs);
	if (!src || !buf)
		return block_close(src), free(buf), 1;
	uint64_t size = block_length(src), from = (uint64_t)skip > size / (uint64_t)bs ? size : (uint64_t)skip * (uint64_t)bs;
	uint64_t len = size - from;
	if (count >= 0 && (uint64_t)count <= len / (uint64_t)bs)
		len = (uint64_t)count * (uint64_t)bs;
	cr.size = len;
	cr.tls = img_objects();
	int r = image_create(&cr, &err) ? img_fail("%s: %s", cr.file, err.msg) : 0;
	struct img_open w = { .format = cr.format, .write = true, .plain = true };
	if (!r)
		dst = img_open(cr.file, &w);
	r = r || !dst;
	for (uint64_t off = 0, n; !r && off < len; off += n) {
		n = MIN(len - off, (uint64_t)bs);
		int e = image_read(src, from + off, buf, n);
		if (e)
			r = img_fail("error while reading from input image file: %s", strerror(-e));
		else if ((e = image_write(dst, off, buf, n)))
			r = img_fail("error while writing to output image file: %s", strerror(-e));
	}
	if (block_close_checked(dst) && !r)
		r = img_fail("%s: cannot write", cr.file);
	block_close(src);
	free(buf);
	return r;
}

/* --- bench --- */

struct bench { struct block *b; uint64_t count, next, off, size, step, flush; bool write; int pattern; pthread_mutex_t lock; int error; };

static void *bencher(void *opaque)
{
	struct bench *k = opaque;
	uint8_t *buf = NULL;
	if (posix_memalign((void **)&buf, 4096, k->size))
		return NULL;
	memset(buf, k->pattern, k->size);
	pthread_mutex_lock(&k->lock);
	while (k->next < k->count && !k->error) {
		uint64_t off = k->off, nth = ++k->next;
		k->off += k->step;
		if (k->off + k->size > block_length(k->b))
			k->off = block_length(k->b) <= k->size ? 0 : k->off % (block_length(k->b) - k->size + 1) / 512 * 512;
		pthread_mutex_unlock(&k->lock);
		int r = k->write ? image_write(k->b, off, buf, k->size) : image_read(k->b, off, buf, k->size);
		if (!r && k->flush && nth % k->flush == 0)
			r = image_flush(k->b);
		pthread_mutex_lock(&k->lock);
		if (r)
			k->error = r;
	}
	pthread_mutex_unlock(&k->lock);
	free(buf);
	return NULL;
}

int img_bench(int argc, char **argv)
{
	struct bench k = { .count = 75000, .size = 4096 };
	struct img_open o = { 0 };
	bool quiet = false;
	int64_t v = 0, depth = 64;
	int c;
	while ((c = img_getopt(argc, argv, ":hc:d:f:ni:o:qs:S:t:wU")) >= 0) {
		if (strchr("cdosS", c) || c == OPT_FLUSH || c == OPT_PATTERN) {
			v = img_size(optarg, "number");
			if (v < 0)
				return 1;
		}
		switch (c) {
		case 'c': k.count = (uint64_t)v; break;
		case 'd': depth = v; break;
		case 'f': o.format = optarg; break;
		case 'n': o.cache = "none"; break;
		case 'o': k.off = (uint64_t)v; break;
		case 'q': quiet = true; break;
		case 's': k.size = (uint64_t)v; break;
		case 'S': k.step = (uint64_t)v; break;
		case 't': o.cache = optarg; break;
		case 'w': k.write = o.write = true; break;
		case 'U': o.shared = true; break;
		case OPT_FLUSH: k.flush = (uint64_t)v; break;
		case OPT_PATTERN: k.pattern = (int)v; break;
		}
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	if (!k.size || k.size > 1 << 30 || !depth)
		return img_fail("Invalid buffer size specified");
	k.step = k.step ? k.step : k.size;
	k.b = img_open(argv[optind], &o);
	if (!k.b)
		return 1;
	if (range_bad(k.off, k.size, block_length(k.b))) {
		block_close(k.b);
		return img_fail("the requests do not fit the image");
	}
	if (!quiet)
		printf("Sending %llu %s requests, %llu bytes each, %lld in parallel (starting at offset %llu, step size %llu)\n",
		       (unsigned long long)k.count, k.write ? "write" : "read", (unsigned long long)k.size, (long long)depth,
		       (unsigned long long)k.off, (unsigned long long)k.step);
	struct timespec t0, t1;
	/* Past the page cache the depth is what the device shall see; with it more threads than processors only wait for each other. */
	bool direct = o.cache && (!strcmp(o.cache, "none") || !strcmp(o.cache, "off") || !strcmp(o.cache, "directsync"));
	pthread_t t[BENCH_THREADS];
	unsigned n = 0, want = (unsigned)MIN(depth, direct ? BENCH_THREADS : (int64_t)MIN(2 * sysconf(_SC_NPROCESSORS_ONLN), (long)THREADS_MAX));
	pthread_mutex_init(&k.lock, NULL);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	while (n + 1 < want && !pthread_create(&t[n], NULL, bencher, &k))
		n++;
	bencher(&k);
	while (n)
		pthread_join(t[--n], NULL);
	clock_gettime(CLOCK_MONOTONIC, &t1);
	int r = k.error ? img_fail("Failed request: %s", strerror(-k.error)) : 0;
	if (!r && !quiet)
		printf("Run completed in %3.3f seconds.\n", (double)(t1.tv_sec - t0.tv_sec) + (double)(t1.tv_nsec - t0.tv_nsec) / 1e9);
	block_close(k.b);
	return r;
}
