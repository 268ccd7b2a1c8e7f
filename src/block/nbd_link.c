/* The NBD client: sending, waiting for answers, losing the link and getting it back (nbd_link.h). */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "block/nbd_link.h"

enum { RETRY_MS = 1000, RECONNECT_MS = 10000, OUT_VEC = 64 };

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
static void release_slot(struct nbd *n, struct nbd_op *op)
{
	n->slot[op->cookie % NBD_SLOTS] = NULL;
	n->used--;
	if (n->waiting)
		pthread_cond_broadcast(&n->room);
}

/* Lock held; dropped around the end of a request that nobody waits for. What was lost goes to `lost`. */
static void answer(struct nbd *n, struct nbd_op *op)
{
	release_slot(n, op);
	if (!op->async) {
		op->done = true;
		pthread_cond_signal(op->cond);
		return;
	}
	struct block_req *r = op->req;
	r->ret = op->ret;
	free(op);
	if (r->ret == NBD_LOST) {
		r->next = n->lost;
		n->lost = r;
		return;
	}
	pthread_mutex_unlock(&n->lock);
	block_finish(r);
	pthread_mutex_lock(&n->lock);
}

/* No lock held. The patient way, on a thread that may wait for the next connection; without workers that is this one. */
static void run_lost(struct nbd *n)
{
	pthread_mutex_lock(&n->lock);
	struct block_req *list = n->lost, *next;
	n->lost = NULL;
	pthread_mutex_unlock(&n->lock);
	for (; list; list = next) {
		next = list->next;
		block_by_worker(list);
	}
}

/* Send and lock held (so that nobody sends from a buffer that its owner takes back), nobody reads, the link is down. */
static void give_up(struct nbd *n)
{
	n->out = NULL;
	n->out_tail = &n->out;
	n->out_sent = 0;
	for (unsigned i = 0; i < NBD_SLOTS; i++) {
		struct nbd_op *op = n->slot[i];
		if (op) {
			op->ret = NBD_LOST;
			answer(n, op);
		}
	}
}

/* Lock held: somebody who waits takes the reader's place. */
static void pass_on(struct nbd *n)
{
	for (unsigned i = 0; i < NBD_SLOTS; i++) {
		if (n->slot[i] && !n->slot[i]->async) {
			pthread_cond_signal(n->slot[i]->cond);
			return;
		}
	}
}

/* Lock held, and dropped: the reader leaves its place. */
static void leave(struct nbd *n)
{
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

/* Lock held, dropped while reading. Until `op` (NULL: for ever) is answered or the link is lost. */
static void read_until(struct nbd *n, struct nbd_op *op)
{
	n->reading = true;
	while (n->up && !(op && op->done)) {
		struct nbd_op *which = NULL;
		pthread_mutex_unlock(&n->lock);
		int r = nbd_read_reply(n, &which);
		pthread_mutex_lock(&n->lock);
		if (r > 0)
			answer(n, which);
		else if (r < 0)
			link_lost(n, r);
	}
	leave(n);
}

static void *reader_thread(void *arg)
{
	struct nbd *n = arg;
	pthread_mutex_lock(&n->lock);
	while (!n->stop) {
		if (n->up && !n->reading) {
			read_until(n, NULL);
			pthread_mutex_unlock(&n->lock);
			run_lost(n);
			pthread_mutex_lock(&n->lock);
		} else {
			pthread_cond_wait(&n->room, &n->lock);
		}
	}
	pthread_mutex_unlock(&n->lock);
	return NULL;
}

/* Lock held, a slot is free. */
static void take_slot(struct nbd *n, struct nbd_op *op)
{
	unsigned i = (unsigned)(n->seq % NBD_SLOTS);
	while (n->slot[i])
		i = (i + 1) % NBD_SLOTS;
	n->seq++;
	op->cookie = n->seq * NBD_SLOTS + i;
	op->done = false;
	op->ret = op->error = 0;
	op->got = op->ext_len = 0;
	op->unsent = false;
	n->slot[i] = op;
	n->used++;
}

static void fill_request(struct nbd_request *q, const struct nbd_op *op)
{
	*q = (struct nbd_request){ htobe32(NBD_REQUEST_MAGIC), htobe16(op->flags), htobe16(op->cmd), op->cookie, htobe64(op->off),
				   htobe32((uint32_t)op->len) };
	nbd_put64(&q->cookie, op->cookie);
}

static int send_op(struct nbd *n, const struct nbd_op *op)
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
static void send_or_lose(struct nbd *n, const struct nbd_op *op)
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

/* One try on the link that is there: 0, -errno from the server, NBD_LOST. */
static int attempt(struct nbd *n, struct nbd_op *op)
{
	while (n->b->polled && n->out)
		nbd_link_poll(n); /* in the middle of a request no other can be sent */
	pthread_mutex_lock(&n->lock);
	n->waiting++;
	while (n->up && n->used == NBD_SLOTS)
		pthread_cond_wait(&n->room, &n->lock);
	n->waiting--;
	bool up = n->up, gone;
	if (up)
		take_slot(n, op);
	pthread_mutex_unlock(&n->lock);
	if (!up)
		return NBD_LOST;
	pthread_mutex_lock(&n->send);
	pthread_mutex_lock(&n->lock);
	gone = op->done;
	pthread_mutex_unlock(&n->lock);
	/* Lost from here on: sending fails, as the descriptor stays until nobody sends. */
	if (!gone)
		send_or_lose(n, op);
	pthread_mutex_unlock(&n->send);
	pthread_mutex_lock(&n->lock);
	while (!op->done) {
		if (!n->reading && !n->thread)
			read_until(n, op);
		else
			pthread_cond_wait(op->cond, &n->lock);
	}
	int r = op->ret;
	pthread_mutex_unlock(&n->lock);
	run_lost(n);
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

int nbd_transact(struct nbd *n, struct nbd_op *op)
{
	pthread_cond_t cond;
	int r;
	pthread_cond_init(&cond, NULL);
	op->cond = &cond;
	do {
		bool waits = n->cfg.reconnect_delay;
		r = await_link(n);
		if (!r)
			r = attempt(n, op);
		if (r == NBD_LOST && !waits)
			r = -EIO;
	} while (r == NBD_LOST);
	pthread_cond_destroy(&cond);
	return r;
}

/* --- requests that nobody waits for --- */

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


bool nbd_link_submit(struct nbd *n, const struct nbd_op *request)
{
	struct nbd_op *op = malloc(sizeof *op), now = *request;
	bool sent = false;
	if (op && !pthread_mutex_trylock(&n->send)) {
		*op = now;
		pthread_mutex_lock(&n->lock);
		sent = n->up && n->used < NBD_SLOTS && start_reader(n);
		if (sent)
			take_slot(n, op);
		pthread_mutex_unlock(&n->lock);
		now.cookie = op->cookie;
		if (sent) /* from a copy: the answer may free `op` before sending returns */
			send_or_lose(n, &now);
		pthread_mutex_unlock(&n->send);
		run_lost(n);
	}
	if (!sent)
		free(op);
	return sent;
}

/* --- polled --- */

bool nbd_link_queue(struct nbd *n, const struct nbd_op *request)
{
	struct nbd_op *op = malloc(sizeof *op);
	if (!op)
		return false;
	*op = *request;
	pthread_mutex_lock(&n->lock);
	bool taken = n->up && n->used < NBD_SLOTS;
	if (taken) {
		take_slot(n, op);
		fill_request(&op->head, op);
		op->unsent = true;
		op->next = NULL;
		*n->out_tail = op;
		n->out_tail = &op->next;
	}
	pthread_mutex_unlock(&n->lock);
	if (!taken)
		free(op);
	return taken;
}

/* Lock held: what of `out` fits `v`. */
static int gather_out(const struct nbd *n, struct iovec *v, int max)
{
	uint64_t skip = n->out_sent;
	int k = 0;
	for (const struct nbd_op *op = n->out; op && k + 1 + (op->cmd == NBD_WRITE ? op->iovcnt : 0) <= max; op = op->next) {
		struct iovec head = { (void *)(uintptr_t)&op->head, sizeof op->head };
		uint64_t h = MIN(skip, (uint64_t)sizeof op->head);
		if (h < sizeof op->head)
			k += iov_slice(v + k, &head, 1, h, sizeof op->head - h);
		if (op->cmd == NBD_WRITE)
			k += iov_slice(v + k, op->iov, op->iovcnt, skip - h, op->len - (skip - h));
		skip = 0;
	}
	return k;
}

/* Lock held. */
static void out_advance(struct nbd *n, size_t put)
{
	n->out_sent += put;
	for (struct nbd_op *op = n->out; op; op = n->out) {
		size_t whole = sizeof op->head + (op->cmd == NBD_WRITE ? op->len : 0);
		if (n->out_sent < whole)
			return;
		n->out_sent -= whole;
		op->unsent = false;
		n->out = op->next;
	}
	n->out_tail = &n->out;
}

/* Send held: as much of `out` as the socket takes. 0 or -errno. */
static int push_out(struct nbd *n)
{
	struct iovec v[OUT_VEC];
	for (;;) {
		pthread_mutex_lock(&n->lock);
		int k = n->up ? gather_out(n, v, OUT_VEC) : 0;
		pthread_mutex_unlock(&n->lock);
		ssize_t put = k ? nbd_send_now(&n->chan, v, k) : 0;
		if (put <= 0)
			return put == -EAGAIN ? 0 : (int)put;
		pthread_mutex_lock(&n->lock);
		out_advance(n, (size_t)put);
		pthread_mutex_unlock(&n->lock);
	}
}

/* No lock held, this is the reader: send and receive until there is something to read. 0 or -errno. */
static int exchange(struct nbd *n)
{
	for (;;) {
		pthread_mutex_lock(&n->send);
		int r = push_out(n);
		pthread_mutex_unlock(&n->send);
		if (r || !n->out || nbd_pending(&n->chan))
			return r;
		struct pollfd p = { n->chan.fd, POLLIN | POLLOUT, 0 };
		if (poll(&p, 1, -1) < 0 && errno != EINTR)
			return -errno;
		if (p.revents & ~POLLOUT)
			return 0;
	}
}

bool nbd_link_poll(struct nbd *n)
{
	bool any = false;
	pthread_mutex_lock(&n->lock);
	bool some = n->used;
	n->reading = true;
	while (n->up && n->used && (!any || nbd_pending(&n->chan))) {
		struct nbd_op *which = NULL;
		pthread_mutex_unlock(&n->lock);
		int r = exchange(n);
		r = r ? r : nbd_read_reply(n, &which);
		pthread_mutex_lock(&n->lock);
		if (r > 0) {
			answer(n, which);
			any = true;
		} else if (r < 0) {
			link_lost(n, r);
		}
	}
	leave(n);
	pthread_mutex_unlock(&n->lock);
	run_lost(n);
	return some;
}

/* --- opening and closing --- */

/* A Unix socket, or TCP to this machine itself? */
static bool is_near(int fd)
{
	struct sockaddr_storage a;
	socklen_t len = sizeof a;
	if (getpeername(fd, (struct sockaddr *)&a, &len))
		return false;
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)&a;
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&a;
	return a.ss_family == AF_UNIX || (a.ss_family == AF_INET && ntohl(v4->sin_addr.s_addr) >> 24 == 127) || (a.ss_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr));
}

/* The first connection; open-timeout goes on trying for as long. */
int nbd_link_open(struct nbd *n, struct err *err)
{
	uint64_t end = nbd_now_ms() + n->cfg.open_timeout * 1000ull;
	for (;;) {
		int r = dial(n, &n->chan, &n->hello, NBD_HELLO_MS, err);
		n->up = !r;
		n->near = !r && is_near(n->chan.fd);
		if (!r || nbd_now_ms() >= end)
			return r;
		err_clear(err);
		nanosleep(&(struct timespec){ 0, 100000000 }, NULL);
	}
}

void nbd_link_init(struct nbd *n, struct block *b)
{
	n->b = b;
	n->chan.fd = -1;
	pthread_mutex_init(&n->send, NULL);
	pthread_mutex_init(&n->lock, NULL);
	pthread_cond_init(&n->room, NULL);
	n->out_tail = &n->out;
}

void nbd_link_free(struct nbd *n)
{
	struct nbd_op op = { .cmd = NBD_DISC };
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
	pthread_mutex_destroy(&n->send);
	pthread_mutex_destroy(&n->lock);
	pthread_cond_destroy(&n->room);
}
