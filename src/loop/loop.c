/*
 * The event loop: epoll, an eventfd to wake it, a list of posted functions, one clock.
 *
 * A watch can be removed by any thread while the loop holds its pointer in a batch of events. So
 * loop_unwatch() only marks it dead, waits for a callback that runs right now, and leaves freeing to
 * the loop's thread between two batches.
 *
 * epoll refuses regular files and some devices; poll() calls them always ready, and so does this
 * loop: such a watch is kept on a list of its own and fires each round.
 */
#include "loop/loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "loop/internal.h"

struct loop_watch {
	struct loop *loop;
	int fd;
	unsigned events;
	loop_fd_fn *fn;
	void *opaque;
	bool in_epoll, always, dead;
	struct loop_watch *next, *prev; /* all watches, or the graveyard */
};

struct loop {
	int epfd, wakefd;
	pthread_mutex_t lock;
	pthread_cond_t idle;
	struct loop_watch *watches, *graves;
	struct loop_watch *current;     /* its callback runs now */
	unsigned always;                /* live watches that epoll refused */
	struct post *posts, **posts_tail, *batch;
	bool running, stop, woken, no_pwait2;
	int status;
	pthread_t thread;
	struct clock clock;
};

int loop_create(struct loop **out, struct err *err)
{
	struct loop *l = calloc(1, sizeof *l);
	if (!l)
		return err_set(err, -ENOMEM, "event loop: out of memory");
	l->epfd = epoll_create1(EPOLL_CLOEXEC);
	l->wakefd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	struct epoll_event ev = { .events = EPOLLIN, .data.ptr = NULL };
	if (l->epfd < 0 || l->wakefd < 0 || epoll_ctl(l->epfd, EPOLL_CTL_ADD, l->wakefd, &ev)) {
		int r = -errno;
		if (l->epfd >= 0)
			close(l->epfd);
		if (l->wakefd >= 0)
			close(l->wakefd);
		free(l);
		return err_set_errno(err, r, "event loop");
	}
	pthread_mutex_init(&l->lock, NULL);
	pthread_cond_init(&l->idle, NULL);
	l->posts_tail = &l->posts;
	clock_init(&l->clock, l);
	*out = l;
	return 0;
}

static void free_list(struct loop_watch *w)
{
	while (w) {
		struct loop_watch *next = w->next;
		free(w);
		w = next;
	}
}

void loop_destroy(struct loop *l)
{
	if (!l)
		return;
	free_list(l->watches);
	free_list(l->graves);
	while (l->posts) {
		struct post *p = l->posts;
		l->posts = p->next;
		free(p);
	}
	close(l->epfd);
	close(l->wakefd);
	clock_fini(&l->clock);
	pthread_mutex_destroy(&l->lock);
	pthread_cond_destroy(&l->idle);
	free(l);
}

struct clock *clock_host(struct loop *l)
{
	return &l->clock;
}

static bool on_thread(struct loop *l)
{
	return l->running && pthread_equal(l->thread, pthread_self());
}

bool loop_on_thread(struct loop *l)
{
	pthread_mutex_lock(&l->lock);
	bool r = on_thread(l);
	pthread_mutex_unlock(&l->lock);
	return r;
}

static void wake_locked(struct loop *l)
{
	if (l->woken || on_thread(l))
		return;
	l->woken = true;
	uint64_t one = 1;
	while (write(l->wakefd, &one, sizeof one) < 0 && errno == EINTR)
		;
}

void loop_wake(struct loop *l)
{
	pthread_mutex_lock(&l->lock);
	wake_locked(l);
	pthread_mutex_unlock(&l->lock);
}

void loop_stop(struct loop *l, int status)
{
	pthread_mutex_lock(&l->lock);
	if (!l->stop)
		l->status = status;
	l->stop = true;
	wake_locked(l);
	pthread_mutex_unlock(&l->lock);
}

void loop_post_node(struct loop *l, struct post *p)
{
	p->next = NULL;
	pthread_mutex_lock(&l->lock);
	*l->posts_tail = p;
	l->posts_tail = &p->next;
	wake_locked(l);
	pthread_mutex_unlock(&l->lock);
}

void loop_post(struct loop *l, loop_fn *fn, void *opaque)
{
	struct post *p;
	while (!(p = malloc(sizeof *p)))
		usleep(1000); /* a lost post would be a lost completion */
	p->fn = fn;
	p->opaque = opaque;
	loop_post_node(l, p);
}

void loop_cancel(struct loop *l, loop_fn *fn, void *opaque)
{
	pthread_mutex_lock(&l->lock);
	for (int i = 0; i < 2; i++) {
		for (struct post *p = i ? l->batch : l->posts; p; p = p->next) {
			if (p->fn == fn && p->opaque == opaque)
				p->fn = NULL;
		}
	}
	pthread_mutex_unlock(&l->lock);
}

static uint32_t to_epoll(unsigned events)
{
	return (events & LOOP_IN ? EPOLLIN : 0) | (events & LOOP_OUT ? EPOLLOUT : 0);
}

/* Make epoll agree with w->events. A paused watch leaves epoll, which would report hang-ups for ever. */
static int sync_epoll(struct loop_watch *w)
{
	struct loop *l = w->loop;
	struct epoll_event ev = { .events = to_epoll(w->events), .data.ptr = w };
	if (w->always)
		return 0;
	if (!w->events) {
		if (w->in_epoll)
			epoll_ctl(l->epfd, EPOLL_CTL_DEL, w->fd, NULL);
		w->in_epoll = false;
		return 0;
	}
	if (!epoll_ctl(l->epfd, w->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, w->fd, &ev)) {
		w->in_epoll = true;
		return 0;
	}
	if (w->in_epoll && errno == ENOENT) { /* closed and opened again behind our back */
		w->in_epoll = !epoll_ctl(l->epfd, EPOLL_CTL_ADD, w->fd, &ev);
		return w->in_epoll ? 0 : -errno;
	}
	if (errno != EPERM)
		return -errno;
	w->always = true;
	l->always++;
	wake_locked(l);
	return 0;
}

struct loop_watch *loop_watch_fd(struct loop *l, int fd, unsigned events, loop_fd_fn *fn, void *opaque)
{
	struct loop_watch *w = calloc(1, sizeof *w);
	if (!w)
		return NULL;
	*w = (struct loop_watch){ .loop = l, .fd = fd, .events = events, .fn = fn, .opaque = opaque };
	pthread_mutex_lock(&l->lock);
	int r = sync_epoll(w);
	if (!r) {
		w->next = l->watches;
		if (w->next)
			w->next->prev = w;
		l->watches = w;
	}
	pthread_mutex_unlock(&l->lock);
	if (r) {
		free(w);
		errno = -r;
		return NULL;
	}
	return w;
}

void loop_watch_set(struct loop_watch *w, unsigned events)
{
	struct loop *l = w->loop;
	pthread_mutex_lock(&l->lock);
	if (w->events != events) {
		w->events = events;
		sync_epoll(w);
		if (w->always)
			wake_locked(l);
	}
	pthread_mutex_unlock(&l->lock);
}

void loop_unwatch(struct loop_watch *w)
{
	if (!w)
		return;
	struct loop *l = w->loop;
	pthread_mutex_lock(&l->lock);
	w->events = 0;
	sync_epoll(w);
	if (w->always)
		l->always--;
	w->dead = true;
	if (w->prev)
		w->prev->next = w->next;
	else
		l->watches = w->next;
	if (w->next)
		w->next->prev = w->prev;
	while (l->current == w && !on_thread(l))
		pthread_cond_wait(&l->idle, &l->lock);
	w->prev = NULL;
	w->next = l->graves;
	l->graves = w;
	pthread_mutex_unlock(&l->lock);
}

/* Called and returns with the lock held; drops it around the callback. */
static void call_watch(struct loop *l, struct loop_watch *w, unsigned events)
{
	if (w->dead || !w->events)
		return;
	events &= w->events | LOOP_HUP;
	if (!events)
		return;
	l->current = w;
	pthread_mutex_unlock(&l->lock);
	w->fn(w->opaque, w->fd, events);
	pthread_mutex_lock(&l->lock);
	l->current = NULL;
	pthread_cond_broadcast(&l->idle);
}

static unsigned from_epoll(uint32_t e)
{
	unsigned events = (e & EPOLLIN ? LOOP_IN : 0) | (e & EPOLLOUT ? LOOP_OUT : 0);
	if (e & (EPOLLERR | EPOLLHUP)) /* whoever waits finds out by reading or writing */
		events |= LOOP_HUP | LOOP_IN | LOOP_OUT;
	return events;
}

static void run_posts(struct loop *l)
{
	struct post *p;
	l->batch = l->posts; /* what they post in turn waits for the next round */
	l->posts = NULL;
	l->posts_tail = &l->posts;
	while ((p = l->batch)) {
		l->batch = p->next;
		pthread_mutex_unlock(&l->lock);
		if (p->fn)
			p->fn(p->opaque);
		free(p);
		pthread_mutex_lock(&l->lock);
	}
}

static void run_always(struct loop *l)
{
	/* A callback may remove any watch; those are still on the graveyard when we step on. */
	for (struct loop_watch *w = l->watches, *next; w; w = next) {
		if (w->always)
			call_watch(l, w, LOOP_IN | LOOP_OUT);
		next = w->dead ? l->watches : w->next;
		if (w->dead)
			break; /* the rest has its turn in the next round */
	}
}

static bool always_ready(struct loop *l)
{
	if (!l->always)
		return false;
	for (struct loop_watch *w = l->watches; w; w = w->next) {
		if (w->always && w->events)
			return true;
	}
	return false;
}

static int wait_events(struct loop *l, struct epoll_event *ev, int max, uint64_t timeout)
{
	if (!l->no_pwait2) {
		struct timespec ts = { (time_t)(timeout / 1000000000u), (long)(timeout % 1000000000u) };
		int n = epoll_pwait2(l->epfd, ev, max, timeout == UINT64_MAX ? NULL : &ts, NULL);
		if (n >= 0 || errno != ENOSYS)
			return n;
		l->no_pwait2 = true; /* before Linux 5.11 */
	}
	int ms = timeout == UINT64_MAX ? -1 : timeout / 1000000 > 3600000 ? 3600000 : (int)((timeout + 999999) / 1000000);
	return epoll_wait(l->epfd, ev, max, ms);
}

/* One round; the lock is held on entry and on return. */
static void round_once(struct loop *l)
{
	struct epoll_event ev[32];
	free_list(l->graves);
	l->graves = NULL;
	bool poll_only = l->posts || always_ready(l);
	pthread_mutex_unlock(&l->lock);

	uint64_t timeout = poll_only ? 0 : clock_next(&l->clock);
	if (timeout && timeout != UINT64_MAX) {
		uint64_t now = clock_now(&l->clock);
		timeout = timeout > now ? timeout - now : 0;
	}
	int n = wait_events(l, ev, 32, timeout);
	clock_fire(&l->clock, clock_now(&l->clock));

	pthread_mutex_lock(&l->lock);
	for (int i = 0; i < n; i++) {
		struct loop_watch *w = ev[i].data.ptr;
		uint64_t v;
		if (w)
			call_watch(l, w, from_epoll(ev[i].events));
		else if (read(l->wakefd, &v, sizeof v) == sizeof v)
			l->woken = false;
	}
	if (l->always)
		run_always(l);
	if (l->posts)
		run_posts(l);
}

int loop_run(struct loop *l)
{
	pthread_mutex_lock(&l->lock);
	l->thread = pthread_self();
	l->running = true;
	while (!l->stop)
		round_once(l);
	l->running = l->stop = false;
	int status = l->status;
	pthread_mutex_unlock(&l->lock);
	return status;
}
