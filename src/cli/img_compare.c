/*
 * lodge img: compare. Threads take pieces in order; what the first piece that differs says is what counts. Where both images are known to
 * hold nothing for longer than a piece nobody looks again.
 */
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "cli/img.h"

enum { PIECE = 512 << 10, LOOK = 1 << 30, THREADS_MAX = 16 };

struct compare {
	struct block *b[2];
	bool strict, quiet, progress;
	pthread_mutex_t lock;
	uint64_t next, end, size, bad;  /* bad: nothing from here on counts */
	int result;
	char said[64];
};

/* A thread's own: buffers, and what it knows of either image at [from, to). */
struct comparer {
	struct compare *c;
	uint8_t *buf[2];
	struct block_extent e[2];
	uint64_t from[2], to[2];
};

static uint64_t first_difference(const uint8_t *a, const uint8_t *b, uint64_t n)
{
	uint64_t i = 0;
	while (i < n && a[i] == b[i])
		i++;
	return i;
}

/* For -s: held in the same way? */
static bool same_status(const struct block_extent *a, const struct block_extent *b)
{
	return a->present == b->present && a->data == b->data && a->zero == b->zero && a->has_offset == b->has_offset;
}

/* `result` at `off`, to be told as `what` and a number unless an earlier piece has something to tell. */
static int found(struct compare *c, int result, uint64_t off, const char *what, uint64_t number, const char *end)
{
	pthread_mutex_lock(&c->lock);
	if (off < c->bad) {
		c->bad = off;
		c->result = result;
		snprintf(c->said, sizeof c->said, "%s%llu%s", what, (unsigned long long)number, end);
	}
	pthread_mutex_unlock(&c->lock);
	return result;
}

/* What image `i` has at `off`; past its end zeroes. 0 or -errno. */
static int compare_look(struct comparer *t, int i, uint64_t off)
{
	struct block *b = t->c->b[i];
	uint64_t len = block_length(b), most = t->c->end - off;
	if (off >= t->from[i] && off < t->to[i])
		return 0;
	t->e[i] = (struct block_extent){ .len = most, .zero = true };
	int r = off < len ? image_map(b, NULL, off, MIN(MIN(most, len - off), (uint64_t)LOOK), &t->e[i]) : 0;
	t->from[i] = off;
	t->to[i] = off + t->e[i].len;
	return r;
}

/* Both or one (the longer, against zeroes) from `off` to `end` at most; *n how far. 0 when that is alike. */
static int compare_some(struct comparer *t, uint64_t off, uint64_t end, uint64_t *n)
{
	struct compare *c = t->c;
	bool zero[2], both = true;
	*n = UINT64_MAX;
	for (int i = 0; i < 2; i++) {
		if (compare_look(t, i, off))
			return found(c, 3, off, "Sector allocation test failed at offset ", off, "");
		*n = MIN(*n, t->to[i] - off);
		zero[i] = t->e[i].zero;
		both &= off < block_length(c->b[i]);
	}
	if (c->strict && both && !same_status(&t->e[0], &t->e[1]))
		return found(c, 1, off, "Strict mode: Offset ", off, " block status mismatch!");
	if (zero[0] && zero[1])
		return 0;
	*n = MIN(*n, end - off);
	for (int i = 0; i < 2; i++) {
		if (zero[i])
			memset(t->buf[i], 0, *n);
		else if (image_read(c->b[i], off, t->buf[i], *n))
			return found(c, 4, off, "Error while reading offset ", off, "");
	}
	if (!memcmp(t->buf[0], t->buf[1], *n))
		return 0;
	return found(c, 1, off, "Content mismatch at offset ", off + first_difference(t->buf[0], t->buf[1], *n) / 512 * 512, "!");
}

static void *compare_pieces(void *opaque)
{
	struct comparer *t = opaque;
	struct compare *c = t->c;
	pthread_mutex_lock(&c->lock);
	while (c->next < MIN(c->end, c->bad)) {
		uint64_t off = c->next, end = off + MIN(c->end - off, (uint64_t)PIECE), n = 0;
		c->next = end;
		img_progress(c->progress, (double)off * 100.0 / (double)c->size);
		pthread_mutex_unlock(&c->lock);
		while (off < end && !compare_some(t, off, end, &n))
			off += n;
		pthread_mutex_lock(&c->lock);
		c->next = MAX(c->next, MIN(off, c->end));
	}
	pthread_mutex_unlock(&c->lock);
	return NULL;
}

/* [next, end). 0, or the result, which was told. */
static int compare_range(struct compare *c, struct comparer *t, unsigned threads)
{
	pthread_t id[THREADS_MAX];
	unsigned n = 0;
	for (unsigned i = 0; i < threads; i++)
		t[i].to[0] = t[i].to[1] = 0;
	while (n + 1 < threads && c->end - c->next > PIECE && !pthread_create(&id[n], NULL, compare_pieces, &t[n + 1]))
		n++;
	compare_pieces(&t[0]);
	while (n)
		pthread_join(id[--n], NULL);
	if (c->result > 1)
		return img_fail("%s", c->said), c->result;
	if (c->result && !c->quiet)
		puts(c->said);
	return c->result;
}

static int compare_all(struct compare *c)
{
	uint64_t la = block_length(c->b[0]), lb = block_length(c->b[1]);
	/* More threads than processors only wait for each other, unless a server is what they wait for. */
	bool remote = block_is_remote(c->b[0]) || block_is_remote(c->b[1]);
	bool near = block_is_near(c->b[0]) || block_is_near(c->b[1]);
	unsigned threads = near ? 1 : remote ? 4 : (unsigned)MIN(MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L), (long)THREADS_MAX);
	struct comparer t[THREADS_MAX] = { 0 };
	int r = 0;
	for (unsigned i = 0; i < threads; i++) {
		t[i].c = c;
		/* On a page: the kernel's copy is several times slower to anywhere else. */
		for (int k = 0; k < 2 && !r; k++)
			r = posix_memalign((void **)&t[i].buf[k], 4096, PIECE) ? img_fail("out of memory"), 2 : 0;
	}
	c->size = MAX(la, lb);
	c->end = MIN(la, lb);
	c->bad = UINT64_MAX;
	if (!r && c->strict && la != lb) {
		if (!c->quiet)
			puts("Strict mode: Image size mismatch!");
		r = 1;
	}
	if (!r)
		r = compare_range(c, t, threads);
	if (!r && la != lb) { /* the common part is equal; the rest must be zeroes */
		if (!c->quiet)
			puts("Warning: Image size mismatch!");
		c->end = c->size;
		r = compare_range(c, t, threads);
	}
	if (!r && !c->quiet)
		puts("Images are identical.");
	for (unsigned i = 0; i < threads; i++) {
		free(t[i].buf[0]);
		free(t[i].buf[1]);
	}
	return r;
}

int img_compare(int argc, char **argv)
{
	struct compare k = { .lock = PTHREAD_MUTEX_INITIALIZER };
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
		return img_usage("Expecting two image file names");
	for (int i = 0; i < 2 && !r; i++) {
		k.b[i] = img_open(argv[optind + i], &o[i]);
		r = k.b[i] ? 0 : 2;
	}
	if (!r)
		r = compare_all(&k);
	if (k.progress)
		putchar('\n');
	block_close(k.b[0]);
	block_close(k.b[1]);
	return r;
}
