/* A loop with a thread of its own. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "loop/loop.h"

struct iothread { struct loop *loop; pthread_t thread; };

static void *run(void *opaque)
{
	struct iothread *t = opaque;
	loop_run(t->loop);
	return NULL;
}

int iothread_create(struct iothread **out, struct err *err)
{
	struct iothread *t = calloc(1, sizeof *t);
	sigset_t all, old;
	int r = t ? loop_create(&t->loop, err) : err_set(err, -ENOMEM, "I/O thread: out of memory");
	if (r) {
		free(t);
		return r;
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&t->thread, NULL, run, t);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r) {
		loop_destroy(t->loop);
		free(t);
		return err_set_errno(err, -r, "I/O thread");
	}
	*out = t;
	return 0;
}

struct loop *iothread_loop(struct iothread *t)
{
	return t->loop;
}

void iothread_destroy(struct iothread *t)
{
	if (!t)
		return;
	loop_stop(t->loop, 0);
	pthread_join(t->thread, NULL);
	loop_destroy(t->loop);
	free(t);
}
