/* A request to a disk, and the wait for its end, for tests. */
#ifndef TESTS_BLOCK_REQUEST_H
#define TESTS_BLOCK_REQUEST_H

#include <pthread.h>

#include "block/block.h"

struct wait { pthread_mutex_t lock; pthread_cond_t cond; bool done; };

static inline void on_done(struct block_req *r)
{
	struct wait *w = (struct wait *)(uintptr_t)r->priv[3];
	pthread_mutex_lock(&w->lock);
	w->done = true;
	pthread_cond_signal(&w->cond);
	pthread_mutex_unlock(&w->lock);
}

/* Until r->done was called: on_done() itself, or what calls it. */
static inline void submit_and_wait(struct block *b, struct block_req *r)
{
	struct wait w = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false };
	r->priv[3] = (uintptr_t)&w;
	block_submit(b, r);
	pthread_mutex_lock(&w.lock);
	while (!w.done)
		pthread_cond_wait(&w.cond, &w.lock);
	pthread_mutex_unlock(&w.lock);
}

static inline int request(struct block *b, enum block_op op, uint64_t off, uint64_t len, const struct iovec *iov, int n, unsigned flags)
{
	struct block_req r = { .op = op, .flags = flags, .off = off, .len = len, .iov = iov, .iovcnt = n, .done = on_done, .ret = 77 };
	submit_and_wait(b, &r);
	return r.ret;
}

#endif
