/* What the files of this folder share. */
#ifndef LOOP_INTERNAL_H
#define LOOP_INTERNAL_H

#include <pthread.h>

#include "loop/loop.h"

/* A function waiting to run on the loop's thread; freed by the loop after it ran. */
struct post {
	struct post *next;
	loop_fn *fn;
	void *opaque;
};
void loop_post_node(struct loop *l, struct post *p);
void loop_wake(struct loop *l);

struct clock {
	pthread_mutex_t lock;
	pthread_cond_t idle;
	struct timer *head;             /* by deadline */
	struct timer *firing;           /* its callback runs now; may be a dangling pointer, only compared */
	pthread_t firing_thread;
	struct loop *loop;              /* NULL: stepped */
	uint64_t now;                   /* stepped only */
};
void clock_init(struct clock *c, struct loop *l);
void clock_fini(struct clock *c);
/* Fire what is due at `now`, in order. */
void clock_fire(struct clock *c, uint64_t now);
/* Earliest deadline, UINT64_MAX when none. */
uint64_t clock_next(struct clock *c);

#endif
