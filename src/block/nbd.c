/*
 * The NBD client: a leaf whose file is on the other end of a socket.
 *
 * Callers are threads that may wait. Each sends its request (one at a time) and then needs its reply. There is no thread for
 * replies: of those that wait, one reads, fills whatever request a reply belongs to, wakes its owner, and passes the role
 * on when its own is answered. So a single request costs no switch of threads, and many are in flight together. A request
 * that comes from a queue (submit) has no thread of its own; the first of those starts one, which reads until the end.
 *
 * A connection that is lost fails what was in flight, or, with reconnect-delay, everything is sent again on a new one; the
 * requests are idempotent, and a flush that was not answered is sent again too. The server is hostile: a reply must belong
 * to a request, its data must lie inside of it, and every length is checked before it is used. What breaks the protocol
 * ends the connection for good.
 *
 * Locks: send (one sender), then lock (everything else). A request's buffers are written only by the reader, so what is in
 * flight is given up only by the reader, or when there is none.
 */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/driver.h"
#include "block/nbd_hello.h"

enum { SLOTS = 256, LOST = -100000, CHUNK_MAX = NBD_PAYLOAD_MAX + 64, ZERO_MAX = 1 << 30, PIECE = 256 * 1024, TOGETHER = 16, RETRY_MS = 1000, RECONNECT_MS = 10000 };

struct op {
	uint64_t cookie, off, len;
	uint16_t cmd, flags;
	const struct iovec *iov;        /* read: where to; write: what */
	int iovcnt;
	/* Under `lock`, but for the reader's own. */
	bool done, async;
	int ret;                        /* 0, -errno, LOST */
	int error;                      /* from an error chunk */
	uint64_t got;                   /* bytes of a read that came */
	uint32_t ext_len, ext_flags;    /* of a block status */
	pthread_cond_t *cond;           /* whose owner waits; one for all that it sent together */
	struct block_req *req;          /* async */
};

struct nbd {
	struct block *b;
	struct nbd_config cfg;
	const struct tls_creds *creds;
	struct nbd_hello hello;
	pthread_mutex_t send, lock;
	pthread_cond_t room;            /* a slot is free, the link changed, the reader left */
	struct nbd_chan chan;
	bool up, dead, connecting, reading, thread, stop;
	pthread_t reader;
	uint64_t down_since, last_try;  /* ms */
	uint64_t seq;
	unsigned waiting, used;
	struct op *slot[SLOTS];
};

/* --- replies --- */

static int broken(struct nbd *n, const char *what)
{
	log_error("%s: the NBD server breaks the protocol: %s", n->b->file, what);
	return -EPROTO;
}

static struct op *find(struct nbd *n, uint64_t cookie)
{
	pthread_mutex_lock(&n->lock);
	struct op *op = n->slot[cookie % SLOTS];
	pthread_mutex_unlock(&n->lock);
	return op && op->cookie == cookie ? op : NULL;
}

/* A part of a read's buffers: data from the wire, or zeroes. */
static int fill_part(struct nbd *n, struct op *op, uint64_t skip, uint64_t len, bool zero)
{
	struct iovec few[16], *v = op->iovcnt <= 16 ? few : calloc((size_t)op->iovcnt, sizeof *v);
	int r = 0;
	if (!v)
		return -ENOMEM;
	int k = iov_slice(v, op->iov, op->iovcnt, skip, len);
	if (zero)
		iov_zero(v, k);
	else
		r = nbd_recv_iov(&n->chan, v, k, len);
	if (v != few)
		free(v);
	return r;
}

static int data_chunk(struct nbd *n, struct op *op, uint16_t type, uint32_t len)
{
	uint8_t h[12];
	uint32_t head = type == NBD_CHUNK_HOLE ? 12 : 8;
	if (op->cmd != NBD_READ || (type == NBD_CHUNK_HOLE ? len != 12 : len <= 8))
		return broken(n, "data that nobody asked for");
	int r = nbd_recv(&n->chan, h, head);
	if (r)
		return r;
	uint64_t off = nbd_get64(h), size = type == NBD_CHUNK_HOLE ? nbd_get32(h + 8) : len - 8;
	if (!size || off < op->off || range_bad(off - op->off, size, op->len) || size > op->len - op->got)
		return broken(n, "data outside of the request");
	op->got += size;
	return fill_part(n, op, off - op->off, size, type == NBD_CHUNK_HOLE);
}

static int status_chunk(struct nbd *n, struct op *op, uint32_t len)
{
	uint8_t h[12];
	if (op->cmd != NBD_BLOCK_STATUS || len < 12 || (len - 4) % 8)
		return broken(n, "block status that nobody asked for");
	int r = nbd_recv(&n->chan, h, 12);
	if (r)
		return r;
	if (nbd_get32(h) != n->hello.context || !nbd_get32(h + 4))
		return broken(n, "block status of another context, or of nothing");
	if (!op->ext_len) {
		op->ext_len = nbd_get32(h + 4);
		op->ext_flags = nbd_get32(h + 8);
	}
	return nbd_skip(&n->chan, len - 12);
}

static int error_chunk(struct nbd *n, struct op *op, uint32_t len)
{
	uint8_t h[6];
	if (len < 6)
		return broken(n, "short error");
	int r = nbd_recv(&n->chan, h, 6);
	if (r)
		return r;
	if (!nbd_get32(h) || nbd_get16(h + 4) > len - 6)
		return broken(n, "malformed error");
	if (!op->error)
		op->error = nbd_error_from_wire(nbd_get32(h));
	return nbd_skip(&n->chan, len - 6);
}

/* 1: the request is answered. */
static int chunk(struct nbd *n, struct op *op, uint16_t flags, uint16_t type, uint32_t len)
{
	int r;
	if (len > CHUNK_MAX)
		return broken(n, "chunk is too long");
	if (type == NBD_CHUNK_DATA || type == NBD_CHUNK_HOLE)
		r = data_chunk(n, op, type, len);
	else if (type == NBD_CHUNK_STATUS)
		r = status_chunk(n, op, len);
	else if (type & 0x8000)
		r = error_chunk(n, op, len);
	else if (type == NBD_CHUNK_NONE)
		r = len || !(flags & NBD_CHUNK_DONE) ? broken(n, "malformed end") : 0;
	else
		r = broken(n, "unknown kind of chunk");
	if (r || !(flags & NBD_CHUNK_DONE))
		return r;
	if (!op->error && op->cmd == NBD_READ && op->got != op->len)
		return broken(n, "a read was not answered in full");
	if (!op->error && op->cmd == NBD_BLOCK_STATUS && !op->ext_len)
		return broken(n, "a block status was not answered");
	op->ret = op->error;
	return 1;
}

static int simple_reply(struct nbd *n, struct op *op, uint32_t error)
{
	if (n->hello.structured && (op->cmd == NBD_READ || op->cmd == NBD_BLOCK_STATUS))
		return broken(n, "simple reply where a structured one was agreed on");
	op->ret = nbd_error_from_wire(error);
	int r = !error && op->cmd == NBD_READ ? fill_part(n, op, 0, op->len, false) : 0;
	return r ? r : 1;
}

/* One reply, or one chunk of one. 0: go on, 1: *out is answered, else the link is lost. */
static int read_reply(struct nbd *n, struct op **out)
{
	uint8_t h[20];
	int r = nbd_recv(&n->chan, h, 16);
	if (r)
		return r;
	uint32_t magic = nbd_get32(h);
	struct op *op = find(n, nbd_get64(h + 8));
	*out = op;
	if (magic != NBD_SIMPLE_MAGIC && (magic != NBD_CHUNK_MAGIC || !n->hello.structured))
		return broken(n, "bad magic of a reply");
	if (!op)
		return broken(n, "reply to a request that was not made");
	if (magic == NBD_SIMPLE_MAGIC)
		return simple_reply(n, op, nbd_get32(h + 4));
	r = nbd_recv(&n->chan, h + 16, 4);
	return r ? r : chunk(n, op, nbd_get16(h + 4), nbd_get16(h + 6), nbd_get32(h + 16));
}

/* --- the link --- */

/* Lock held. The reader, if there is one, notices and gives up what is in flight. */
static void link_lost(struct nbd *n, int why)
{
	if (!n->up)
		return;
	n->up = false;
	n->down_since = nbd_now_ms();
	n->last_try = 0;
	if (why == -EPROTO)
		n->dead = true;
	shutdown(n->chan.fd, SHUT_RDWR);
	if (!n->stop)
		log_warn("%s: the connection to the NBD server is lost%s%s", n->b->file, why == -EPIPE ? ": the server closed it" : "",
			 n->dead ? " for good" : n->cfg.reconnect_delay ? "; reconnecting" : "");
	pthread_cond_broadcast(&n->room);
}

/* Lock held. */
static void release_slot(struct nbd *n, struct op *op)
{
	n->slot[op->cookie % SLOTS] = NULL;
	n->used--;
	if (n->waiting)
		pthread_cond_broadcast(&n->room);
}

/* Lock held; dropped around the end of a request that nobody waits for. */
static void answer(struct nbd *n, struct op *op)
{
	release_slot(n, op);
	if (!op->async) {
		op->done = true;
		pthread_cond_signal(op->cond);
		return;
	}
	struct block_req *r = op->req;
	int ret = op->ret;
	pthread_mutex_unlock(&n->lock);
	free(op);
	r->ret = ret;
	/* Lost: the patient way, on a thread that may wait for the next connection. */
	if (ret == LOST)
		block_by_worker(r);
	else
		block_finish(r);
	pthread_mutex_lock(&n->lock);
}

/* Send and lock held (so that nobody sends from a buffer that its owner takes back), nobody reads, the link is down. */
static void give_up(struct nbd *n)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		struct op *op = n->slot[i];
		if (op) {
			op->ret = LOST;
			answer(n, op);
		}
	}
}

/* Lock held: somebody who waits takes the reader's place. */
static void pass_on(struct nbd *n)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		if (n->slot[i] && !n->slot[i]->async) {
			pthread_cond_signal(n->slot[i]->cond);
			return;
		}
	}
}

/* Lock held, dropped while reading. Until `op` (NULL: for ever) is answered or the link is lost. */
static void read_until(struct nbd *n, struct op *op)
{
	n->reading = true;
	while (n->up && !(op && op->done)) {
		struct op *which = NULL;
		pthread_mutex_unlock(&n->lock);
		int r = read_reply(n, &which);
		pthread_mutex_lock(&n->lock);
		if (r > 0)
			answer(n, which);
		else if (r < 0)
			link_lost(n, r);
	}
	if (!n->up) {
		pthread_mutex_unlock(&n->lock);
		pthread_mutex_lock(&n->send);
		pthread_mutex_lock(&n->lock);
		give_up(n);
		pthread_mutex_unlock(&n->send);
	}
	n->reading = false;
	if (n->up)
		pass_on(n);
	pthread_cond_broadcast(&n->room);
}

static void *reader_thread(void *arg)
{
	struct nbd *n = arg;
	pthread_mutex_lock(&n->lock);
	while (!n->stop) {
		if (n->up && !n->reading)
			read_until(n, NULL);
		else
			pthread_cond_wait(&n->room, &n->lock);
	}
	pthread_mutex_unlock(&n->lock);
	return NULL;
}

/* Lock held. */
static int take_slot(struct nbd *n, struct op *op)
{
	unsigned i = (unsigned)(n->seq % SLOTS);
	while (n->slot[i])
		i = (i + 1) % SLOTS;
	n->seq++;
	op->cookie = n->seq * SLOTS + i;
	op->done = false;
	op->ret = op->error = 0;
	op->got = op->ext_len = 0;
	n->slot[i] = op;
	n->used++;
	return 0;
}

static void fill_request(struct nbd_request *q, const struct op *op)
{
	*q = (struct nbd_request){ htobe32(NBD_REQUEST_MAGIC), htobe16(op->flags), htobe16(op->cmd), op->cookie, htobe64(op->off),
				   htobe32((uint32_t)op->len) };
	nbd_put64(&q->cookie, op->cookie);
}

static int send_op(struct nbd *n, const struct op *op)
{
	struct nbd_request q;
	struct iovec few[17], *v = few;
	int k = op->cmd == NBD_WRITE ? op->iovcnt : 0;
	fill_request(&q, op);
	if (k > 16)
		v = calloc((size_t)k + 1, sizeof *v);
	if (!v)
		return -ENOMEM;
	v[0] = (struct iovec){ &q, sizeof q };
	if (k)
		memcpy(v + 1, op->iov, (size_t)k * sizeof *v);
	int r = nbd_send_iov(&n->chan, v, k + 1);
	if (v != few)
		free(v);
	return r;
}

/* Send held. Nothing is sent for a request that was given up. */
static void send_or_lose(struct nbd *n, const struct op *op)
{
	int r = send_op(n, op);
	if (!r)
		return;
	pthread_mutex_lock(&n->lock);
	link_lost(n, r);
	if (!n->reading)
		give_up(n);
	pthread_mutex_unlock(&n->lock);
}

/* One try on the link that is there, `k` requests together: 0, the first -errno from the server, LOST. */
static int attempt(struct nbd *n, struct op *op, unsigned k)
{
	pthread_mutex_lock(&n->lock);
	n->waiting++;
	while (n->up && n->used + k > SLOTS)
		pthread_cond_wait(&n->room, &n->lock);
	n->waiting--;
	bool up = n->up, gone;
	for (unsigned i = 0; up && i < k; i++)
		take_slot(n, &op[i]);
	pthread_mutex_unlock(&n->lock);
	if (!up)
		return LOST;
	pthread_mutex_lock(&n->send);
	for (unsigned i = 0; i < k; i++) {
		pthread_mutex_lock(&n->lock);
		gone = op[i].done;
		pthread_mutex_unlock(&n->lock);
		/* Lost from here on: sending fails, as the descriptor stays until nobody sends. */
		if (!gone)
			send_or_lose(n, &op[i]);
	}
	pthread_mutex_unlock(&n->send);
	pthread_mutex_lock(&n->lock);
	int r = 0;
	for (unsigned i = 0; i < k; i++) {
		while (!op[i].done) {
			if (!n->reading && !n->thread)
				read_until(n, &op[i]);
			else
				pthread_cond_wait(op[i].cond, &n->lock);
		}
		r = op[i].ret == LOST || !r ? op[i].ret : r;
	}
	pthread_mutex_unlock(&n->lock);
	return r;
}

/* --- connecting --- */

static int dial(struct nbd *n, struct nbd_chan *c, struct nbd_hello *h, unsigned timeout_ms, struct err *err)
{
	int fd = nbd_connect(&n->cfg, timeout_ms, err);
	if (fd < 0)
		return fd;
	nbd_chan_init(c, fd);
	c->deadline = nbd_now_ms() + timeout_ms;
	char *context = NULL;
	int r = n->cfg.bitmap && !(context = strdup(n->cfg.bitmap)) ? err_set(err, -ENOMEM, "out of memory") :
		nbd_hello(c, &n->cfg, n->creds, context ? context : "base:allocation", h, err);
	free(context);
	c->deadline = 0;
	if (r)
		nbd_chan_close(c);
	return r;
}

/* May the server that answers now stand in for the one before? */
static int same_export(const struct nbd *n, const struct nbd_hello *h, struct err *err)
{
	const struct nbd_hello *o = &n->hello;
	if (h->size != o->size)
		return err_set(err, -EINVAL, "the export's size changed from %llu to %llu", (unsigned long long)o->size, (unsigned long long)h->size);
	if (!n->b->read_only && h->flags & NBD_READ_ONLY)
		return err_set(err, -EROFS, "the export became read-only");
	if (o->flags & ~h->flags & (NBD_SEND_FLUSH | NBD_SEND_FUA))
		return err_set(err, -EINVAL, "the server cannot flush any more");
	if (h->min_block > n->b->size || (h->max_block && h->max_block < o->max_block) || (!o->max_block && h->max_block && h->max_block < NBD_PAYLOAD_MAX))
		return err_set(err, -EINVAL, "the server's block sizes changed");
	return 0;
}

/* Lock held, `connecting` set by the caller; dropped meanwhile. */
static int reconnect(struct nbd *n)
{
	struct nbd_chan *c = malloc(sizeof *c);
	struct nbd_hello h;
	struct err err = { 0 };
	pthread_mutex_unlock(&n->lock);
	int r = c ? dial(n, c, &h, RECONNECT_MS, &err) : -ENOMEM;
	if (!r && (r = same_export(n, &h, &err)))
		nbd_chan_close(c);
	for (;;) { /* who reads may want `send` before it leaves */
		pthread_mutex_lock(&n->send);
		pthread_mutex_lock(&n->lock);
		if (r || !n->reading)
			break;
		pthread_mutex_unlock(&n->send);
		pthread_cond_wait(&n->room, &n->lock);
		pthread_mutex_unlock(&n->lock);
	}
	if (!r) {
		nbd_chan_close(&n->chan);
		n->chan = *c;
		n->hello = h;
		n->up = true;
		log_info("%s: connected again", n->b->file);
	} else {
		log_debug("%s: %s", n->b->file, err.msg);
	}
	pthread_mutex_unlock(&n->send);
	free(c);
	return r;
}

/* Lock held: sleep until something changes, at most `ms`. */
static void pause_ms(struct nbd *n, uint64_t ms)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_nsec += (long)(ms % 1000) * 1000000;
	ts.tv_sec += (time_t)(ms / 1000) + ts.tv_nsec / 1000000000;
	ts.tv_nsec %= 1000000000;
	pthread_cond_timedwait(&n->room, &n->lock, &ts);
}

/* 0: there is a link. Else it is down, and waiting longer was not asked for. */
static int await_link(struct nbd *n)
{
	uint64_t pause = 50;
	int r = 0;
	pthread_mutex_lock(&n->lock);
	while (!n->up) {
		uint64_t now = nbd_now_ms(), end = n->down_since + n->cfg.reconnect_delay * 1000ull;
		bool late = now >= end, soon = n->last_try && now - n->last_try < (late ? RETRY_MS : pause);
		if (n->dead || n->stop || (late && (n->connecting || soon || r))) {
			r = -EIO;
			break;
		}
		if (n->connecting || soon) {
			pause_ms(n, MIN(end - now, pause));
			continue;
		}
		n->connecting = true;
		r = reconnect(n);
		n->last_try = nbd_now_ms();
		n->connecting = false;
		pause = MIN(pause * 2, (uint64_t)RETRY_MS);
		pthread_cond_broadcast(&n->room);
	}
	if (n->up)
		r = 0;
	pthread_mutex_unlock(&n->lock);
	return r;
}

static int transact_all(struct nbd *n, struct op *op, unsigned k)
{
	pthread_cond_t cond;
	int r;
	pthread_cond_init(&cond, NULL);
	for (unsigned i = 0; i < k; i++)
		op[i].cond = &cond;
	do {
		bool waits = n->cfg.reconnect_delay;
		r = await_link(n);
		if (!r)
			r = attempt(n, op, k);
		if (r == LOST && !waits)
			r = -EIO;
	} while (r == LOST);
	pthread_cond_destroy(&cond);
	return r;
}

static int transact(struct nbd *n, struct op *op)
{
	return transact_all(n, op, 1);
}

/* --- the driver --- */

static uint64_t max_payload(const struct nbd *n)
{
	uint32_t m = n->hello.max_block;
	return m && m < NBD_PAYLOAD_MAX ? m : NBD_PAYLOAD_MAX;
}

static bool wants_fua(const struct block *b, unsigned flags)
{
	if (b->cache == CACHE_UNSAFE)
		return false;
	return flags & BLOCK_REQ_FUA || b->cache == CACHE_WRITETHROUGH || b->cache == CACHE_DIRECTSYNC;
}

static int nbd_flush(struct block *b)
{
	struct nbd *n = b->nbd;
	struct op op = { .cmd = NBD_FLUSH };
	if (!(n->hello.flags & NBD_SEND_FLUSH) || b->read_only || b->cache == CACHE_UNSAFE)
		return 0;
	return transact(n, &op);
}

/*
 * Aligned to the server's smallest block and inside of the export. What is long goes as several requests at once, so that the
 * server reads the next piece while this one travels.
 */
static int rw_aligned(struct block *b, uint16_t cmd, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t piece = MIN(max_payload(n), (uint64_t)PIECE);
	bool fua = cmd == NBD_WRITE && wants_fua(b, flags), can = n->hello.flags & NBD_SEND_FUA;
	struct op one = { .cmd = cmd, .flags = fua && can ? NBD_FUA : 0, .off = off, .len = len, .iov = iov, .iovcnt = cnt };
	int r = 0;
	if (!len)
		return 0; /* the protocol leaves open what an empty request means */
	if (len <= piece) {
		r = transact(n, &one);
		return !r && fua && !can ? nbd_flush(b) : r;
	}
	struct op *op = calloc(TOGETHER, sizeof *op);
	struct iovec *v = calloc((size_t)cnt + TOGETHER, sizeof *v); /* a cut between two pieces makes one entry more */
	if (!op || !v)
		r = -ENOMEM;
	for (uint64_t done = 0; !r && done < len;) {
		unsigned k = 0;
		for (int used = 0; k < TOGETHER && done < len; k++) {
			op[k] = one;
			op[k].off = off + done;
			op[k].len = MIN(len - done, piece);
			op[k].iov = v + used;
			op[k].iovcnt = iov_slice(v + used, iov, cnt, done, op[k].len);
			used += op[k].iovcnt;
			done += op[k].len;
		}
		r = transact_all(n, op, k);
	}
	free(op);
	free(v);
	return !r && fua && !can ? nbd_flush(b) : r;
}

/* The aligned hull of a request through a buffer; alone among writers. */
static int rw_ragged(struct block *b, bool write, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t a = n->hello.min_block ? n->hello.min_block : 512, size = n->hello.size;
	uint64_t start = ALIGN_DOWN(off, a), end = MIN(ALIGN_UP(off + len, a), size);
	uint64_t real = off >= size ? 0 : MIN(len, size - off);
	uint8_t *hull = real ? calloc(1, end - start) : NULL;
	struct iovec v = { hull, end - start };
	int r = !real || hull ? 0 : -ENOMEM;
	if (write)
		pthread_rwlock_wrlock(&b->rmw);
	if (!r && real)
		r = rw_aligned(b, NBD_READ, start, &v, 1, end - start, 0);
	uint64_t at = off - start, left = real;
	for (int i = 0; !r && i < cnt; i++) {
		uint64_t k = MIN(left, (uint64_t)iov[i].iov_len);
		uint8_t *p = iov[i].iov_base;
		if (write && k)
			memcpy(hull + at, p, k);
		else if (k)
			memcpy(p, hull + at, k);
		if (write && k < iov[i].iov_len) { /* past the end there is nothing to write to */
			struct iovec rest = { p + k, iov[i].iov_len - k };
			r = iov_is_zero(&rest, 1) ? 0 : -ENOSPC;
		} else if (!write) {
			memset(p + k, 0, iov[i].iov_len - k);
		}
		at += k;
		left -= k;
	}
	if (!r && write && real)
		r = rw_aligned(b, NBD_WRITE, start, &v, 1, end - start, flags);
	if (write)
		pthread_rwlock_unlock(&b->rmw);
	free(hull);
	return r;
}

static bool is_ragged(const struct nbd *n, uint64_t off, uint64_t len)
{
	uint64_t a = n->hello.min_block ? n->hello.min_block : 512;
	if (range_bad(off, len, n->hello.size) || off % a)
		return true;
	return len % a && !(n->hello.min_block == 0 && off + len == n->hello.size);
}

static int nbd_read(struct block *b, uint64_t off, const struct iovec *iov, int cnt, uint64_t len)
{
	if (is_ragged(b->nbd, off, len))
		return rw_ragged(b, false, off, iov, cnt, len, 0);
	return rw_aligned(b, NBD_READ, off, iov, cnt, len, 0);
}

static int nbd_write(struct block *b, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	if (is_ragged(b->nbd, off, len))
		return rw_ragged(b, true, off, iov, cnt, len, flags);
	pthread_rwlock_rdlock(&b->rmw);
	int r = rw_aligned(b, NBD_WRITE, off, iov, cnt, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* [off, off+len) without what the server cannot take: outside of the export, or part of a block. */
static bool shrink(const struct nbd *n, uint64_t *off, uint64_t *len)
{
	uint64_t a = n->hello.min_block ? n->hello.min_block : 1, end = MIN(*off + *len, n->hello.size);
	uint64_t start = ALIGN_UP(*off, a);
	end = ALIGN_DOWN(end, a);
	*off = start;
	*len = end > start ? end - start : 0;
	return *len;
}

static int nbd_discard(struct block *b, uint64_t off, uint64_t len)
{
	struct nbd *n = b->nbd;
	int r = 0;
	if (!b->discard_unmap || !(n->hello.flags & NBD_SEND_TRIM) || !shrink(n, &off, &len))
		return 0;
	for (uint64_t part; !r && len; off += part, len -= part) {
		struct op op = { .cmd = NBD_TRIM, .off = off, .len = part = MIN(len, (uint64_t)ZERO_MAX) };
		r = transact(n, &op);
	}
	return r == -ENOTSUP ? 0 : r;
}

static int write_zeroes(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	size_t size = (size_t)MIN(len, (uint64_t)1 << 20);
	void *buf = calloc(1, size);
	int r = buf || !len ? 0 : -ENOMEM;
	for (uint64_t part; !r && len; off += part, len -= part) {
		part = MIN(len, (uint64_t)size);
		r = nbd_write(b, off, &(struct iovec){ buf, part }, 1, part, flags);
	}
	free(buf);
	return r;
}

static int nbd_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t start = off, size = len, end = off + len;
	bool fua = wants_fua(b, flags), can = n->hello.flags & NBD_SEND_FUA;
	int r = 0;
	bool quick = flags & BLOCK_REQ_NO_FALLBACK;
	if (quick && (!(n->hello.flags & NBD_SEND_FAST_ZERO) || !(n->hello.flags & NBD_SEND_WRITE_ZEROES)))
		return -ENOTSUP;
	if (!(n->hello.flags & NBD_SEND_WRITE_ZEROES))
		return write_zeroes(b, off, len, flags);
	if (!shrink(n, &start, &size))
		return write_zeroes(b, off, len, flags);
	if (start > off)
		r = write_zeroes(b, off, start - off, flags);
	uint64_t at = start;
	for (uint64_t part, left = size; !r && left; at += part, left -= part) {
		struct op op = { .cmd = NBD_WRITE_ZEROES, .off = at, .len = part = MIN(left, (uint64_t)ZERO_MAX),
				 .flags = (flags & BLOCK_REQ_MAY_UNMAP ? 0 : NBD_NO_HOLE) | (fua && can ? NBD_FUA : 0) | (quick ? NBD_FAST_ZERO : 0) };
		r = transact(n, &op);
		if (r == -ENOTSUP && !quick)
			return write_zeroes(b, at, end - at, flags);
	}
	if (!r && at < MIN(end, n->hello.size))
		r = write_zeroes(b, at, end - at, flags);
	return !r && fua && !can ? nbd_flush(b) : r;
}

static int nbd_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct nbd *n = b->nbd;
	uint64_t a = n->hello.min_block ? n->hello.min_block : 1, start = ALIGN_DOWN(off, a);
	*e = (struct block_extent){ .len = len, .present = true, .data = true, .has_offset = true, .offset = off, .file = b->file };
	if (off >= n->hello.size) {
		e->data = false;
		e->zero = true;
		return 0;
	}
	if (!n->hello.has_context || start + a > ALIGN_DOWN(n->hello.size, a))
		return 0;
	uint64_t want = MIN(MIN(ALIGN_UP(off + len, a), ALIGN_DOWN(n->hello.size, a)) - start, (uint64_t)ZERO_MAX);
	struct op op = { .cmd = NBD_BLOCK_STATUS, .flags = NBD_REQ_ONE, .off = start, .len = want };
	int r = transact(n, &op);
	if (r)
		return r;
	uint64_t end = start + op.ext_len;
	if (end <= off)
		return 0; /* less than a block: call it data */
	e->len = MIN(len, end - off);
	if (n->cfg.bitmap) { /* QEMU's rule: what is dirty shows as no data */
		e->data = e->has_offset = !(op.ext_flags & 1);
		return 0;
	}
	e->data = !(op.ext_flags & NBD_STATE_HOLE);
	e->zero = op.ext_flags & NBD_STATE_ZERO;
	return 0;
}

static int nbd_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	return size <= b->nbd->hello.size ? 0 : err_set(err, -ENOTSUP, "%s: an NBD export cannot be resized from here", b->file);
}

static int64_t nbd_file_length(struct block *b)
{
	return (int64_t)b->nbd->hello.size;
}

static int nbd_truncate(struct block *b, uint64_t len)
{
	return len <= b->nbd->hello.size ? 0 : -ENOSPC;
}

static int nbd_allocate(struct block *b, uint64_t off, uint64_t len, bool write)
{
	if (range_bad(off, len, b->nbd->hello.size))
		return -ENOSPC;
	return write ? nbd_zero(b, off, len, 0) : 0;
}

/* --- requests from a queue --- */

static bool as_op(struct block *b, struct block_req *r, struct op *op)
{
	static const uint16_t cmds[] = { [BLOCK_READ] = NBD_READ, [BLOCK_WRITE] = NBD_WRITE, [BLOCK_FLUSH] = NBD_FLUSH };
	struct nbd *n = b->nbd;
	if (r->op > BLOCK_FLUSH || r->len > (r->op == BLOCK_WRITE ? 65536u : max_payload(n)) || r->iovcnt > 16)
		return false;
	if (r->op == BLOCK_FLUSH ? !(n->hello.flags & NBD_SEND_FLUSH) || b->read_only || b->cache == CACHE_UNSAFE : is_ragged(n, r->off, r->len))
		return false;
	bool fua = r->op == BLOCK_WRITE && wants_fua(b, r->flags);
	if (fua && !(n->hello.flags & NBD_SEND_FUA))
		return false;
	*op = (struct op){ .cmd = cmds[r->op], .flags = fua ? NBD_FUA : 0, .off = r->op == BLOCK_FLUSH ? 0 : r->off,
			   .len = r->op == BLOCK_FLUSH ? 0 : r->len, .iov = r->iov, .iovcnt = r->iovcnt, .async = true, .req = r };
	return true;
}

/* Lock held. */
static bool start_reader(struct nbd *n)
{
	sigset_t all, old;
	if (n->thread)
		return true;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	n->thread = !pthread_create(&n->reader, NULL, reader_thread, n);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return n->thread;
}

/* Send it without waiting for anything; the reader thread ends it. False: not touched. */
static bool nbd_submit(struct block *b, struct block_req *r)
{
	struct nbd *n = b->nbd;
	struct op now, *op;
	if (!b->workers || !as_op(b, r, &now))
		return false;
	/* A ragged write reads, changes and writes: nothing may come between. */
	if (now.cmd == NBD_WRITE && pthread_rwlock_tryrdlock(&b->rmw))
		return false;
	bool sent = false;
	op = malloc(sizeof *op);
	if (op && !pthread_mutex_trylock(&n->send)) {
		*op = now;
		pthread_mutex_lock(&n->lock);
		bool ok = n->up && n->used < SLOTS && start_reader(n);
		if (ok)
			take_slot(n, op);
		pthread_mutex_unlock(&n->lock);
		now.cookie = op->cookie;
		sent = ok;
		if (ok)
			send_or_lose(n, &now);
		pthread_mutex_unlock(&n->send);
	}
	if (now.cmd == NBD_WRITE)
		pthread_rwlock_unlock(&b->rmw);
	if (!sent)
		free(op);
	return sent;
}

static bool nbd_fast(struct block *b, struct block_req *r)
{
	return false; /* never at once */
}

static void nbd_close(struct block *b)
{
	struct nbd *n = b->nbd;
	struct op op = { .cmd = NBD_DISC };
	if (!n)
		return;
	if (n->up)
		send_op(n, &op);
	pthread_mutex_lock(&n->lock);
	n->stop = true;
	link_lost(n, 0);
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
	if (n->thread)
		pthread_join(n->reader, NULL);
	nbd_chan_close(&n->chan);
	nbd_config_free(&n->cfg);
	pthread_mutex_destroy(&n->send);
	pthread_mutex_destroy(&n->lock);
	pthread_cond_destroy(&n->room);
	free(n);
	b->nbd = NULL;
}

#define NBD_DRIVER(n)                                                                                                    \
	{ .name = n, .read = nbd_read, .write = nbd_write, .flush = nbd_flush, .discard = nbd_discard, .zero = nbd_zero,  \
	  .fast = nbd_fast, .submit = nbd_submit, .map = nbd_map, .resize = nbd_resize, .file_length = nbd_file_length,   \
	  .truncate = nbd_truncate, .allocate = nbd_allocate, .close = nbd_close }
/* The same as an image of its own, and as what a raw image stands on, which it is shown as. */
static const struct block_driver block_nbd = NBD_DRIVER("nbd"), block_nbd_raw = NBD_DRIVER("raw");

/* --- opening --- */

static int take_hello(struct block *b, const struct block_opts *o, struct err *err)
{
	const struct nbd_hello *h = &b->nbd->hello;
	bool write = !o->read_only && !o->snapshot;
	if (write && h->flags & NBD_READ_ONLY && o->auto_read_only)
		b->read_only = true;
	else if (write && h->flags & NBD_READ_ONLY)
		return err_set(err, -EACCES, "%s: the export is read-only; use readonly=on", b->file);
	if (h->min_block > 4096)
		return err_set(err, -ENOTSUP, "%s: the server wants blocks of %u bytes; 4096 is supported", b->file, h->min_block);
	if (h->min_block > 512)
		b->size = 4096;
	b->length = h->size > INT64_MAX - 4096 ? 0 : ALIGN_UP(h->size, (uint64_t)b->size);
	if (h->size > INT64_MAX - 4096)
		return err_set(err, -EFBIG, "%s: too big", b->file);
	if (b->nbd->cfg.bitmap && !h->has_context)
		return err_set(err, -EINVAL, "%s: requested x-dirty-bitmap %s not found", b->file, b->nbd->cfg.bitmap);
	return 0;
}

/* The first connection; open-timeout goes on trying for as long. */
static int first_dial(struct nbd *n, struct err *err)
{
	uint64_t end = nbd_now_ms() + n->cfg.open_timeout * 1000ull;
	for (;;) {
		int r = dial(n, &n->chan, &n->hello, NBD_HELLO_MS, err);
		if (!r || nbd_now_ms() >= end)
			return r;
		err_clear(err);
		nanosleep(&(struct timespec){ 0, 100000000 }, NULL);
	}
}

static int read_config(struct nbd_config *c, const struct block_opts *o, struct err *err)
{
	if (!o->leaf)
		return nbd_config_name(c, o->file, err);
	struct keyvals l = { 0 };
	for (unsigned i = 0; i < o->leaf->n; i++)
		keyvals_add(&l, o->leaf->o[i].key, o->leaf->o[i].val);
	keyvals_get(&l, "driver");
	int r = nbd_config_keys(c, &l, "driver=nbd", err);
	if (!r && keyvals_end(&l, "driver=nbd", err)) {
		nbd_config_free(c);
		r = -EINVAL;
	}
	keyvals_free(&l);
	return r;
}

int nbd_open(struct block *b, const struct block_opts *o, struct err *err)
{
	struct nbd *n = calloc(1, sizeof *n);
	if (!n)
		return err_set(err, -ENOMEM, "NBD: out of memory");
	int r = read_config(&n->cfg, o, err);
	if (r) {
		free(n);
		return r;
	}
	n->b = b;
	n->chan.fd = -1;
	pthread_mutex_init(&n->send, NULL);
	pthread_mutex_init(&n->lock, NULL);
	pthread_cond_init(&n->room, NULL);
	b->nbd = n;
	b->drv = o->format || !o->leaf ? &block_nbd_raw : &block_nbd;
	b->is_dev = true; /* it has the size it has */
	free(b->file);
	b->file = nbd_config_text(&n->cfg);
	if (!b->file)
		return err_set(err, -ENOMEM, "NBD: out of memory");
	if (n->cfg.tls_creds)
		r = tls_find_creds(o->tls, n->cfg.tls_creds, false, &n->creds, err);
	else if (n->cfg.tls_uri)
		r = err_set(err, -EINVAL, "%s: TLS needs credentials: driver=nbd,...,tls-creds=ID of an -object", b->file);
	if (!r)
		r = first_dial(n, err);
	if (r)
		return r;
	n->up = true;
	return take_hello(b, o, err);
}
