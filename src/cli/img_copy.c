/*
 * lodge img: verbs that move data: convert, dd.
 *
 * convert writes to a new file beside the target and renames it when everything is written, so that an
 * interrupted run leaves nothing under the final name (not with -n or a device). What was there before is removed
 * when the new image has been created. A few threads take the source in order, piece by piece; compressing and
 * reading run in parallel.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/nbd.h"
#include "cli/img.h"
#include "loop/loop.h"

enum { PIECE = 2 << 20, NEAR_PIECE = 1 << 20, LOOK = 1 << 30, NOTHING_MAX = 64 << 20, SPARSE_MAX = 16 << 20, THREADS_REMOTE = 8, THREADS_NEAR = 3, THREADS_MAX = 16, SLOW_MS = 8, VERY_SLOW_MS = 40 };

static bool all_zero(const uint8_t *p, uint64_t n)
{
	return !n || (!p[0] && !memcmp(p, p + 1, n - 1));
}

enum status { DATA, ZERO, BELOW /* the target's backing file has it */ };

struct convert {
	struct block **src, *dst;
	unsigned nsrc;
	uint64_t size, next, done, unit, piece;
	uint64_t room;                  /* of a thread's buffer: the largest piece there will be */
	uint64_t skip;                  /* of the sources, at their beginning */
	uint64_t sparse;                /* shortest run of zeroes to leave out, 0: none */
	bool compress, blank, progress, salvage, quiet, offload;
	struct block *base;             /* of the source's chain: what it and those below hold is left to the target's backing file. NULL: nothing is */
	struct img_rate rate;
	pthread_mutex_t lock;
	struct { uint64_t from, to; enum status s; } run; /* what look() was told last */
	uint64_t ask;                   /* how far it asks, when a piece is less */
	bool asking;                    /* farther than a piece: others wait until they are `told` */
	pthread_cond_t told;
	pthread_t id[THREADS_MAX];      /* those that were started beside the caller's */
	unsigned started, most;         /* how many of them | how many threads there may be */
	int error;
	bool write_error;
	struct block *failed;           /* the source that could not be read */
};

/* --salvage: said, as QEMU does, and gone on. */
static void salvaged(const struct convert *v, uint64_t off, uint64_t len, int r)
{
	if (!v->quiet)
		fprintf(stderr, "qemu-img: warning: error while reading offset %llu: %s; %llu bytes are zeroes in the copy\n", (unsigned long long)off, strerror(-r),
			(unsigned long long)len);
}

/* Part of the sources' concatenation that is in one of them. */
static struct block *source_at(struct convert *v, uint64_t off, uint64_t *in, uint64_t *left)
{
	off += v->skip;
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

static int read_failed(struct convert *v, struct block *b, int r)
{
	if (r)
		__atomic_store_n(&v->failed, b, __ATOMIC_RELAXED);
	return r;
}

/* True: from what was told last. False: it is the caller's to ask, up to *n bytes, and to call keep(). */
static bool known(struct convert *v, uint64_t off, uint64_t len, uint64_t *n, enum status *s)
{
	pthread_mutex_lock(&v->lock);
	while (v->asking && !(off >= v->run.from && off < v->run.to))
		pthread_cond_wait(&v->told, &v->lock);
	bool in = off >= v->run.from && off < v->run.to;
	*n = in ? MIN(len, v->run.to - off) : MAX(len, v->ask);
	*s = v->run.s;
	v->asking |= !in && v->ask > len;
	pthread_mutex_unlock(&v->lock);
	return in;
}

/* Answers as long as the question say that more can be asked at once: long holes, and files of nothing but data. */
static void keep(struct convert *v, uint64_t from, uint64_t to, enum status s, uint64_t asked)
{
	pthread_mutex_lock(&v->lock);
	v->run.from = from;
	v->run.to = to;
	v->run.s = s;
	v->ask = to - from < asked ? 0 : MIN(8 * asked, (uint64_t)LOOK);
	v->asking = false;
	pthread_cond_broadcast(&v->told);
	pthread_mutex_unlock(&v->lock);
}

/*
 * 0 or -errno. What is at `off`, up to `len` bytes of it, as its image knows: *n how many. Asked far ahead, as each question may make a server or a file
 * system look through all that follows; others wait for such an answer, as it will be theirs, too.
 */
static int look(struct convert *v, uint64_t off, uint64_t len, uint64_t *n, enum status *s)
{
	struct block_extent e;
	uint64_t in, left, asked;
	if (known(v, off, len, &asked, s)) {
		*n = asked;
		return 0;
	}
	struct block *b = source_at(v, off, &in, &left);
	asked = MIN(MIN(asked, v->size - off), left);
	e = (struct block_extent){ .len = asked, .zero = true };
	int r = b ? image_map(b, v->base, in, asked, &e) : 0;
	if (r && v->salvage) { /* not known: whatever can be read */
		e = (struct block_extent){ .len = MIN(asked, (uint64_t)65536), .present = true, .data = true };
		r = 0;
	}
	*s = e.zero ? ZERO : v->base && !e.present ? BELOW : DATA;
	keep(v, off, r ? off : off + MIN(asked, e.len), *s, asked);
	*n = MIN(len, e.len);
	return read_failed(v, b, r);
}

/* Data from wherever in the sources it is. With --salvage what cannot be read is zeroes, sector by sector. */
static int read_data(struct convert *v, uint64_t off, uint8_t *buf, uint64_t len)
{
	int r = 0;
	for (uint64_t done = 0, n; !r && done < len; done += n) {
		uint64_t in, left;
		struct block *b = source_at(v, off + done, &in, &left);
		n = MIN(len - done, left);
		if (b)
			r = image_read(b, in, buf + done, n);
		else
			memset(buf + done, 0, n);
		for (uint64_t at = 0, k; r && v->salvage && at < n; at += k) {
			k = MIN(n - at, (uint64_t)512);
			if (image_read(b, in + at, buf + done + at, k)) {
				salvaged(v, off + done + at, k, r);
				memset(buf + done + at, 0, k);
			}
		}
		r = v->salvage ? 0 : read_failed(v, b, r);
	}
	return r;
}

static int write_zero(struct convert *v, uint64_t off, uint64_t len)
{
	return v->blank && v->sparse ? 0 : v->sparse ? image_zero(v->dst, off, len, true) : -EAGAIN;
}

/* Runs of data and of at least v->sparse bytes of zeroes, each with one request. */
static int write_sparse(struct convert *v, uint64_t off, const uint8_t *buf, uint64_t len)
{
	uint64_t step = MAX(v->sparse, 512u), end;
	int r = 0;
	for (uint64_t at = 0; !r && at < len; at = end) {
		bool zero = all_zero(buf + at, MIN(step, len - at));
		for (end = at + step; end < len && all_zero(buf + end, MIN(step, len - end)) == zero; end += step)
			;
		end = MIN(end, len);
		r = zero ? write_zero(v, off + at, end - at) : image_write(v->dst, off + at, buf + at, end - at);
	}
	return r;
}

static int write_compressed(struct convert *v, uint64_t off, const uint8_t *buf, uint64_t len)
{
	int r = 0;
	for (uint64_t at = 0, n; !r && at < len; at += n) {
		n = MIN(len - at, v->unit);
		if (v->sparse && all_zero(buf + at, n))
			r = write_zero(v, off + at, n);
		else
			r = image_write_compressed(v->dst, off + at, buf + at, n);
	}
	return r;
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

static int write_failed(struct convert *v, int r)
{
	if (r)
		__atomic_store_n(&v->write_error, true, __ATOMIC_RELAXED);
	return r;
}

/* Data of a piece, in clusters where it is compressed. */
static int write_data(struct convert *v, uint64_t off, const uint8_t *buf, uint64_t len)
{
	if (v->compress)
		return write_compressed(v, off, buf, len);
	return v->sparse ? write_sparse(v, off, buf, len) : image_write(v->dst, off, buf, len);
}

static int write_run(struct convert *v, uint64_t off, uint8_t *buf, uint64_t len)
{
	int r = read_data(v, off, buf, len);
	return r ? r : write_failed(v, write_data(v, off, buf, len));
}

static int write_zero_run(struct convert *v, uint64_t off, uint64_t len)
{
	return write_failed(v, write_zero(v, off, len));
}

static int write_status(struct convert *v, enum status s, uint64_t off, uint8_t *buf, uint64_t len)
{
	if (s == BELOW)
		return 0;
	return s == ZERO && v->sparse ? write_zero_run(v, off, len) : write_run(v, off, buf, len);
}

/* Runs of zeroes that the images know of, and of data: each from end to end, as -S is about what is found in data. */
static int copy_runs(struct convert *v, uint64_t off, uint8_t *buf, uint64_t len)
{
	enum status was = ZERO, now;
	uint64_t start = 0, n;
	/* Whole clusters are compressed: zeroes among data count as data there. */
	bool whole = v->compress && !v->base;
	int r = 0;
	for (uint64_t at = 0; !r && at < len; at += n) {
		r = look(v, off + at, len - at, &n, &now);
		if (r)
			return r;
		if (at == start) {
			was = now;
		} else if (now != was && whole) {
			was = DATA;
		} else if (now != was) {
			r = write_status(v, was, off + start, buf, at - start);
			start = at;
			was = now;
		}
	}
	return r ? r : write_status(v, was, off + start, buf, len - start);
}

/* Locked: the next piece. One that begins in a long run of nothing is as much of it as one request may be, and *s says what; what is data fits the buffer. */
static uint64_t take_piece(struct convert *v, uint64_t *off, enum status *s)
{
	uint64_t at = *off = v->next, len = MIN(v->size - at, v->piece), end = ALIGN_DOWN(MIN(v->run.to, at + NOTHING_MAX), v->room);
	*s = DATA;
	if (v->sparse && v->run.s != DATA && at >= v->run.from && at < end && end - at > len) {
		len = end - at;
		*s = v->run.s;
	}
	v->next += len;
	return len;
}

static int copy_piece(struct convert *v, enum status s, uint64_t off, uint8_t *buf, uint64_t len)
{
	if (s != DATA)
		return write_status(v, s, off, NULL, len);
	if (v->offload && !v->base && copy_offload(v, off, len))
		return 0;
	return copy_runs(v, off, buf, len);
}

static void *copier(void *opaque);

/* Locked. */
static bool start_copier(struct convert *v)
{
	bool can = v->started + 1 < v->most && !pthread_create(&v->id[v->started], NULL, copier, v);
	v->started += can;
	return can;
}

/* Locked. `len` bytes took so long: what is behind a server on this machine may be slow, however near that is. Then more at once. */
static void copy_more(struct convert *v, uint64_t ns, uint64_t len)
{
	uint64_t ms = ns / 1000000;
	if (ms > VERY_SLOW_MS * len / NEAR_PIECE)
		v->piece = v->room;
	if (ms > SLOW_MS * len / NEAR_PIECE && !v->error && v->next < v->size)
		start_copier(v);
}

static void *copier(void *opaque)
{
	struct convert *v = opaque;
	uint8_t *buf = NULL;
	if (posix_memalign((void **)&buf, 4096, v->room))
		buf = NULL;
	pthread_mutex_lock(&v->lock);
	while (!v->error && v->next < v->size) {
		enum status s;
		uint64_t off, len = take_piece(v, &off, &s);
		double wait = img_rate_wait(&v->rate, len);
		pthread_mutex_unlock(&v->lock);
		img_sleep(wait);
		uint64_t began = clock_host_ns();
		int r = buf ? copy_piece(v, s, off, buf, len) : -ENOMEM;
		uint64_t took = clock_host_ns() - began;
		pthread_mutex_lock(&v->lock);
		if (r && !v->error)
			v->error = r;
		v->done += len;
		img_progress(v->progress, (double)v->done * 100.0 / (double)v->size);
		copy_more(v, took, len);
	}
	pthread_mutex_unlock(&v->lock);
	free(buf);
	return NULL;
}

/*
 * At most `want` threads; more than processors only wait for each other, unless a server is what they wait for. With a server on this machine
 * that answers from memory all is copying, and what is on its way should fit into the processor's caches: fewer threads and smaller pieces.
 */
static int copy_all(struct convert *v, unsigned want)
{
	bool remote = block_is_remote(v->dst), near = !block_is_remote(v->dst) || block_is_near(v->dst);
	unsigned first = want = MIN(want, (unsigned)THREADS_MAX);
	for (unsigned i = 0; i < v->nsrc; i++) {
		remote |= block_is_remote(v->src[i]);
		near &= !block_is_remote(v->src[i]) || block_is_near(v->src[i]);
	}
	v->piece = v->room = MAX((uint64_t)PIECE, ALIGN_UP(v->sparse, (uint64_t)PIECE));
	if (!remote)
		first = want = MAX(MIN(want, (unsigned)MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L)), v->compress ? 2u : 1u);
	else if (near && v->unit <= NEAR_PIECE && v->sparse <= 65536) {
		first = MIN(want, (unsigned)THREADS_NEAR);
		v->piece = NEAR_PIECE;
	}
	v->most = want;
	v->ask = LOOK;
	pthread_mutex_init(&v->lock, NULL);
	pthread_cond_init(&v->told, NULL);
	pthread_mutex_lock(&v->lock);
	while (v->started + 1 < first && start_copier(v))
		;
	pthread_mutex_unlock(&v->lock);
	copier(v);
	while (v->started) /* nobody starts any more: there is no more to copy */
		pthread_join(v->id[--v->started], NULL);
	pthread_mutex_destroy(&v->lock);
	pthread_cond_destroy(&v->told);
	return v->error;
}

/* After copy_all(): which file, and why. */
static int copy_failed(const struct convert *v, const char *target, const char *image)
{
	char what[64];
	snprintf(what, sizeof what, "error while %s%s", v->write_error ? "writing" : "reading", image);
	return img_io_failed(v->write_error ? target : v->failed ? block_name(v->failed) : "the source", what, v->error);
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
		struct img_open o = { .format = "raw", .write = true, .plain = true, .cache = "unsafe" }; /* nothing is written: nothing to wait for */
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

struct convert_args { struct image_create cr; char *options; const char *cache, *src_cache, *format; bool no_create, quiet, target_zero, bitmaps, skip_broken, sparse_given; unsigned threads; int64_t sparse; };

static int open_sources(struct convert *v, char **files, unsigned n, const struct img_open *o)
{
	v->src = calloc(n, sizeof *v->src);
	for (; v->src && v->nsrc < n; v->nsrc++) {
		v->src[v->nsrc] = img_open(files[v->nsrc], o);
		if (!v->src[v->nsrc])
			return 1;
		if (__builtin_add_overflow(v->size, block_length(v->src[v->nsrc]), &v->size) || v->size > INT64_MAX) {
			v->nsrc++; /* it is open */
			return img_fail("all sources together are larger than an image can be");
		}
	}
	return v->src ? 0 : img_fail("out of memory");
}

/*
 * -B: the node of the source's chain that the new backing file is; else the source's own backing file, which QEMU takes the two
 * to be alike. NULL: the source has none, so nothing is left to the new one.
 */
static struct block *find_base(struct block *src, const struct convert_args *a)
{
	struct stat want, is;
	char *path = block_path_beside(a->cr.file, a->cr.backing);
	bool known = path && !stat(path, &want);
	struct block *b = image_backing(src);
	for (struct block *n = b; n && known; n = image_backing(n)) {
		if (!stat(block_name(n), &is) && is.st_dev == want.st_dev && is.st_ino == want.st_ino)
			b = n, known = false;
	}
	free(path);
	return b;
}

static int convert(struct convert *v, struct convert_args *a)
{
	struct img_create_seen seen = { 0 };
	struct keyvals l = { 0 };
	struct err err = { 0 };
	struct image_info i;
	char *final = NULL;
	char *beside = NULL;
	if (!strncmp(a->cr.file, "file:", 5)) { /* a file like any other, whose name may have a colon */
		a->cr.file += 5;
		if (block_name_is_protocol(a->cr.file) && asprintf(&beside, "./%s", a->cr.file) >= 0)
			a->cr.file = beside;
	}
	const char *target = a->cr.file;
	int r = a->options && keyvals_parse(&l, "-o", a->options, NULL, &err) ? img_fail("%s", err.msg) : 0;
	a->cr.cluster_size = 65536;
	if (!r)
		r = img_create_options(&a->cr, &l, &seen);
	a->cr.size = v->size; /* whatever -o size said: it is a copy */
	if (!r && v->compress && strcmp(a->cr.format, "qcow2"))
		r = img_fail("error while converting: Compression not supported for this file format");
	if (!r && a->bitmaps && (strcmp(a->cr.format, "qcow2") || (!a->no_create && a->cr.version < 3)))
		r = img_fail("Format driver '%s' does not support bitmaps", a->cr.format);
	if (!r && a->bitmaps) {
		bool can = !image_info(v->src[0], &i) && i.version >= 3;
		image_info_free(&i);
		r = can ? 0 : img_fail("Source lacks bitmap support");
	}
	if (!r && v->compress && a->cr.prealloc != PREALLOC_OFF)
		r = img_fail("Compression and preallocation not supported at the same time");
	if (!r && v->compress && a->cr.data_file)
		r = img_fail("error while converting: Compression is not supported with an external data file");
	if (!r && (a->cr.backing || a->cr.backing_format) && strcmp(a->cr.format, "qcow2"))
		r = img_fail("Backing file not supported for file format '%s'", a->cr.format);
	if (!r && a->cr.backing_format && !a->cr.backing)
		r = img_fail("%s: Backing format cannot be used without backing file", a->cr.file);
	if (!r && a->cr.backing && v->nsrc > 1)
		r = img_fail("Having a backing file for the target makes no sense when concatenating multiple input images");
	if (!r && a->cr.backing)
		v->base = find_base(v->src[0], a);
	if (!r && a->cr.backing && !a->cr.backing_format)
		r = img_fail("%s: Could not create image: Backing file specified without backing format (use -F)", a->cr.file);
	v->blank = (!a->no_create && !a->cr.backing) || a->target_zero;
	if (!r && !a->no_create)
		r = make_target(&a->cr, &final);
	if (!final && strcmp(a->cr.format, "qcow2")) /* a device or a server keeps what it had */
		v->blank = a->target_zero;
	/* Described by --target-image-opts, its driver is there; -O says what a new one is. */
	struct img_open o = { .format = a->no_create ? a->format : a->cr.format, .write = true, .cache = a->cache, .no_backing = !a->no_create && !a->cr.backing, .target = true };
	v->dst = r ? NULL : img_open(a->cr.file, &o);
	r = r || !v->dst;
	if (!r && block_length(v->dst) < v->size)
		r = img_fail("output file is smaller than input file");
	if (!r && !image_info(v->dst, &i)) {
		v->unit = i.cluster_size;
		image_info_free(&i);
	}
	/*
	 * The old file goes before its place is needed: two of them may not fit on the disk, and its pages in the cache are the new one's,
	 * which halves the time where memory is fresh. ext4 also writes out at once what is renamed over another file.
	 */
	if (!r && final)
		unlink(final);
	v->sparse = (uint64_t)a->sparse;
	if (!r && copy_all(v, a->threads))
		r = copy_failed(v, target, "");
	if (!r && a->bitmaps)
		r = img_copy_bitmaps(v->dst, v->src[0], a->skip_broken);
	if (r && final && v->dst)
		block_abandon(v->dst);
	int c = block_close_checked(v->dst); /* waits for the disk unless the cache mode is unsafe, the default, as QEMU */
	if (!r && c)
		r = img_io_failed(target, "cannot write", c);
	if (!r && final && rename(a->cr.file, final))
		r = img_fail("%s: %s", final, strerror(errno));
	if (final && r && a->cr.file != target)
		unlink(a->cr.file);
	unfinished = NULL;
	if (a->cr.file != target)
		free((char *)(uintptr_t)a->cr.file);
	free(beside);
	free(final);
	keyvals_free(&l);
	if (!r)
		img_progress(v->progress, 100);
	if (!r && v->progress)
		puts("");
	return r;
}

static int parse_threads(const char *text, unsigned *n)
{
	char *end;
	errno = 0;
	long v = strtol(text, &end, 0);
	*n = (unsigned)v;
	return errno || end == text || *end || v < 1 || v > THREADS_MAX;
}

int img_convert(int argc, char **argv)
{
	struct convert v = { 0 };
	struct convert_args a = { .cache = "unsafe", .threads = THREADS_REMOTE, .sparse = 4096 };
	struct img_open so = { .still = true };
	int c;
	image_create_init(&a.cr);
	while ((c = img_getopt(argc, argv, ":hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:")) >= 0) {
		switch (c) {
		case 'f': so.format = optarg; break;
		case 'O': a.cr.format = a.format = optarg; break;
		case 'B': a.cr.backing = optarg; break;
		case 'F': a.cr.backing_format = optarg; break;
		case 'c': v.compress = true; break;
		case 'o':
			if (img_add_options(&a.options, optarg))
				return 1;
			break;
		case 'l': so.internal = optarg; break;
		case 'S':
			a.sparse_given = true;
			a.sparse = img_size(optarg, "buffer size for sparse output");
			if (a.sparse < 0 || a.sparse % 512 || a.sparse > SPARSE_MAX)
				return a.sparse < 0 ? 1 : img_fail("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %u. "
								   "Select 0 to disable sparse detection (fully allocates output).", SPARSE_MAX);
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
			if (parse_threads(optarg, &a.threads))
				return img_fail("Invalid number of coroutines. Allowed number of coroutines is between 1 and %d", THREADS_MAX);
			break;
		}
	}
	v.quiet = a.quiet;
	if (a.quiet)
		v.progress = false;
	if (img_options_help(a.options, a.cr.format, false))
		return 0;
	if (a.no_create && a.options)
		return img_fail("-o has no effect when skipping image creation");
	if (v.offload && v.salvage)
		return img_fail("Cannot use copy offloading in salvaging mode");
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
	if (a.target_zero && a.cr.backing)
		return img_fail("Cannot use --target-is-zero when the destination image has a backing file");
	a.cr.file = argv[argc - 1];
	int r = open_sources(&v, argv + optind, (unsigned)(argc - 1 - optind), &so);
	if (!r)
		r = convert(&v, &a);
	for (unsigned i = 0; i < v.nsrc; i++)
		block_close(v.src[i]);
	free(v.src);
	free(a.options);
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
		else if (!strcmp(argv[optind], "bs") ? (bs = img_size(eq + 1, "bs")) < 0 :
			 !strcmp(argv[optind], "count") ? (count = img_size(eq + 1, "count")) < 0 :
			 !strcmp(argv[optind], "skip") ? (skip = img_size(eq + 1, "skip")) < 0 :
			 img_fail("unrecognized operand %s", argv[optind]))
			return 1;
	}
	if (!in || !cr.file)
		return img_fail("Must specify both input and output file names");
	if (bs <= 0 || bs > INT32_MAX || skip < 0)
		return img_fail("invalid number: bs must be from 1 to 2147483647");
	struct block *src = img_open(in, &o);
	if (!src)
		return 1;
	uint64_t size = block_length(src);
	/* As in qemu-img 7.2 the blocks that are skipped count as some of the `count`. */
	if (count >= 0 && (uint64_t)count <= size / (uint64_t)bs)
		size = (uint64_t)count * (uint64_t)bs;
	bool beyond = (uint64_t)skip > size / (uint64_t)bs;
	uint64_t from = beyond ? size : (uint64_t)skip * (uint64_t)bs, len = size - from;
	if (beyond)
		img_fail("%s: cannot skip to specified offset", in); /* said, and the output is empty */
	cr.size = len;
	cr.tls = img_objects();
	int r = image_create(&cr, &err) ? img_file_failed(cr.file, err.msg) : 0;
	struct img_open w = { .format = cr.format, .write = true, .plain = true };
	struct block *dst = r ? NULL : img_open(cr.file, &w);
	/* Whatever `bs` is: pieces in which copying is fast. */
	struct convert v = { .src = &src, .nsrc = 1, .dst = dst, .size = len, .skip = from };
	r = r || !dst;
	if (!r && copy_all(&v, THREADS_REMOTE))
		r = copy_failed(&v, cr.file, " image");
	if (block_close_checked(dst) && !r)
		r = img_fail("%s: cannot write", cr.file);
	block_close(src);
	return r;
}
