#include "fault.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

#define DISK_FULL (64ull << 20)

struct event { uint64_t off, len; uint8_t *data; bool flush, truncate; };

struct fault {
	uint8_t *start, *now;
	uint64_t start_len, len, room;
	struct event *ev;
	uint64_t n, max, writes, flushes, calls, fail_at;
	int error;
	bool torn, sticky;
	pthread_mutex_t lock;   /* of what follows */
	pthread_cond_t go_on;
	bool hold;
	unsigned held;
};

/* struct block has no room for a test's state: the leaf is embedded. */
struct fault_block { struct block b; struct fault f; };

static struct fault *fault_of(struct block *b)
{
	return &((struct fault_block *)b)->f;
}

static void put(uint8_t **buf, uint64_t *len, uint64_t *room, uint64_t off, const uint8_t *data, uint64_t n)
{
	if (off + n > *room) {
		uint64_t r = (off + n) * 2;
		*buf = realloc(*buf, r);
		memset(*buf + *room, 0, r - *room);
		*room = r;
	}
	if (n)
		memcpy(*buf + off, data, n);
	*len = MAX(*len, off + n);
}

static struct event *record(struct fault *f)
{
	if (f->n == f->max) {
		f->max = f->max ? f->max * 2 : 256;
		f->ev = realloc(f->ev, f->max * sizeof *f->ev);
	}
	f->ev[f->n] = (struct event){ 0 };
	return &f->ev[f->n++];
}

/* true: this call fails */
static bool fails(struct fault *f)
{
	uint64_t nth = f->calls++;
	return f->error && (nth == f->fail_at || (f->sticky && nth > f->fail_at));
}

static int fault_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct fault *f = fault_of(b);
	if (fails(f))
		return f->error;
	for (int i = 0; i < n; i++) {
		uint64_t there = off < f->len ? MIN(f->len - off, iov[i].iov_len) : 0;
		memset(iov[i].iov_base, 0, iov[i].iov_len);
		if (there)
			memcpy(iov[i].iov_base, f->now + off, there);
		off += iov[i].iov_len;
	}
	return 0;
}

static void write_one(struct fault *f, uint64_t off, const void *data, uint64_t len)
{
	struct event *e = record(f);
	e->off = off;
	e->len = len;
	e->data = malloc(len + 1);
	memcpy(e->data, data, len);
	put(&f->now, &f->len, &f->room, off, data, len);
	f->writes++;
}

static int fault_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	struct fault *f = fault_of(b);
	bool fail = fails(f);
	if (range_bad(off, len, DISK_FULL))
		return -ENOSPC; /* a sparse file would do; memory does not */
	uint8_t *flat = malloc(len + 1), *p = flat;
	for (int i = 0; i < n; i++) {
		memcpy(p, iov[i].iov_base, iov[i].iov_len);
		p += iov[i].iov_len;
	}
	if (!fail || f->torn)
		write_one(f, off, flat, fail ? len / 2 : len);
	free(flat);
	return fail ? f->error : 0;
}

static int fault_flush(struct block *b)
{
	struct fault *f = fault_of(b);
	bool fail = fails(f);
	pthread_mutex_lock(&f->lock);
	f->held++;
	while (f->hold)
		pthread_cond_wait(&f->go_on, &f->lock);
	f->held--;
	pthread_mutex_unlock(&f->lock);
	if (fail)
		return f->error;
	record(f)->flush = true;
	f->flushes++;
	return 0;
}

static int fault_discard(struct block *b, uint64_t off, uint64_t len)
{
	return 0;
}

static int fault_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	uint8_t *z = calloc(1, len);
	struct iovec v = { z, len };
	int r = fault_write(b, off, &v, 1, len, flags);
	free(z);
	return r;
}

static int64_t fault_length(struct block *b)
{
	return (int64_t)fault_of(b)->len;
}

static int fault_truncate(struct block *b, uint64_t len)
{
	struct fault *f = fault_of(b);
	if (fails(f))
		return f->error;
	if (len > DISK_FULL)
		return -ENOSPC;
	if (len > f->len) {
		put(&f->now, &f->len, &f->room, len, NULL, 0);
		return 0;
	}
	return 0;
}

static void fault_close(struct block *b)
{
	struct fault *f = fault_of(b);
	for (uint64_t i = 0; i < f->n; i++)
		free(f->ev[i].data);
	free(f->ev);
	pthread_mutex_destroy(&f->lock);
	pthread_cond_destroy(&f->go_on);
	free(f->start);
	free(f->now);
}

static const struct block_driver driver = {
	.name = "fault", .read = fault_read, .write = fault_write, .flush = fault_flush, .discard = fault_discard, .zero = fault_zero,
	.file_length = fault_length, .truncate = fault_truncate, .close = fault_close,
};

struct block *fault_new(const void *data, uint64_t len)
{
	struct block_opts o = { .file = "fault" };
	struct block *plain = block_new(&o, NULL, NULL);
	struct fault_block *fb = calloc(1, sizeof *fb);
	memcpy(&fb->b, plain, sizeof *plain);   /* before anything points into it or waits in it */
	free(plain);
	pthread_mutex_init(&fb->f.lock, NULL);
	pthread_cond_init(&fb->f.go_on, NULL);
	fb->b.drv = &driver;
	fb->b.length = ALIGN_UP(len, (uint64_t)512);
	put(&fb->f.now, &fb->f.len, &fb->f.room, 0, data, len);
	fb->f.start = malloc(len + 1);
	memcpy(fb->f.start, data, len);
	fb->f.start_len = len;
	return &fb->b;
}

uint64_t fault_calls(struct block *b)
{
	return fault_of(b)->calls;
}

void fault_at(struct block *b, uint64_t nth, int error, bool torn, bool sticky)
{
	struct fault *f = fault_of(b);
	f->fail_at = f->calls + nth;
	f->error = error;
	f->torn = torn;
	f->sticky = sticky;
}

void fault_hold(struct block *b, bool hold)
{
	struct fault *f = fault_of(b);
	pthread_mutex_lock(&f->lock);
	f->hold = hold;
	pthread_cond_broadcast(&f->go_on);
	pthread_mutex_unlock(&f->lock);
}

unsigned fault_held(struct block *b)
{
	struct fault *f = fault_of(b);
	pthread_mutex_lock(&f->lock);
	unsigned n = f->held;
	pthread_mutex_unlock(&f->lock);
	return n;
}

uint64_t fault_writes(struct block *b)
{
	return fault_of(b)->writes;
}

uint64_t fault_flushed(struct block *b)
{
	return fault_of(b)->flushes;
}

uint8_t *fault_crash(struct block *b, uint64_t n, unsigned *seed, uint64_t *len)
{
	struct fault *f = fault_of(b);
	uint64_t room = 0, stop = 0, safe = 0, seen = 0;
	uint8_t *buf = NULL;
	*len = 0;
	put(&buf, len, &room, 0, f->start, f->start_len);
	for (; stop < f->n && seen < n; stop++)
		seen += !f->ev[stop].flush;
	while (stop < f->n && f->ev[stop].flush && rand_r(seed) & 1)
		stop++;
	for (uint64_t i = 0; i < stop; i++)
		if (f->ev[i].flush)
			safe = i;
	for (uint64_t i = 0; i < safe; i++)
		put(&buf, len, &room, f->ev[i].off, f->ev[i].data, f->ev[i].len);
	/* The rest: each sector of each write arrived or not; later writes to a sector may lose against earlier ones. */
	unsigned style = rand_r(seed) % 4;
	uint64_t left = stop - safe, *order = malloc((left + 1) * sizeof *order);
	for (uint64_t i = 0; i < left; i++)
		order[i] = safe + i;
	for (uint64_t i = left; style == 3 && i > 1; i--) {
		uint64_t k = (uint64_t)rand_r(seed) % i, t = order[k];
		order[k] = order[i - 1];
		order[i - 1] = t;
	}
	for (uint64_t i = 0; i < left; i++) {
		struct event *e = &f->ev[order[i]];
		if (style == 0 || (style != 1 && rand_r(seed) & 1))
			continue; /* 0: all lost; 1: all there, the last one torn */
		uint64_t torn = style == 1 && i + 1 < left ? e->len : (uint64_t)rand_r(seed) % (e->len / 512 + 2) * 512;
		put(&buf, len, &room, e->off, e->data, MIN(torn, e->len));
	}
	free(order);
	return buf;
}

static void guest_done(struct block_req *r)
{
	(*(unsigned *)(uintptr_t)r->priv[0])++;
}

void guest_requests(struct block *b, unsigned seed, unsigned n)
{
	static uint8_t buf[65536 + 512];
	uint64_t sectors = block_length(b) / 512;
	unsigned done = 0;
	memset(buf, (int)seed, sizeof buf);
	for (unsigned i = 0; i < n; i++) {
		uint64_t len = 512 * (1 + (uint64_t)rand_r(&seed) % 128), cut = 512 + (unsigned)rand_r(&seed) % 3 * 256;
		uint64_t at = ((uint64_t)rand_r(&seed) << 31 | (unsigned)rand_r(&seed)) % (sectors + 2) * 512;
		struct iovec v[2] = { { buf, MIN(len, cut) }, { buf + cut, len - MIN(len, cut) } };
		struct block_req r = { .op = (enum block_op)(rand_r(&seed) % (BLOCK_ZERO + 1)), .off = rand_r(&seed) % 3 ? at % (4 << 20) : at, .len = len, .iov = v,
				       .iovcnt = v[1].iov_len ? 2 : 1, .done = guest_done, .flags = (unsigned)rand_r(&seed) & (BLOCK_REQ_FUA | BLOCK_REQ_MAY_UNMAP | BLOCK_REQ_INLINE) };
		r.priv[0] = (uintptr_t)&done;
		block_submit(b, &r);
	}
	if (done != n)
		abort(); /* without workers each is answered before it returns */
}
