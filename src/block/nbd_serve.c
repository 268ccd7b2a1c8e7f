/*
 * The server's requests. One thread a connection reads them. What the page cache can answer is answered there, and as long as
 * more requests stand in the buffer the answers are collected and sent with one call; the rest is done by the image's workers,
 * which send their answers themselves. In flight are at most JOBS_MAX requests with BYTES_MAX of data a connection; the client
 * then waits in its socket. What breaks the protocol (a magic, a write that is too long) ends the connection, as nothing
 * behind it could be understood.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "base/log.h"
#include "base/util.h"
#include "block/nbd_priv.h"
#include "loop/loop.h"

enum { JOBS_MAX = 64, BYTES_MAX = 64 << 20, KEEP_JOBS = 64, KEEP_BYTES = 8 << 20, BATCH = 16, BATCH_BYTES = 256 * 1024, EXTENTS_MAX = 4096,
       SPARSE_MIN = 65536 };

struct nbd_job {
	struct block_req req;
	struct iovec iov;
	struct nbd_client *c;
	struct nbd_job *next;
	uint64_t cookie, off;
	uint32_t len;
	uint16_t cmd, flags;
	bool hole, counted;             /* a read of zeroes | holds a place among the export's writes */
	int ret;
	uint8_t *buf;
	size_t cap;
};

/* --- jobs and their buffers --- */

static size_t room_for(uint32_t len)
{
	size_t n = 4096;
	while (n < len)
		n *= 2;
	return n;
}

/* A job with room for `len` bytes; waits until there may be one more. NULL: no memory. */
static struct nbd_job *job_get(struct nbd_client *c, uint32_t len)
{
	struct nbd_job *j = NULL;
	pthread_mutex_lock(&c->lock);
	while (c->jobs >= JOBS_MAX || (c->bytes && c->bytes + len > BYTES_MAX))
		pthread_cond_wait(&c->room, &c->lock);
	for (struct nbd_job **p = &c->spare; *p; p = &(*p)->next) {
		if ((*p)->cap >= len && (*p)->cap <= MAX(4ull * len, 65536ull)) {
			j = *p;
			*p = j->next;
			c->nspare--;
			c->kept -= j->cap;
			break;
		}
	}
	c->jobs++;
	c->bytes += len;
	pthread_mutex_unlock(&c->lock);
	if (!j && (j = calloc(1, sizeof *j)) && len) {
		j->cap = room_for(len);
		if (posix_memalign((void **)&j->buf, 4096, j->cap))
			j->buf = NULL;
	}
	if (j && (j->buf || !len)) {
		*j = (struct nbd_job){ .c = c, .len = len, .buf = j->buf, .cap = j->cap };
		return j;
	}
	free(j);
	pthread_mutex_lock(&c->lock);
	c->jobs--;
	c->bytes -= len;
	pthread_mutex_unlock(&c->lock);
	return NULL;
}

/* Any thread. The client may be gone once the last job is. */
static void job_put(struct nbd_client *c, struct nbd_job *j, uint32_t len)
{
	pthread_mutex_lock(&c->lock);
	if (c->nspare < KEEP_JOBS && c->kept + j->cap <= KEEP_BYTES) {
		j->next = c->spare;
		c->spare = j;
		c->nspare++;
		c->kept += j->cap;
		j = NULL;
	}
	c->jobs--;
	c->bytes -= len;
	pthread_cond_signal(&c->room);
	pthread_mutex_unlock(&c->lock);
	if (j) {
		free(j->buf);
		free(j);
	}
}

/* --- writes that cover parts of blocks --- */

static void write_begin(struct nbd_ex *ex, bool alone)
{
	pthread_mutex_lock(&ex->lock);
	while (ex->alone || (alone && ex->writes))
		pthread_cond_wait(&ex->calm, &ex->lock);
	ex->alone = alone;
	ex->writes++;
	pthread_mutex_unlock(&ex->lock);
}

static void write_end(struct nbd_ex *ex)
{
	pthread_mutex_lock(&ex->lock);
	ex->writes--;
	ex->alone = false;
	pthread_cond_broadcast(&ex->calm);
	pthread_mutex_unlock(&ex->lock);
}

struct waiter { struct block_req r; pthread_mutex_t lock; pthread_cond_t cond; bool done; };

static void waited(struct block_req *r)
{
	struct waiter *w = container_of(r, struct waiter, r);
	pthread_mutex_lock(&w->lock);
	w->done = true;
	pthread_cond_signal(&w->cond);
	pthread_mutex_unlock(&w->lock);
}

/* A whole request, waited for. */
static int sync_io(struct block *b, enum block_op op, uint64_t off, void *buf, uint64_t len, unsigned flags)
{
	struct iovec v = { buf, len };
	struct waiter w = { .r = { .op = op, .flags = flags, .off = off, .len = len, .iov = &v, .iovcnt = 1, .done = waited },
			    PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false };
	block_submit(b, &w.r);
	pthread_mutex_lock(&w.lock);
	while (!w.done)
		pthread_cond_wait(&w.cond, &w.lock);
	pthread_mutex_unlock(&w.lock);
	return w.r.ret;
}

/* Through a buffer that covers whole blocks. */
static int ragged(struct nbd_ex *ex, bool write, uint64_t off, uint8_t *data, uint64_t len, unsigned flags)
{
	uint64_t a = block_size(ex->e.blk), start = ALIGN_DOWN(off, a), end = ALIGN_UP(off + len, a);
	uint8_t *hull = NULL;
	if (posix_memalign((void **)&hull, 4096, end - start))
		return -ENOMEM;
	if (write)
		write_begin(ex, true);
	int r = sync_io(ex->e.blk, BLOCK_READ, start, hull, end - start, 0);
	if (!r && write)
		memcpy(hull + (off - start), data, len);
	else if (!r)
		memcpy(data, hull + (off - start), len);
	if (!r && write)
		r = sync_io(ex->e.blk, BLOCK_WRITE, start, hull, end - start, flags);
	if (write)
		write_end(ex);
	free(hull);
	return r;
}

/* Zeroes: the part of a block at both ends is written. */
static int ragged_zero(struct nbd_ex *ex, uint64_t off, uint64_t len, unsigned flags)
{
	static uint8_t zeroes[4096];
	uint64_t a = block_size(ex->e.blk), head = MIN(len, -off & (a - 1)), tail = (len - head) & (a - 1), mid = len - head - tail;
	int r = head ? ragged(ex, true, off, zeroes, head, flags & BLOCK_REQ_FUA) : 0;
	if (!r && mid) {
		write_begin(ex, false);
		r = sync_io(ex->e.blk, BLOCK_ZERO, off + head, NULL, mid, flags);
		write_end(ex);
	}
	return !r && tail ? ragged(ex, true, off + head + mid, zeroes, tail, flags & BLOCK_REQ_FUA) : r;
}

/* --- answers --- */

struct answer { uint8_t head[64]; unsigned len; };

static void put_chunk(uint8_t *p, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t len)
{
	nbd_put32(p, NBD_CHUNK_MAGIC);
	nbd_put16(p + 4, flags);
	nbd_put16(p + 6, type);
	nbd_put64(p + 8, cookie);
	nbd_put32(p + 16, len);
}

/* The header of the answer to a request, and whether data follows. */
static bool make_answer(const struct nbd_job *j, struct answer *a)
{
	bool read = j->cmd == NBD_READ && !j->ret;
	if (j->c->structured && j->ret) {
		put_chunk(a->head, NBD_CHUNK_DONE, NBD_CHUNK_ERROR, j->cookie, 6);
		nbd_put32(a->head + 20, nbd_error_to_wire(j->ret));
		nbd_put16(a->head + 24, 0);
		a->len = 26;
	} else if (j->c->structured && read && j->hole) {
		put_chunk(a->head, NBD_CHUNK_DONE, NBD_CHUNK_HOLE, j->cookie, 12);
		nbd_put64(a->head + 20, j->off);
		nbd_put32(a->head + 28, j->len);
		a->len = 32;
	} else if (j->c->structured && read && !j->len) {
		put_chunk(a->head, NBD_CHUNK_DONE, NBD_CHUNK_NONE, j->cookie, 0);
		a->len = 20;
	} else if (j->c->structured && read) {
		put_chunk(a->head, NBD_CHUNK_DONE, NBD_CHUNK_DATA, j->cookie, j->len + 8);
		nbd_put64(a->head + 20, j->off);
		a->len = 28;
	} else {
		nbd_put32(a->head, NBD_SIMPLE_MAGIC);
		nbd_put32(a->head + 4, nbd_error_to_wire(j->ret));
		nbd_put64(a->head + 8, j->cookie);
		a->len = 16;
	}
	return read && !j->hole && j->len;
}

/* Send the answers of a list of jobs and let go of them. */
static void send_answers(struct nbd_client *c, struct nbd_job *list)
{
	struct answer a[BATCH];
	struct iovec v[2 * BATCH];
	int n = 0, k = 0;
	for (struct nbd_job *j = list; j && k < BATCH; j = j->next, k++) {
		bool data = make_answer(j, &a[k]);
		v[n++] = (struct iovec){ a[k].head, a[k].len };
		if (data)
			v[n++] = (struct iovec){ j->buf, j->len };
	}
	pthread_mutex_lock(&c->send);
	if (!c->broken && nbd_send_iov(&c->chan, v, n)) {
		c->broken = true;
		shutdown(c->chan.fd, SHUT_RDWR);
	}
	pthread_mutex_unlock(&c->send);
	while (list) {
		struct nbd_job *next = list->next;
		job_put(c, list, list->len * (list->cmd == NBD_READ || list->cmd == NBD_WRITE || list->cmd == NBD_CACHE));
		list = next;
	}
}

static void send_done(struct nbd_client *c)
{
	struct nbd_job *list = NULL;
	while (c->done) { /* in the order of the requests */
		struct nbd_job *j = c->done;
		c->done = j->next;
		j->next = list;
		list = j;
	}
	c->ndone = 0;
	if (list)
		send_answers(c, list);
}

/* Is the next request here as a whole header? If not, answers must not wait for it. */
static bool more(const struct nbd_client *c)
{
	return c->chan.tail - c->chan.head >= sizeof(struct nbd_request);
}

static void send_one(void *opaque)
{
	struct nbd_job *j = opaque;
	send_answers(j->c, j);
}

/* The answer is known: on the connection's thread it is collected, elsewhere sent. */
static void job_end(struct nbd_job *j, int ret)
{
	struct nbd_client *c = j->c;
	j->ret = ret;
	if (j->counted)
		write_end(c->ex);
	if (!pthread_equal(c->thread, pthread_self())) {
		const struct nbd_server_opts *o = &c->s->o;
		j->next = NULL;
		if (!o->loop || !loop_on_thread(o->loop) || workers_submit(o->senders, send_one, NULL, j))
			send_answers(c, j);
		return;
	}
	j->next = c->done;
	c->done = j;
	c->ndone++;
	if (c->ndone >= BATCH || (j->cmd == NBD_READ && j->len >= BATCH_BYTES) || !more(c))
		send_done(c);
}

static void io_done(struct block_req *r)
{
	struct nbd_job *j = container_of(r, struct nbd_job, req);
	/* A trim is on the disk only after a flush. */
	if (!r->ret && j->cmd == NBD_TRIM && j->flags & NBD_FUA && r->op != BLOCK_FLUSH) {
		*r = (struct block_req){ .op = BLOCK_FLUSH, .done = io_done };
		block_submit(j->c->ex->e.blk, r);
		return;
	}
	job_end(j, r->ret);
}

/* --- requests --- */

static void submit(struct nbd_job *j, enum block_op op, uint64_t off, uint64_t len, unsigned flags)
{
	struct nbd_ex *ex = j->c->ex;
	if (op == BLOCK_WRITE || op == BLOCK_ZERO || op == BLOCK_DISCARD) {
		write_begin(ex, false);
		j->counted = true;
		ex->dirty = true;
	}
	j->iov = (struct iovec){ j->buf, len };
	j->req = (struct block_req){ .op = op, .flags = flags | BLOCK_REQ_INLINE, .off = off, .len = len, .done = io_done };
	if (op == BLOCK_READ || op == BLOCK_WRITE) {
		j->req.iov = &j->iov;
		j->req.iovcnt = 1;
	}
	block_submit(ex->e.blk, &j->req);
}

static bool is_aligned(const struct nbd_ex *ex, uint64_t off, uint64_t len)
{
	return !((off | len) & (block_size(ex->e.blk) - 1));
}

/* All of it zeroes, as the image knows without reading? */
static bool known_zero(struct nbd_ex *ex, uint64_t off, uint64_t len)
{
	struct block_extent e = { .zero = true };
	for (; len && e.zero; off += e.len, len -= e.len)
		if (image_map(ex->e.blk, NULL, off, len, &e))
			return false;
	return e.zero;
}

static void do_read(struct nbd_job *j)
{
	struct nbd_ex *ex = j->c->ex;
	uint64_t off = ex->e.off + j->off;
	if (!j->len)
		job_end(j, 0);
	else if (!is_aligned(ex, off, j->len))
		job_end(j, ragged(ex, false, off, j->buf, j->len, 0));
	else if (j->c->structured && j->cmd == NBD_READ && j->len >= SPARSE_MIN && !(j->flags & NBD_DF) && known_zero(ex, off, j->len)) {
		j->hole = true;
		job_end(j, 0);
	} else {
		submit(j, BLOCK_READ, off, j->len, 0);
	}
}

static void do_write(struct nbd_job *j)
{
	struct nbd_ex *ex = j->c->ex;
	uint64_t off = ex->e.off + j->off;
	unsigned flags = j->flags & NBD_FUA ? BLOCK_REQ_FUA : 0;
	ex->dirty = true;
	if (!j->len)
		job_end(j, 0);
	else if (!is_aligned(ex, off, j->len))
		job_end(j, ragged(ex, true, off, j->buf, j->len, flags));
	else
		submit(j, BLOCK_WRITE, off, j->len, flags);
}

static void do_zero(struct nbd_job *j)
{
	struct nbd_ex *ex = j->c->ex;
	uint64_t off = ex->e.off + j->off;
	unsigned flags = (j->flags & NBD_FUA ? BLOCK_REQ_FUA : 0) | (j->flags & NBD_NO_HOLE ? 0 : BLOCK_REQ_MAY_UNMAP) |
			 (j->flags & NBD_FAST_ZERO ? BLOCK_REQ_NO_FALLBACK : 0);
	ex->dirty = true;
	if (!j->len)
		job_end(j, 0);
	else if (!is_aligned(ex, off, j->len))
		job_end(j, j->flags & NBD_FAST_ZERO ? -ENOTSUP : ragged_zero(ex, off, j->len, flags));
	else
		submit(j, BLOCK_ZERO, off, j->len, flags);
}

static void do_trim(struct nbd_job *j)
{
	struct nbd_ex *ex = j->c->ex;
	uint64_t a = block_size(ex->e.blk), start = ALIGN_UP(ex->e.off + j->off, a), end = ALIGN_DOWN(ex->e.off + j->off + j->len, a);
	if (start >= end)
		job_end(j, 0);
	else
		submit(j, BLOCK_DISCARD, start, end - start, 0);
}

/* --- block status --- */

static uint32_t state_of(const struct block_extent *e, unsigned context)
{
	if (context == CTX_BITMAP)
		return e->data;
	if (context == CTX_DEPTH)
		return e->present ? e->depth + 1 : e->short_backing ? e->depth + 2 : 0; /* as in QEMU: the end of that file says so */
	return (e->data ? 0 : NBD_STATE_HOLE) | (e->zero ? NBD_STATE_ZERO : 0);
}

static int bitmap_extent(const struct nbd_export *x, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct image_bits bits = { .bits = (uint64_t *)(uintptr_t)x->bits, .nbits = x->nbits, .gran_bits = x->gran_bits };
	int r = x->live ? image_bitmap_extent(x->live, x->bitmap, off, len, e) : -EAGAIN;
	if (r != -EAGAIN)
		return r;
	image_bits_extent(&bits, off, len, e);
	return 0;
}

/* { length, flags } pairs of one context; returns how many, or -errno. */
static int gather(struct nbd_job *j, unsigned context, uint8_t *out)
{
	struct nbd_ex *ex = j->c->ex;
	uint64_t at = ex->e.off + j->off, end = at + j->len, size = block_length(ex->e.blk);
	unsigned max = j->flags & NBD_REQ_ONE ? 1 : EXTENTS_MAX, n = 0;
	for (unsigned steps = 0; at < end && steps < 4 * EXTENTS_MAX; steps++) {
		struct block_extent e;
		uint64_t start = ALIGN_DOWN(at, (uint64_t)512);
		uint64_t room = MIN(ALIGN_UP(end, (uint64_t)512), size) - start;
		int r;
		if (context == CTX_BITMAP)
			r = bitmap_extent(&ex->e, start, room, &e);
		else
			r = image_map(ex->e.blk, NULL, start, room, &e);
		if (r || e.len <= at - start)
			return r ? r : -EIO;
		uint64_t len = MIN(start + e.len, end) - at;
		uint32_t flags = state_of(&e, context);
		if (n && nbd_get32(out + 8 * n - 4) == flags) {
			nbd_put32(out + 8 * n - 8, (uint32_t)(nbd_get32(out + 8 * n - 8) + len));
		} else if (n == max) {
			break;
		} else {
			nbd_put32(out + 8 * n, (uint32_t)len);
			nbd_put32(out + 8 * n + 4, flags);
			n++;
		}
		at += len;
	}
	return (int)n;
}

static int send_status(struct nbd_client *c, struct nbd_job *j, unsigned context, const uint8_t *ext, int n, bool last)
{
	uint8_t h[24];
	struct iovec v[2] = { { h, sizeof h }, { (void *)(uintptr_t)ext, (size_t)n * 8 } };
	put_chunk(h, last ? NBD_CHUNK_DONE : 0, NBD_CHUNK_STATUS, j->cookie, (uint32_t)(4 + n * 8));
	nbd_put32(h + 20, context);
	pthread_mutex_lock(&c->send);
	int r = c->broken ? -EPIPE : nbd_send_iov(&c->chan, v, 2);
	pthread_mutex_unlock(&c->send);
	return r;
}

/* On the connection's thread: it is short. */
static void do_status(struct nbd_job *j)
{
	struct nbd_client *c = j->c;
	unsigned left = 0;
	uint8_t *ext = malloc(8 * EXTENTS_MAX);
	int r = ext ? 0 : -ENOMEM;
	for (unsigned i = 0; i < CTX_N; i++)
		left += c->ctx[i];
	if (!r && (!left || !j->len))
		r = -EINVAL;
	if (c->done)
		send_done(c);
	for (unsigned i = 0; !r && i < CTX_N; i++) {
		if (!c->ctx[i])
			continue;
		int n = gather(j, i, ext);
		r = n < 0 ? n : send_status(c, j, i, ext, n, !--left);
	}
	free(ext);
	if (r == -EPIPE || r == -ECONNRESET || !r)
		job_put(c, j, 0);
	else
		job_end(j, r);
}

/* --- the loop --- */

static int check(const struct nbd_client *c, const struct nbd_request *q, uint16_t cmd, uint16_t flags, uint64_t off, uint32_t len)
{
	static const uint16_t allowed[] = {
		[NBD_READ] = NBD_DF, [NBD_WRITE] = NBD_FUA, [NBD_FLUSH] = NBD_FUA, [NBD_TRIM] = NBD_FUA, [NBD_CACHE] = 0,
		[NBD_WRITE_ZEROES] = NBD_FUA | NBD_NO_HOLE | NBD_FAST_ZERO, [NBD_BLOCK_STATUS] = NBD_REQ_ONE,
	};
	bool write = cmd == NBD_WRITE || cmd == NBD_TRIM || cmd == NBD_WRITE_ZEROES;
	if (cmd > NBD_BLOCK_STATUS || cmd == NBD_DISC || flags & ~allowed[cmd] & ~(unsigned)NBD_FUA)
		return -EINVAL;
	if ((cmd == NBD_BLOCK_STATUS || flags & NBD_DF) && !c->structured)
		return -EINVAL;
	if (write && !c->ex->e.writable)
		return -EPERM;
	if (cmd != NBD_FLUSH && range_bad(off, len, c->ex->e.len))
		return write && cmd != NBD_TRIM ? -ENOSPC : -EINVAL;
	if ((cmd == NBD_READ || cmd == NBD_CACHE) && len > NBD_PAYLOAD_MAX)
		return -EINVAL;
	return 0;
}

static void start(struct nbd_job *j)
{
	switch (j->cmd) {
	case NBD_READ:
	case NBD_CACHE:
		do_read(j);
		break;
	case NBD_WRITE:
		do_write(j);
		break;
	case NBD_FLUSH:
		submit(j, BLOCK_FLUSH, 0, 0, 0);
		break;
	case NBD_TRIM:
		do_trim(j);
		break;
	case NBD_WRITE_ZEROES:
		do_zero(j);
		break;
	default:
		do_status(j);
	}
}

/* 0, or the connection ends. */
static int one_request(struct nbd_client *c)
{
	struct nbd_request q;
	int r = nbd_recv(&c->chan, &q, sizeof q);
	if (r)
		return r;
	uint16_t cmd = be16toh(q.type), flags = be16toh(q.flags);
	uint64_t off = be64toh(q.off);
	uint32_t len = be32toh(q.len);
	if (be32toh(q.magic) != NBD_REQUEST_MAGIC)
		return -EPROTO;
	if (cmd == NBD_DISC)
		return -ESHUTDOWN;
	if (cmd == NBD_WRITE && len > NBD_PAYLOAD_MAX)
		return -EPROTO;
	int bad = check(c, &q, cmd, flags, off, len);
	bool payload = cmd == NBD_READ || cmd == NBD_WRITE || cmd == NBD_CACHE;
	if (c->done && cmd == NBD_WRITE && c->chan.tail - c->chan.head < len)
		send_done(c);
	struct nbd_job *j = job_get(c, payload && !bad ? len : 0);
	if (!j)
		return -ENOMEM;
	j->cookie = be64toh(q.cookie);
	if (cmd == NBD_WRITE && bad)
		r = nbd_skip(&c->chan, len);
	else if (cmd == NBD_WRITE)
		r = nbd_recv(&c->chan, j->buf, len);
	if (r) {
		job_put(c, j, payload && !bad ? len : 0);
		return r;
	}
	j->off = off;
	j->flags = flags;
	j->cmd = bad ? NBD_FLUSH : cmd; /* an error has no data */
	j->len = bad ? 0 : len;
	if (bad)
		job_end(j, bad);
	else
		start(j);
	return 0;
}

void nbd_serve(struct nbd_client *c)
{
	int r = 0;
	c->thread = pthread_self();
	while (!r && !c->broken) {
		if (c->done && !more(c))
			send_done(c);
		r = one_request(c);
	}
	if (c->done)
		send_done(c);
	pthread_mutex_lock(&c->lock);
	while (c->jobs)
		pthread_cond_wait(&c->room, &c->lock);
	pthread_mutex_unlock(&c->lock);
	for (struct nbd_job *j = c->spare; j; j = c->spare) {
		c->spare = j->next;
		free(j->buf);
		free(j);
	}
	if (c->s->o.verbose && r == -EPROTO)
		log_warn("NBD: a client broke the protocol");
}
