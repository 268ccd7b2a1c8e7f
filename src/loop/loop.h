/*
 * Event loop, clocks, timers and workers.
 *
 * One `struct loop` is run by one thread; file watches and timers fire on that thread with no lock
 * held. Everything except loop_run() may be called from any thread. A `struct clock` is either the
 * host's monotonic clock or one that a test steps by hand, so that device tests never sleep.
 */
#ifndef LOOP_LOOP_H
#define LOOP_LOOP_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct loop;
struct loop_watch;
struct clock;

enum { LOOP_IN = 1, LOOP_OUT = 4, LOOP_HUP = 16 }; /* the values of POLLIN, POLLOUT, POLLHUP */

typedef void loop_fd_fn(void *opaque, int fd, unsigned events);
typedef void loop_fn(void *opaque);

int loop_create(struct loop **out, struct err *err);
void loop_destroy(struct loop *l);              /* after its thread has left loop_run() */
int loop_run(struct loop *l);                   /* until loop_stop(); returns the status given there */
void loop_stop(struct loop *l, int status);     /* from any thread */
bool loop_on_thread(struct loop *l);            /* is the caller the thread in loop_run()? */

/*
 * Call `fn` on the loop's thread while `fd` has one of `events`. The loop does not own `fd`; one watch
 * per descriptor. A regular file is always ready. After an error or hang-up `fn` gets LOOP_HUP with
 * the events it asked for, for as long as it stays interested. NULL with errno.
 */
struct loop_watch *loop_watch_fd(struct loop *l, int fd, unsigned events, loop_fd_fn *fn, void *opaque);
void loop_watch_set(struct loop_watch *w, unsigned events);   /* 0 pauses the watch */
/* After return `fn` neither runs nor will run (waits for it when called from another thread). */
void loop_unwatch(struct loop_watch *w);
/* Run `fn` once on the loop's thread. */
void loop_post(struct loop *l, loop_fn *fn, void *opaque);
/* Forget posts of `fn` with `opaque` that did not run yet. On the loop's thread, or while it does not run. */
void loop_cancel(struct loop *l, loop_fn *fn, void *opaque);

/* Clocks: nanoseconds. */
struct clock *clock_host(struct loop *l);       /* monotonic; owned by the loop, fires timers on its thread */
struct clock *clock_stepped_create(void);       /* starts at 0 */
void clock_stepped_destroy(struct clock *c);
void clock_step(struct clock *c, uint64_t ns);  /* advance; fires due timers in order, in the caller */
uint64_t clock_now(struct clock *c);
uint64_t clock_host_ns(void);                   /* the host's monotonic clock itself, for who measures or waits without a loop */

/* A timer is embedded in its owner; zeroed memory plus timer_init() is a stopped timer. */
struct timer {
	struct clock *clock;
	loop_fn *fn;
	void *opaque;
	uint64_t deadline;      /* ns, valid while armed */
	struct timer *next;
	bool armed;
};
void timer_init(struct timer *t, struct clock *c, loop_fn *fn, void *opaque);
void timer_arm(struct timer *t, uint64_t deadline_ns);
/* As loop_unwatch(): after return the callback neither runs nor will run. */
void timer_stop(struct timer *t);

/* A loop that a thread of its own runs (-object iothread). Nothing may be left on it when it is destroyed. */
struct iothread;
int iothread_create(struct iothread **out, struct err *err);
struct loop *iothread_loop(struct iothread *t);
void iothread_destroy(struct iothread *t);

/* Workers: blocking work off the vCPU and loop threads. `done` (may be NULL) runs on `l`'s thread. */
struct workers;
int workers_create(struct workers **out, struct loop *l, unsigned max_threads, struct err *err);
void workers_destroy(struct workers *w);        /* waits for work in flight */
/*
 * From now on threads are started on the loop's thread, not on the one that submits work (a vCPU's: what may call less would
 * hand that on to the worker). Starts one, so that work goes on whatever the loop does.
 */
int workers_spawn_on_loop(struct workers *w);
int workers_submit(struct workers *w, loop_fn *work, loop_fn *done, void *opaque);

#endif
