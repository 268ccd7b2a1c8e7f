/*
 * io_uring for leaves: reads, writes and flushes that wait nowhere.
 *
 * A ring for each loop that completions of the leaf go to (one, unless a disk has several I/O threads). Submitters share the submission side under `sq`; whoever finds completions takes them, one thread at a time
 * (`cq`): the submitter, for what the kernel answered at once, or the loop, woken through an eventfd; of a polled node, who polls. Requests submitted
 * between uring_plug() ... uring_kick() enter the kernel with one system call.
 *
 * A transfer that ends short or is refused for a reason that a plain system call does not have is done again by a worker.
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/driver.h"
#include "loop/loop.h"

enum { ENTRIES = 256, REAP = 32, COPIES_SURE = 16, DEVICE_ROUNDS = 64 };

struct uring {
	struct uring *next;             /* fixed while requests are in flight */
	struct io_uring ring;
	struct block *b;
	pthread_mutex_t sq, cq;
	int efd;
	struct loop *loop;
	struct loop_watch *watch;
	unsigned in_kernel;             /* atomic: never more than the completion queue holds */
	unsigned at_once;               /* polled: how often in a row all requests, several, had ended when the kernel had taken them; */
	long device_blocks;             /* what this thread had read from devices when the row began */
	unsigned wait_rounds;           /* once some had not it is a device, as a rule: so often nobody asks */
	unsigned order;                 /* atomic: says in C what the kernel's rings order anyway, request before completion */
};

/* --- completions --- */

static void complete(struct uring *u, struct block_req *r, int res)
{
	if (r->op == BLOCK_FLUSH) {
		r->ret = res < 0 ? raw_flush_failed(u->b, res) : 0;
	} else if (res >= 0 && (uint64_t)res == r->len) {
		r->ret = 0;
	} else if (res >= 0 || res == -EAGAIN || res == -EINTR || res == -EOPNOTSUPP || res == -ECANCELED) {
		block_by_worker(r); /* short: the end of the file, or of the disk */
		return;
	} else {
		r->ret = res;
	}
	block_finish(r);
}

static unsigned reap_some(struct uring *u)
{
	struct { struct block_req *r; int res; } got[REAP];
	struct io_uring_cqe *cqe;
	unsigned n = 0;
	pthread_mutex_lock(&u->cq);
	while (n < REAP && !io_uring_peek_cqe(&u->ring, &cqe)) {
		got[n].r = io_uring_cqe_get_data(cqe);
		got[n++].res = cqe->res;
		io_uring_cqe_seen(&u->ring, cqe);
	}
	pthread_mutex_unlock(&u->cq);
	__atomic_load_n(&u->order, __ATOMIC_ACQUIRE);
	__atomic_sub_fetch(&u->in_kernel, n, __ATOMIC_RELEASE);
	for (unsigned i = 0; i < n; i++)
		complete(u, got[i].r, got[i].res);
	return n;
}

/* All of them: whoever was told of a completion may not leave one behind. */
static void reap(struct uring *u)
{
	while (reap_some(u) == REAP)
		;
}

/* The counter is read before looking. */
static void on_event(void *opaque, int fd, unsigned events)
{
	struct uring *u = opaque;
	uint64_t v;
	if (read(fd, &v, sizeof v) < 0 && errno != EAGAIN)
		log_warn("%s: eventfd: %s", u->b->file, strerror(errno));
	reap(u);
}

/* --- submission --- */

static void prepare(struct uring *u, struct io_uring_sqe *sqe, struct block_req *r)
{
	struct block *b = u->b;
	switch (r->op) {
	case BLOCK_READ:
		io_uring_prep_readv(sqe, b->fd, r->iov, (unsigned)r->iovcnt, r->off);
		break;
	case BLOCK_WRITE:
		io_uring_prep_writev(sqe, b->fd, r->iov, (unsigned)r->iovcnt, r->off);
		sqe->rw_flags = raw_sync_flags(b, r->flags);
		break;
	default:
		io_uring_prep_fsync(sqe, b->fd, IORING_FSYNC_DATASYNC);
		break;
	}
	io_uring_sqe_set_data(sqe, r);
	__atomic_add_fetch(&u->order, 1, __ATOMIC_RELEASE);
}

/*
 * The submission side is locked. What completes meanwhile wakes nobody: the caller looks afterwards, and what the kernel did at once
 * is the common case. (A completion is in its ring before the kernel reads the flag.)
 */
static int enter(struct uring *u)
{
	int r;
	io_uring_cq_eventfd_toggle(&u->ring, false);
	do
		r = io_uring_submit(&u->ring);
	while (r == -EINTR);
	io_uring_cq_eventfd_toggle(&u->ring, true);
	__atomic_add_fetch(&u->order, 1, __ATOMIC_SEQ_CST); /* the flag before the look */
	return r;
}

static struct uring *ring_of(struct block *b, unsigned lane)
{
	unsigned n = 0;
	if (!b->uring || !b->uring->next || !lane)
		return b->uring;
	for (struct uring *u = b->uring; u; u = u->next)
		n++;
	struct uring *u = b->uring;
	for (lane %= n; lane; lane--)
		u = u->next;
	return u;
}

bool uring_submit(struct block *b, struct block_req *r)
{
	struct uring *u = ring_of(b, r->lane);
	struct io_uring_sqe *sqe;
	bool more = r->flags & BLOCK_REQ_MORE;
	if (!u)
		return false;
	if (__atomic_add_fetch(&u->in_kernel, 1, __ATOMIC_ACQ_REL) > ENTRIES) {
		__atomic_sub_fetch(&u->in_kernel, 1, __ATOMIC_RELEASE);
		return false;
	}
	pthread_mutex_lock(&u->sq);
	sqe = io_uring_get_sqe(&u->ring);
	if (sqe)
		prepare(u, sqe, r);
	else
		__atomic_sub_fetch(&u->in_kernel, 1, __ATOMIC_RELEASE);
	/* What the kernel does not take now stays in the ring for the next time; the loop kicks it again. */
	if (sqe && !more && enter(u) < 0)
		eventfd_write(u->efd, 1);
	pthread_mutex_unlock(&u->sq);
	if (sqe && !more)
		reap(u);
	return sqe != NULL;
}

bool uring_busy(struct block *b)
{
	return b->uring && __atomic_load_n(&b->uring->in_kernel, __ATOMIC_ACQUIRE);
}

bool uring_copies(const struct block *b)
{
	return b->uring && b->uring->at_once >= COPIES_SURE;
}

/* So many blocks this thread's reads have taken from devices, as far as the kernel counts; copies take none. */
static long blocks_read(void)
{
	struct rusage r;
	return getrusage(RUSAGE_THREAD, &r) ? 0 : r.ru_inblock;
}

/*
 * All `n` that are under way to the kernel. Looked at before anything is waited for: what a device merged into one request ends together, too. A quick
 * device may have ended them all by then, over and over (a virtual one whose host answers before the guest goes on), but what it read is counted.
 */
static void send_and_look(struct uring *u, unsigned n)
{
	if (!u->at_once)
		u->device_blocks = blocks_read();
	io_uring_submit(&u->ring);
	bool device = io_uring_cq_ready(&u->ring) < n || (u->at_once == COPIES_SURE - 1 && blocks_read() != u->device_blocks);
	u->wait_rounds = device ? DEVICE_ROUNDS : 0;
	u->at_once = device ? 0 : MIN(u->at_once + 1, (unsigned)COPIES_SURE);
}

bool uring_wait(struct block *b)
{
	struct uring *u = b->uring;
	unsigned n = u ? __atomic_load_n(&u->in_kernel, __ATOMIC_ACQUIRE) : 0;
	if (!n)
		return false;
	pthread_mutex_lock(&u->sq);
	if (u->wait_rounds)
		u->wait_rounds--;
	else if (n > 1)
		send_and_look(u, n);
	if (!io_uring_cq_ready(&u->ring))
		io_uring_submit_and_wait(&u->ring, 1); /* on an error the next call tries again */
	pthread_mutex_unlock(&u->sq);
	reap(u);
	return true;
}

static void kick(struct uring *u)
{
	pthread_mutex_lock(&u->sq);
	bool any = io_uring_sq_ready(&u->ring);
	if (any && enter(u) < 0)
		eventfd_write(u->efd, 1);
	pthread_mutex_unlock(&u->sq);
	if (any)
		reap(u);
}

void uring_kick(struct block *b)
{
	for (struct uring *u = b->uring; u; u = u->next)
		kick(u);
}

/* --- life --- */

static void on_loop(void *opaque, int fd, unsigned events)
{
	struct uring *u = opaque;
	on_event(u, fd, events);
	kick(u); /* nothing is there, unless the kernel refused before */
}

static int watch(struct uring *u, struct loop *l)
{
	struct loop_watch *old = u->watch, *w;
	if (u->loop == l)
		return 0;
	w = loop_watch_fd(l, u->efd, LOOP_IN, on_loop, u);
	if (!w)
		return -ENOMEM;
	if (old)
		loop_unwatch(old);
	u->watch = w;
	u->loop = l;
	return 0;
}

static void ring_free(struct uring *u)
{
	if (u->watch)
		loop_unwatch(u->watch);
	io_uring_queue_exit(&u->ring);
	close(u->efd);
	pthread_mutex_destroy(&u->sq);
	pthread_mutex_destroy(&u->cq);
	free(u);
}

/* Behind the others in the leaf's list. */
static int ring_add(struct block *b, struct loop *l)
{
	struct uring *u = calloc(1, sizeof *u), **end = &b->uring;
	if (!u)
		return -ENOMEM;
	u->b = b;
	u->efd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int r = u->efd < 0 ? -errno : io_uring_queue_init(ENTRIES, &u->ring, 0);
	if (r) {
		if (u->efd >= 0)
			close(u->efd);
		free(u);
		return r;
	}
	pthread_mutex_init(&u->sq, NULL);
	pthread_mutex_init(&u->cq, NULL);
	r = l ? io_uring_register_eventfd(&u->ring, u->efd) : 0;
	if (!r)
		r = watch(u, l);
	if (r) {
		ring_free(u);
		return r;
	}
	while (*end)
		end = &(*end)->next;
	*end = u;
	return 0;
}

int uring_move(struct block *b, struct loop *const *l, unsigned n)
{
	struct uring **u = &b->uring;
	if (!*u)
		return 0;
	for (unsigned i = 0; i < n; i++, u = &(*u)->next) {
		int r = *u ? watch(*u, l[i]) : ring_add(b, l[i]);
		if (r)
			return r;
	}
	struct uring *more = *u, *next;
	*u = NULL;
	for (; more; more = next) {
		next = more->next;
		ring_free(more);
	}
	return 0;
}

int uring_open(struct block *b)
{
	return ring_add(b, b->polled ? NULL : b->loop);
}

void uring_close(struct block *b)
{
	struct uring *u = b->uring, *next;
	b->uring = NULL;
	for (; u; u = next) {
		next = u->next;
		ring_free(u);
	}
}
