/*
 * Long reads that the page cache can answer, or a file system in memory: memory is copied, and a thread copies only so fast.
 *
 * Requests of COPY_MIN bytes and more wait in the leaf's queue until the submitter says that no more follows. When the guest keeps several
 * in flight (`deep`), helpers (one of the workers for each other processor) take pieces off the queue until it is empty, and the
 * submitter, a vCPU as a rule, goes back to its guest after a short share. Else it copies all by itself: with one request at a time the guest
 * has nothing else to do, and waking somebody costs as much as half a copy. Since what is done at once never leaves anything in flight, now and
 * then a request is handed over to find out.
 *
 * Before a helper is at it the submitter goes on, so nothing depends on a worker being free: a node above may hold what all the workers
 * wait for (block_submit_below()).
 *
 * What the page cache does not have goes the usual way, whole.
 */
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/util.h"
#include "block/driver.h"
#include "loop/loop.h"

enum { COPY_MIN = 64 * 1024, PIECE = 128 * 1024, PIECE_IOV = 64, SHARE = PIECE, WORTH_WAKING = 256 * 1024, HELPERS_MAX = 3,
       DEEP = 16, PROBE = 32 /* requests */ };

struct copier {
	pthread_mutex_t lock;
	pthread_cond_t gone;            /* no helper is asked for */
	struct block_req *head, **tail; /* with something left to hand out */
	uint64_t queued;                /* bytes of that */
	unsigned called, running;       /* helpers: asked for, of these at it (atomic) */
	unsigned helpers_max;
	unsigned open;                  /* requests taken and not finished */
	unsigned deep, until_probe;     /* requests for which helpers are worth it | until one is handed over to see */
};

/* In a request's `priv`. */
struct progress {
	uint64_t at;                    /* handed out so far, */
	size_t skip;                    /* of entry `i` this much */
	int i;
	unsigned out : 31, failed : 1;  /* pieces being copied; the page cache lacks something */
};
_Static_assert(sizeof(struct progress) <= sizeof(((struct block_req *)0)->priv), "fits");

struct piece { struct block_req *r; struct iovec v[PIECE_IOV]; int n; uint64_t off, len; };

static struct progress *progress_of(struct block_req *r)
{
	return (struct progress *)r->priv;
}

/* Lock held. The next piece of the first request; false: nothing is left. */
static bool take(struct copier *c, struct piece *p)
{
	struct block_req *r = p->r = c->head;
	if (!r)
		return false;
	struct progress *g = progress_of(r);
	p->off = r->off + g->at;
	p->len = 0;
	for (p->n = 0; p->n < PIECE_IOV && p->len < PIECE && g->i < r->iovcnt;) {
		const struct iovec *v = &r->iov[g->i];
		size_t part = MIN(v->iov_len - g->skip, PIECE - p->len);
		p->v[p->n++] = (struct iovec){ (char *)v->iov_base + g->skip, part };
		p->len += part;
		g->skip += part;
		if (g->skip == v->iov_len) {
			g->skip = 0;
			g->i++;
		}
	}
	g->at += p->len;
	g->out++;
	c->queued -= p->len;
	if (g->i == r->iovcnt) {
		c->head = r->next;
		if (!c->head)
			c->tail = &c->head;
	}
	return true;
}

/* Lock held: nothing more of it is handed out. */
static void give_up(struct copier *c, struct block_req *r)
{
	struct progress *g = progress_of(r);
	g->failed = true;
	for (struct block_req **p = &c->head; *p; p = &(*p)->next)
		if (*p == r) {
			*p = r->next;
			if (!*p)
				c->tail = p;
			c->queued -= r->len - g->at;
			g->at = r->len;
			return;
		}
}

static void finish(struct block_req *r, bool failed)
{
	struct block *b = r->blk;
	r->flags &= ~(unsigned)BLOCK_REQ_MORE;
	if (!failed) {
		r->ret = 0;
		block_finish(r);
	} else if (!uring_submit(b, r)) {
		block_by_worker(r);
	}
}

/* Lock held, dropped in the middle. */
static void copy(struct block *b, struct piece *p)
{
	struct copier *c = b->copier;
	pthread_mutex_unlock(&c->lock);
	bool ok = raw_read_cached(b, p->off, p->v, p->n, p->len);
	pthread_mutex_lock(&c->lock);
	struct progress *g = progress_of(p->r);
	if (!ok && !g->failed)
		give_up(c, p->r);
	if (--g->out || g->at < p->r->len)
		return;
	bool failed = g->failed;
	c->open--;
	pthread_mutex_unlock(&c->lock);
	finish(p->r, failed);
	pthread_mutex_lock(&c->lock);
}

/* --- helpers --- */

static void help(void *opaque)
{
	struct block *b = opaque;
	struct copier *c = b->copier;
	struct piece p;
	pthread_mutex_lock(&c->lock);
	__atomic_store_n(&c->running, c->running + 1, __ATOMIC_RELAXED);
	while (take(c, &p))
		copy(b, &p);
	__atomic_store_n(&c->running, c->running - 1, __ATOMIC_RELAXED);
	if (!--c->called)
		pthread_cond_broadcast(&c->gone);
	pthread_mutex_unlock(&c->lock);
}

/* Lock held. */
static void call_helpers(struct block *b)
{
	struct copier *c = b->copier;
	while (c->deep && c->called < c->helpers_max && c->queued >= WORTH_WAKING * (uint64_t)(c->called + 1)) {
		c->called++;
		if (workers_submit(b->workers, help, NULL, b)) {
			c->called--;
			break;
		}
	}
}

/* --- the submitter --- */

void copy_kick(struct block *b)
{
	struct copier *c = b->copier;
	struct piece p;
	if (!c)
		return;
	pthread_mutex_lock(&c->lock);
	call_helpers(b);
	for (uint64_t done = 0; !(c->deep && c->running && done >= SHARE) && take(c, &p); done += p.len)
		copy(b, &p);
	pthread_mutex_unlock(&c->lock);
}

bool copy_has_helper(struct block *b, const struct block_req *r)
{
	return b->copier && r->op == BLOCK_READ && r->len >= COPY_MIN && __atomic_load_n(&b->copier->running, __ATOMIC_RELAXED);
}

/* Lock held: one more comes. */
static void learn_depth(struct copier *c)
{
	if (c->open++) {
		c->deep = DEEP;
	} else if (c->deep) {
		c->deep--;
	} else if (!c->until_probe--) {
		c->deep = 1;
		c->until_probe = PROBE;
	}
}

bool copy_submit(struct block *b, struct block_req *r)
{
	struct copier *c = b->copier;
	bool more = r->flags & BLOCK_REQ_MORE;
	if (!c || r->op != BLOCK_READ || r->len < COPY_MIN || (!b->in_memory && __atomic_load_n(&b->no_nowait[0], __ATOMIC_RELAXED)))
		return false;
	for (int i = 0; i < r->iovcnt; i++)
		if (!r->iov[i].iov_len)
			return false;
	*progress_of(r) = (struct progress){ 0 };
	r->next = NULL;
	pthread_mutex_lock(&c->lock);
	*c->tail = r;
	c->tail = &r->next;
	c->queued += r->len;
	learn_depth(c);
	pthread_mutex_unlock(&c->lock);
	if (!more)
		copy_kick(b);
	return true;
}

void copy_open(struct block *b)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);
	struct copier *c = n > 1 && b->workers ? calloc(1, sizeof *c) : NULL;
	if (!c)
		return; /* one thread does it */
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->gone, NULL);
	c->tail = &c->head;
	c->helpers_max = (unsigned)MIN(n - 1, (long)HELPERS_MAX);
	b->copier = c;
}

void copy_close(struct block *b)
{
	struct copier *c = b->copier;
	if (!c)
		return;
	pthread_mutex_lock(&c->lock);
	while (c->called)
		pthread_cond_wait(&c->gone, &c->lock);
	pthread_mutex_unlock(&c->lock);
	pthread_mutex_destroy(&c->lock);
	pthread_cond_destroy(&c->gone);
	free(c);
	b->copier = NULL;
}
