/* Clocks and timers: a sorted list per clock. Machines have a few dozen timers, of which few are armed. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "loop/internal.h"

void clock_init(struct clock *c, struct loop *l)
{
	*c = (struct clock){ .loop = l };
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->idle, NULL);
}

void clock_fini(struct clock *c)
{
	pthread_mutex_destroy(&c->lock);
	pthread_cond_destroy(&c->idle);
}

struct clock *clock_stepped_create(void)
{
	struct clock *c = malloc(sizeof *c);
	if (c)
		clock_init(c, NULL);
	return c;
}

void clock_stepped_destroy(struct clock *c)
{
	if (!c)
		return;
	clock_fini(c);
	free(c);
}

uint64_t clock_host_ns(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t clock_now(struct clock *c)
{
	if (!c->loop)
		return __atomic_load_n(&c->now, __ATOMIC_ACQUIRE);
	return clock_host_ns();
}

void timer_init(struct timer *t, struct clock *c, loop_fn *fn, void *opaque)
{
	*t = (struct timer){ .clock = c, .fn = fn, .opaque = opaque };
}

static void unlink_timer(struct clock *c, struct timer *t)
{
	if (!t->armed)
		return;
	for (struct timer **p = &c->head; *p; p = &(*p)->next) {
		if (*p == t) {
			*p = t->next;
			break;
		}
	}
	t->armed = false;
}

void timer_arm(struct timer *t, uint64_t deadline_ns)
{
	struct clock *c = t->clock;
	pthread_mutex_lock(&c->lock);
	unlink_timer(c, t);
	struct timer **p = &c->head;
	while (*p && (*p)->deadline <= deadline_ns)
		p = &(*p)->next;
	t->deadline = deadline_ns;
	t->next = *p;
	t->armed = true;
	*p = t;
	bool first = c->head == t;
	pthread_mutex_unlock(&c->lock);
	if (first && c->loop)
		loop_wake(c->loop);
}

void timer_stop(struct timer *t)
{
	struct clock *c = t->clock;
	if (!c)
		return;
	pthread_mutex_lock(&c->lock);
	unlink_timer(c, t);
	while (c->firing == t && !pthread_equal(c->firing_thread, pthread_self())) {
		pthread_cond_wait(&c->idle, &c->lock);
		unlink_timer(c, t); /* the callback armed it again */
	}
	pthread_mutex_unlock(&c->lock);
}

uint64_t clock_next(struct clock *c)
{
	pthread_mutex_lock(&c->lock);
	uint64_t d = c->head ? c->head->deadline : UINT64_MAX;
	pthread_mutex_unlock(&c->lock);
	return d;
}

void clock_fire(struct clock *c, uint64_t now)
{
	pthread_mutex_lock(&c->lock);
	while (c->head && c->head->deadline <= now) {
		struct timer *t = c->head;
		c->head = t->next;
		t->armed = false;
		if (!c->loop && t->deadline > c->now)
			__atomic_store_n(&c->now, t->deadline, __ATOMIC_RELEASE);
		c->firing = t;
		c->firing_thread = pthread_self();
		loop_fn *fn = t->fn;
		void *opaque = t->opaque;
		pthread_mutex_unlock(&c->lock);
		fn(opaque); /* may free the timer */
		pthread_mutex_lock(&c->lock);
		c->firing = NULL;
		pthread_cond_broadcast(&c->idle);
	}
	pthread_mutex_unlock(&c->lock);
}

void clock_step(struct clock *c, uint64_t ns)
{
	uint64_t target = clock_now(c) + ns;
	clock_fire(c, target);
	if (target > clock_now(c))
		__atomic_store_n(&c->now, target, __ATOMIC_RELEASE);
}
