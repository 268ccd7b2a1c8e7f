/*
 * I/O limits: leaky buckets, with QEMU's meaning of every number (docs/throttle.txt of QEMU 7.2).
 *
 * A bucket fills by what a request is worth and leaks at `avg` a second. Without `max` it holds a tenth of a second's worth,
 * with `max` that many times `burst_length`; when the burst lasts longer than a second a second bucket that leaks at `max`
 * keeps its rate. A request may go when every bucket that concerns it is not over its brim; then it is poured in whole,
 * so that large requests pass, and pay afterwards.
 *
 * Several disks may share a group. Requests wait in it in order of arrival, reads apart from writes.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/util.h"
#include "block/driver.h"
#include "loop/loop.h"

#define NS 1e9

struct bucket { double level, burst; };
struct queue { struct block_req *head, **tail; };

struct throttle_group {
	pthread_mutex_t lock;
	struct throttle_limits limits;
	struct bucket bucket[THROTTLE_BUCKETS];
	struct queue queue[2];          /* reads, writes */
	struct clock *clock;            /* NULL: no loop runs in this program; who waits looks at the time itself */
	struct timer timer;
	uint64_t last;                  /* when the buckets last leaked, ns */
	uint64_t due;                   /* without a clock: when somebody should look again */
	pthread_cond_t wake;            /* waiters in throttle_wait() */
	unsigned refs;
};

static const char *const names[THROTTLE_BUCKETS] = { "bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write" };

const char *throttle_name(enum throttle_bucket b)
{
	return names[b];
}

bool throttle_wanted(const struct throttle_limits *l)
{
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++)
		if (l->b[i].avg)
			return true;
	return false;
}

int throttle_check(const struct throttle_limits *l, struct err *err)
{
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i += 3) {
		if ((l->b[i].avg && (l->b[i + 1].avg || l->b[i + 2].avg)) || (l->b[i].max && (l->b[i + 1].max || l->b[i + 2].max)))
			return err_set(err, -EINVAL, "bps/iops/max total values and read/write values cannot be used at the same time");
	}
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++) {
		const struct throttle_limit *b = &l->b[i];
		if (b->avg > THROTTLE_MAX || b->max > THROTTLE_MAX)
			return err_set(err, -EINVAL, "%s: bps/iops/max values must be within [0, %lld]", names[i], THROTTLE_MAX);
		if (b->max && !b->avg)
			return err_set(err, -EINVAL, "%s: bps_max/iops_max require corresponding bps/iops values", names[i]);
		if (b->max && b->max < b->avg)
			return err_set(err, -EINVAL, "%s: bps_max/iops_max cannot be lower than bps/iops", names[i]);
		if (b->burst_length > 1 && !b->max)
			return err_set(err, -EINVAL, "%s: burst length set without burst rate", names[i]);
		if (b->burst_length > 1 && b->max > THROTTLE_MAX / b->burst_length)
			return err_set(err, -EINVAL, "%s: burst length too high for this burst rate", names[i]);
	}
	return l->op_size && !l->b[THROTTLE_IOPS_TOTAL].avg && !l->b[THROTTLE_IOPS_READ].avg && !l->b[THROTTLE_IOPS_WRITE].avg ?
	       err_set(err, -EINVAL, "iops size requires an iops value to be set") : 0;
}

/* --- buckets; lock held --- */

static void leak(struct throttle_group *g, uint64_t now)
{
	double dt = (double)(now - g->last) / NS;
	g->last = now;
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++) {
		const struct throttle_limit *l = &g->limits.b[i];
		g->bucket[i].level = MAX(g->bucket[i].level - (double)l->avg * dt, 0.0);
		g->bucket[i].burst = MAX(g->bucket[i].burst - (double)l->max * dt, 0.0);
	}
}

/* Seconds until a bucket is not over its brim. */
static double bucket_wait(const struct throttle_limit *l, const struct bucket *b)
{
	if (!l->avg)
		return 0;
	double length = (double)MAX(l->burst_length, (uint64_t)1), brim = l->max ? (double)l->max * length : (double)l->avg / 10;
	double wait = MAX((b->level - brim) / (double)l->avg, 0.0);
	if (length > 1)
		wait = MAX(wait, (b->burst - (double)l->max / 10) / (double)l->max);
	return wait;
}

static double direction_wait(const struct throttle_group *g, bool write)
{
	double wait = 0;
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++)
		if (i % 3 == 0 || i % 3 == (write ? 2u : 1u))
			wait = MAX(wait, bucket_wait(&g->limits.b[i], &g->bucket[i]));
	return wait;
}

static void pour(struct throttle_group *g, bool write, uint64_t bytes)
{
	double ops = g->limits.op_size && bytes > g->limits.op_size ? (double)bytes / (double)g->limits.op_size : 1;
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++) {
		if (i % 3 != 0 && i % 3 != (write ? 2u : 1u))
			continue;
		double amount = i < THROTTLE_IOPS_TOTAL ? (double)bytes : ops;
		g->bucket[i].level += amount;
		if (g->limits.b[i].burst_length > 1)
			g->bucket[i].burst += amount;
	}
}

/* --- requests --- */

static bool is_write(const struct block_req *r)
{
	return r->op != BLOCK_READ;
}

static uint64_t now(const struct throttle_group *g)
{
	return g->clock ? clock_now(g->clock) : clock_host_ns();
}

static void arm(struct throttle_group *g)
{
	double wait = INFINITY;
	for (unsigned w = 0; w < 2; w++)
		if (g->queue[w].head)
			wait = MIN(wait, direction_wait(g, w));
	if (wait == INFINITY)
		return;
	g->due = g->last + (uint64_t)(wait * NS) + 1;
	if (g->clock)
		timer_arm(&g->timer, g->due);
	else
		pthread_cond_broadcast(&g->wake);
}

static struct block_req *take(struct queue *q)
{
	struct block_req *r = q->head;
	q->head = r->next;
	if (!q->head)
		q->tail = &q->head;
	return r;
}

/* What may go now. Lock held. */
static struct block_req *collect(struct throttle_group *g)
{
	struct block_req *ready = NULL, **tail = &ready;
	leak(g, now(g));
	for (unsigned w = 0; w < 2; w++) {
		while (g->queue[w].head && direction_wait(g, w) <= 0) {
			struct block_req *r = take(&g->queue[w]);
			pour(g, w, r->len);
			r->next = NULL;
			*tail = r;
			tail = &r->next;
		}
	}
	arm(g);
	return ready;
}

/* A node's request goes on, a thread that waits is told. */
static void let_go(struct block_req *ready)
{
	struct block_req *next;
	for (; ready; ready = next) {
		next = ready->next;
		if (ready->blk)
			block_dispatch(ready);
		else
			ready->done(ready);
	}
}

static void run(void *opaque)
{
	struct throttle_group *g = opaque;
	pthread_mutex_lock(&g->lock);
	struct block_req *ready = collect(g);
	pthread_mutex_unlock(&g->lock);
	let_go(ready);
}

bool throttle_admit(struct throttle_group *g, struct block_req *r)
{
	bool write = is_write(r), go;
	if (r->op == BLOCK_FLUSH || r->op == BLOCK_DISCARD)
		return true;
	pthread_mutex_lock(&g->lock);
	leak(g, now(g));
	struct queue *q = &g->queue[write];
	go = !q->head && direction_wait(g, write) <= 0;
	if (go) {
		pour(g, write, r->len);
	} else {
		r->next = NULL;
		*q->tail = r;
		q->tail = &r->next;
		arm(g);
	}
	pthread_mutex_unlock(&g->lock);
	return go;
}

void throttle_release(struct throttle_group *g, struct block *b)
{
	struct block_req *ready = NULL, **tail = &ready;
	pthread_mutex_lock(&g->lock);
	for (unsigned w = 0; w < 2; w++) {
		struct block_req **p = &g->queue[w].head, *r;
		while ((r = *p)) {
			if (r->blk != b) {
				p = &r->next;
				continue;
			}
			*p = r->next;
			r->next = NULL;
			*tail = r;
			tail = &r->next;
		}
		g->queue[w].tail = p;
	}
	pthread_mutex_unlock(&g->lock);
	let_go(ready);
}

/* --- threads that wait --- */

struct waiter { struct block_req r; struct throttle_group *g; bool go; /* under the group's lock */ };

static void waiter_done(struct block_req *r)
{
	struct waiter *w = container_of(r, struct waiter, r);
	struct throttle_group *g = w->g;
	pthread_mutex_lock(&g->lock);
	w->go = true;
	pthread_cond_broadcast(&g->wake);
	pthread_mutex_unlock(&g->lock);
}

/* False: somebody took it already, and will say so. Lock held. */
static bool give_up(struct throttle_group *g, struct waiter *w)
{
	struct queue *q = &g->queue[is_write(&w->r)];
	for (struct block_req **p = &q->head; *p; p = &(*p)->next) {
		if (*p != &w->r)
			continue;
		*p = w->r.next;
		if (!*p)
			q->tail = p;
		return true;
	}
	return false;
}

/* Until something may have changed. Lock held, and let go meanwhile. */
static void sleep_some(struct throttle_group *g)
{
	struct timespec until = { (time_t)(g->due / 1000000000), (long)(g->due % 1000000000) };
	if (g->clock) {
		pthread_cond_wait(&g->wake, &g->lock);
		return;
	}
	if (!pthread_cond_timedwait(&g->wake, &g->lock, &until))
		return;
	struct block_req *ready = collect(g);
	pthread_mutex_unlock(&g->lock);
	let_go(ready);
	pthread_mutex_lock(&g->lock);
}

void throttle_wait(struct throttle_group *g, bool write, uint64_t bytes, const unsigned *stop)
{
	struct waiter w = { .r = { .op = write ? BLOCK_WRITE : BLOCK_READ, .len = bytes, .done = waiter_done }, .g = g };
	if (!bytes || __atomic_load_n(stop, __ATOMIC_ACQUIRE) || throttle_admit(g, &w.r))
		return;
	pthread_mutex_lock(&g->lock);
	while (!w.go && !(__atomic_load_n(stop, __ATOMIC_ACQUIRE) && give_up(g, &w)))
		sleep_some(g);
	pthread_mutex_unlock(&g->lock);
}

void throttle_wake(struct throttle_group *g)
{
	pthread_mutex_lock(&g->lock);
	pthread_cond_broadcast(&g->wake);
	pthread_mutex_unlock(&g->lock);
}

/* --- groups --- */

struct throttle_group *throttle_group_new(const struct throttle_limits *l, struct clock *clock)
{
	struct throttle_group *g = calloc(1, sizeof *g);
	if (!g)
		return NULL;
	pthread_condattr_t attr;
	pthread_mutex_init(&g->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&g->wake, &attr);
	pthread_condattr_destroy(&attr);
	g->limits = *l;
	g->clock = clock;
	g->last = now(g);
	g->refs = 1;
	g->queue[0].tail = &g->queue[0].head;
	g->queue[1].tail = &g->queue[1].head;
	if (clock)
		timer_init(&g->timer, clock, run, g);
	return g;
}

struct throttle_group *throttle_group_ref(struct throttle_group *g)
{
	__atomic_add_fetch(&g->refs, 1, __ATOMIC_RELAXED);
	return g;
}

void throttle_group_unref(struct throttle_group *g)
{
	if (!g || __atomic_sub_fetch(&g->refs, 1, __ATOMIC_ACQ_REL))
		return;
	if (g->clock)
		timer_stop(&g->timer);
	pthread_mutex_destroy(&g->lock);
	pthread_cond_destroy(&g->wake);
	free(g);
}

void throttle_group_set(struct throttle_group *g, const struct throttle_limits *l)
{
	pthread_mutex_lock(&g->lock);
	leak(g, now(g));
	g->limits = *l;
	for (unsigned i = 0; i < THROTTLE_BUCKETS; i++)
		g->bucket[i] = (struct bucket){ 0 };
	arm(g);
	pthread_mutex_unlock(&g->lock);
}

void throttle_group_get(struct throttle_group *g, struct throttle_limits *l)
{
	pthread_mutex_lock(&g->lock);
	*l = g->limits;
	pthread_mutex_unlock(&g->lock);
}

/* --- by name --- */

struct throttle_group *throttle_set_find(const struct throttle_set *s, const char *name)
{
	for (unsigned i = 0; i < s->n; i++)
		if (!strcmp(s->v[i].name, name))
			return s->v[i].group;
	return NULL;
}

int throttle_set_add(struct throttle_set *s, const char *name, const struct throttle_limits *l, struct clock *clock, struct throttle_group **out)
{
	struct throttle_named *v = realloc(s->v, (s->n + 1) * sizeof *v);
	if (v)
		s->v = v;
	char *copy = v ? strdup(name) : NULL;
	struct throttle_group *g = copy ? throttle_group_new(l, clock) : NULL;
	if (!g) {
		free(copy);
		return -ENOMEM;
	}
	s->v[s->n++] = (struct throttle_named){ copy, g };
	if (out)
		*out = g;
	return 0;
}

void throttle_set_free(struct throttle_set *s)
{
	for (unsigned i = 0; i < s->n; i++) {
		free(s->v[i].name);
		throttle_group_unref(s->v[i].group);
	}
	free(s->v);
	*s = (struct throttle_set){ 0 };
}
