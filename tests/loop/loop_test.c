/* Event loop, stepped and host clocks, workers. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <cmocka.h>

#include "loop/loop.h"

static char order[64];
static unsigned norder;
struct ctx { struct clock *c; struct timer t; char name; uint64_t again; int count; uint64_t seen; };

static void fire(void *opaque)
{
	struct ctx *x = opaque;
	order[norder++] = x->name;
	order[norder] = 0;
	x->count++;
	x->seen = clock_now(x->c);
	if (x->again)
		timer_arm(&x->t, x->seen + x->again);
}

static void test_stepped(void **state)
{
	struct clock *c = clock_stepped_create();
	struct ctx a = { c, .name = 'a' }, b = { c, .name = 'b' }, p = { c, .name = 'p', .again = 10 };
	timer_init(&a.t, c, fire, &a);
	timer_init(&b.t, c, fire, &b);
	timer_init(&p.t, c, fire, &p);
	norder = 0;
	timer_arm(&b.t, 25);
	timer_arm(&a.t, 5);
	timer_arm(&p.t, 10);
	clock_step(c, 4);
	assert_int_equal(norder, 0);
	clock_step(c, 31);
	assert_string_equal(order, "appbp");
	assert_int_equal(p.seen, 30);
	assert_int_equal(b.seen, 25);
	assert_int_equal(clock_now(c), 35);
	timer_stop(&p.t);
	timer_arm(&a.t, 1); /* in the past: fires at the next step, time does not run backwards */
	clock_step(c, 0);
	assert_int_equal(a.seen, 35);
	timer_arm(&a.t, 50);
	timer_arm(&a.t, 40); /* arming again moves it */
	clock_step(c, 5);
	assert_int_equal(a.count, 3);
	clock_step(c, 100);
	assert_int_equal(a.count, 3);
	clock_stepped_destroy(c);
}

struct io { struct loop *l; int got; struct loop_watch *w; };

static void readable(void *opaque, int fd, unsigned events)
{
	struct io *io = opaque;
	char c;
	ssize_t n = read(fd, &c, 1);
	if (n == 1) {
		io->got += c;
		return;
	}
	loop_unwatch(io->w); /* from its own callback */
	loop_stop(io->l, 7);
}

static void test_fd(void **state)
{
	struct io io = { 0 };
	int p[2];
	assert_int_equal(loop_create(&io.l, NULL), 0);
	assert_int_equal(pipe(p), 0);
	io.w = loop_watch_fd(io.l, p[0], LOOP_IN, readable, &io);
	assert_non_null(io.w);
	assert_int_equal(write(p[1], "\1\2", 2), 2);
	close(p[1]);
	assert_int_equal(loop_run(io.l), 7);
	assert_int_equal(io.got, 3);
	close(p[0]);
	loop_destroy(io.l);
}

static void test_regular_file(void **state)
{
	struct io io = { 0 };
	char name[] = "/tmp/loop-test-XXXXXX";
	int fd = mkstemp(name);
	unlink(name);
	assert_int_equal(write(fd, "\4\5", 2), 2);
	lseek(fd, 0, SEEK_SET);
	assert_int_equal(loop_create(&io.l, NULL), 0);
	io.w = loop_watch_fd(io.l, fd, LOOP_IN, readable, &io);
	assert_non_null(io.w);
	assert_int_equal(loop_run(io.l), 7);
	assert_int_equal(io.got, 9);
	close(fd);
	loop_destroy(io.l);
}

static void stop9(void *opaque)
{
	loop_stop(opaque, 9);
}

static void *runner(void *l)
{
	return (void *)(intptr_t)loop_run(l);
}

static void test_host_timer(void **state)
{
	struct loop *l;
	struct timer t;
	assert_int_equal(loop_create(&l, NULL), 0);
	timer_init(&t, clock_host(l), stop9, l);
	uint64_t start = clock_now(clock_host(l));
	timer_arm(&t, start + 3000000);
	assert_int_equal(loop_run(l), 9);
	assert_true(clock_now(clock_host(l)) - start >= 3000000);

	/* armed from another thread while the loop sleeps */
	pthread_t th;
	void *ret;
	pthread_create(&th, NULL, runner, l);
	usleep(2000);
	timer_arm(&t, 0);
	pthread_join(th, &ret);
	assert_int_equal((intptr_t)ret, 9);
	loop_destroy(l);
}

struct churn { int fd[2]; int calls; int alive; };
static void churn_cb(void *opaque, int fd, unsigned events)
{
	struct churn *c = opaque;
	assert_true(__atomic_load_n(&c->alive, __ATOMIC_ACQUIRE));
	c->calls++;
}

static void test_unwatch_other_thread(void **state)
{
	struct loop *l;
	pthread_t th;
	assert_int_equal(loop_create(&l, NULL), 0);
	pthread_create(&th, NULL, runner, l);
	struct churn c = { 0 };
	assert_int_equal(pipe(c.fd), 0);
	assert_int_equal(write(c.fd[1], "x", 1), 1); /* stays readable */
	for (int i = 0; i < 300; i++) {
		__atomic_store_n(&c.alive, 1, __ATOMIC_RELEASE);
		struct loop_watch *w = loop_watch_fd(l, c.fd[0], LOOP_IN, churn_cb, &c);
		assert_non_null(w);
		if (i % 3 == 0)
			usleep(50);
		loop_watch_set(w, i & 1 ? LOOP_IN : 0);
		loop_unwatch(w);
		__atomic_store_n(&c.alive, 0, __ATOMIC_RELEASE);
	}
	loop_post(l, stop9, l);
	pthread_join(th, NULL);
	close(c.fd[0]);
	close(c.fd[1]);
	loop_destroy(l);
}

struct job { struct loop *l; int worked, done, *left; };
static void work(void *opaque)
{
	struct job *j = opaque;
	usleep(200);
	j->worked = 1;
}
static void done(void *opaque)
{
	struct job *j = opaque;
	j->done = j->worked && loop_on_thread(j->l);
	if (!--*j->left)
		loop_stop(j->l, 0);
}

static void test_workers(void **state)
{
	enum { N = 50 };
	struct job j[N] = { 0 };
	struct loop *l;
	struct workers *w;
	int left = N;
	assert_int_equal(loop_create(&l, NULL), 0);
	assert_int_equal(workers_create(&w, l, 4, NULL), 0);
	for (int i = 0; i < N; i++) {
		j[i].l = l;
		j[i].left = &left;
		assert_int_equal(workers_submit(w, work, done, &j[i]), 0);
	}
	assert_int_equal(loop_run(l), 0);
	for (int i = 0; i < N; i++)
		assert_true(j[i].done);
	struct job last = { .l = l };
	assert_int_equal(workers_submit(w, work, NULL, &last), 0);
	workers_destroy(w);
	assert_true(last.worked);
	loop_destroy(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stepped), cmocka_unit_test(test_fd), cmocka_unit_test(test_regular_file),
		cmocka_unit_test(test_host_timer), cmocka_unit_test(test_unwatch_other_thread), cmocka_unit_test(test_workers),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
