/* Worker threads: started when there is work and nobody idle, small stacks, all signals blocked. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "loop/internal.h"

enum { WORKER_STACK = 256 * 1024 };

struct work {
	struct post post;       /* first: the loop frees it after `done` ran */
	struct work *next;
	loop_fn *work, *done;
	void *opaque;
};

struct workers {
	struct loop *loop;
	pthread_mutex_t lock;
	pthread_cond_t more, gone;
	struct work *head, **tail;
	unsigned max, threads, idle, queued;
	bool stop, by_loop, asked;      /* by_loop: threads are started on the loop's; asked: to start one */
};

int workers_create(struct workers **out, struct loop *l, unsigned max_threads, struct err *err)
{
	struct workers *w = calloc(1, sizeof *w);
	if (!w)
		return err_set(err, -ENOMEM, "worker threads: out of memory");
	w->loop = l;
	w->max = max_threads ? max_threads : 1;
	w->tail = &w->head;
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->more, NULL);
	pthread_cond_init(&w->gone, NULL);
	*out = w;
	return 0;
}

static void run_one(struct workers *w, struct work *k)
{
	k->work(k->opaque);
	if (k->done && w->loop) {
		k->post.fn = k->done;
		k->post.opaque = k->opaque;
		loop_post_node(w->loop, &k->post);
		return;
	}
	if (k->done)
		k->done(k->opaque);
	free(k);
}

static void *worker(void *arg)
{
	struct workers *w = arg;
	pthread_mutex_lock(&w->lock);
	for (;;) {
		while (!w->head && !w->stop) {
			w->idle++;
			pthread_cond_wait(&w->more, &w->lock);
			w->idle--;
		}
		struct work *k = w->head;
		if (!k)
			break; /* stopping, and the queue is empty */
		w->head = k->next;
		if (!w->head)
			w->tail = &w->head;
		w->queued--;
		pthread_mutex_unlock(&w->lock);
		run_one(w, k);
		pthread_mutex_lock(&w->lock);
	}
	w->threads--;
	pthread_cond_broadcast(&w->gone);
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

static int spawn(struct workers *w)
{
	pthread_attr_t a;
	sigset_t all, old;
	pthread_t t;
	pthread_attr_init(&a);
	pthread_attr_setstacksize(&a, WORKER_STACK);
	pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = pthread_create(&t, &a, worker, w);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&a);
	if (!r)
		w->threads++;
	return -r;
}

/* On the loop's thread: one more, if there is still work for it. */
static void spawn_asked(void *opaque)
{
	struct workers *w = opaque;
	pthread_mutex_lock(&w->lock);
	w->asked = false;
	if (!w->stop && w->queued > w->idle && w->threads < w->max)
		spawn(w);
	pthread_mutex_unlock(&w->lock);
}

/* The lock is held. 0 when somebody will do the work that is about to be queued. */
static int more_threads(struct workers *w)
{
	int r = 0;
	if (!w->by_loop || loop_on_thread(w->loop)) {
		r = spawn(w);
	} else if (!w->asked) {
		w->asked = true;
		loop_post(w->loop, spawn_asked, w);
	}
	return w->threads ? 0 : r; /* slower, but it gets done */
}

int workers_spawn_on_loop(struct workers *w)
{
	pthread_mutex_lock(&w->lock);
	int r = w->threads ? 0 : spawn(w);
	w->by_loop = !r;
	pthread_mutex_unlock(&w->lock);
	return r;
}

int workers_submit(struct workers *w, loop_fn *work, loop_fn *done, void *opaque)
{
	struct work *k = calloc(1, sizeof *k);
	if (!k)
		return -ENOMEM;
	k->work = work;
	k->done = done;
	k->opaque = opaque;
	pthread_mutex_lock(&w->lock);
	int r = w->stop ? -ESHUTDOWN : 0;
	if (!r && w->queued >= w->idle && w->threads < w->max)
		r = more_threads(w);
	if (!r) {
		*w->tail = k;
		w->tail = &k->next;
		w->queued++;
		pthread_cond_signal(&w->more);
	}
	pthread_mutex_unlock(&w->lock);
	if (r)
		free(k);
	return r;
}

void workers_destroy(struct workers *w)
{
	if (!w)
		return;
	pthread_mutex_lock(&w->lock);
	w->stop = true;
	pthread_cond_broadcast(&w->more);
	while (w->threads)
		pthread_cond_wait(&w->gone, &w->lock);
	pthread_mutex_unlock(&w->lock);
	if (w->by_loop)
		loop_cancel(w->loop, spawn_asked, w);
	pthread_mutex_destroy(&w->lock);
	pthread_cond_destroy(&w->more);
	pthread_cond_destroy(&w->gone);
	free(w);
}
