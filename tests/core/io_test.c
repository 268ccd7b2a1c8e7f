/* I/O spaces: overlap and priority, splitting, holes, and remapping while other threads dispatch. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "core/io.h"

struct dev { char log[256]; uint8_t fill; };

static uint64_t dev_read(void *opaque, uint64_t off, unsigned size)
{
	struct dev *d = opaque;
	snprintf(d->log + strlen(d->log), sizeof d->log - strlen(d->log), "r%u@%x ", size, (unsigned)off);
	return 0x0101010101010101ull * d->fill;
}

static void dev_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct dev *d = opaque;
	snprintf(d->log + strlen(d->log), sizeof d->log - strlen(d->log), "w%u@%x=%llx ", size, (unsigned)off, (unsigned long long)val);
}

static const struct io_ops any = { dev_read, dev_write, 0, 0 }, narrow = { dev_read, dev_write, 1, 1 },
			   only4 = { dev_read, dev_write, 4, 4 };

static struct io_window win(struct dev *d, const struct io_ops *ops, uint64_t size, int priority)
{
	return (struct io_window){ .name = "w", .ops = ops, .opaque = d, .size = size, .priority = priority };
}

static uint64_t rd(struct io_space *s, uint64_t addr, unsigned len)
{
	uint64_t v = 0;
	io_read(s, addr, &v, len);
	return v;
}

static void test_priority(void **state)
{
	struct io_space *s;
	struct dev a = { .fill = 0xaa }, b = { .fill = 0xbb };
	struct io_window wa = win(&a, &any, 0x100, 0), wb = win(&b, &any, 0x10, 1), wc = win(&b, &any, 0x10, 0);
	assert_int_equal(io_space_create(&s, "ports", 0x10000, NULL), 0);
	assert_int_equal(rd(s, 0, 4), 0xffffffff);
	assert_int_equal(io_map(s, &wa, 0x1000, NULL), 0);
	assert_int_equal(io_map(s, &wb, 0x1040, NULL), 0);
	assert_int_equal(rd(s, 0x103f, 1), 0xaa);
	assert_int_equal(rd(s, 0x1040, 1), 0xbb);
	assert_int_equal(rd(s, 0x104f, 1), 0xbb);
	assert_int_equal(rd(s, 0x1050, 1), 0xaa);
	assert_int_equal(rd(s, 0x103e, 4), 0xbbbbaaaa);
	assert_int_equal(rd(s, 0x10fe, 4), 0xffffaaaa);
	assert_int_equal(rd(s, 0x0ffe, 4), 0xaaaaffff);
	assert_int_equal(rd(s, 0x1100, 1), 0xff);
	assert_int_equal(io_map(s, &wc, 0x10f8, NULL), -EBUSY);
	assert_false(wc.mapped);
	assert_int_equal(io_map(s, &wc, 0xfff1, NULL), -ERANGE);
	assert_int_equal(io_map(s, &wc, UINT64_MAX - 3, NULL), -ERANGE);
	assert_int_equal(io_map(s, &wb, 0x2000, NULL), 0); /* move */
	assert_int_equal(rd(s, 0x1040, 1), 0xaa);
	assert_int_equal(rd(s, 0x2000, 1), 0xbb);
	io_unmap(s, &wa);
	io_unmap(s, &wa);
	assert_int_equal(rd(s, 0x1040, 1), 0xff);
	uint8_t byte = 0;
	assert_false(io_write(s, 0x1040, &byte, 1));
	assert_true(io_write(s, 0x2000, &byte, 1));
	io_space_destroy(s);
}

static void test_sizes(void **state)
{
	struct io_space *s;
	struct dev d = { .fill = 0x11 };
	struct io_window n = win(&d, &narrow, 8, 0), w4 = win(&d, &only4, 16, 0), w = win(&d, &any, 16, 0);
	uint64_t v = 0x8877665544332211;
	assert_int_equal(io_space_create(&s, "mmio", UINT64_MAX, NULL), 0);
	assert_int_equal(io_map(s, &n, 0x100, NULL), 0);
	assert_int_equal(io_map(s, &w4, 0x200, NULL), 0);
	assert_int_equal(io_map(s, &w, 0x300, NULL), 0);
	io_write(s, 0x100, &v, 4);
	assert_string_equal(d.log, "w1@0=11 w1@1=22 w1@2=33 w1@3=44 ");
	d.log[0] = 0;
	io_write(s, 0x200, &v, 8);
	assert_string_equal(d.log, "w4@0=44332211 w4@4=88776655 ");
	d.log[0] = 0;
	assert_int_equal(rd(s, 0x200, 2), 0xffff);    /* narrower than the device takes */
	assert_int_equal(rd(s, 0x202, 4), 0xffffffff);
	assert_string_equal(d.log, "");
	io_write(s, 0x301, &v, 7);
	assert_string_equal(d.log, "w4@1=44332211 w2@5=6655 w1@7=77 ");
	d.log[0] = 0;
	assert_true(rd(s, 0x308, 8) == 0x1111111111111111ull);
	assert_string_equal(d.log, "r8@8 ");
	io_space_destroy(s);
}

/* Random maps against a byte-by-byte model. */
static void test_model(void **state)
{
	enum { N = 24, SPACE = 256 };
	struct io_space *s;
	struct dev d[N];
	struct io_window w[N];
	assert_int_equal(io_space_create(&s, "ports", SPACE, NULL), 0);
	srand(1);
	for (int i = 0; i < N; i++) {
		d[i] = (struct dev){ .fill = (uint8_t)(i + 1) };
		w[i] = win(&d[i], &any, 1 + (uint64_t)rand() % 60, rand() % 4);
	}
	for (int round = 0; round < 500; round++) {
		int k = rand() % N;
		if (rand() % 3)
			io_map(s, &w[k], (uint64_t)rand() % SPACE, NULL);
		else
			io_unmap(s, &w[k]);
		for (uint64_t a = 0; a < SPACE; a++) {
			int best = -1;
			for (int i = 0; i < N; i++) {
				if (w[i].mapped && a - w[i].base < w[i].size && (best < 0 || w[i].priority > w[best].priority))
					best = i;
			}
			assert_int_equal(rd(s, a, 1), best < 0 ? 0xff : best + 1);
		}
		for (int i = 0; i < N; i++)
			d[i].log[0] = 0;
	}
	io_space_destroy(s);
}

struct moving { pthread_mutex_t lock; bool alive; uint64_t calls; };

static uint64_t mv_read(void *opaque, uint64_t off, unsigned size)
{
	struct moving *m = opaque;
	__atomic_fetch_add(&m->calls, 1, __ATOMIC_RELAXED);
	return __atomic_load_n(&m->alive, __ATOMIC_ACQUIRE) ? off : 0xdead;
}

static const struct io_ops mv_ops = { mv_read, NULL, 0, 0 };
struct hammer { struct io_space *s; bool stop; uint64_t hits, wrong; };

static void *hammer(void *arg)
{
	struct hammer *h = arg;
	while (!__atomic_load_n(&h->stop, __ATOMIC_RELAXED)) {
		for (uint64_t base = 0x1000; base <= 0x2000; base += 0x1000) {
			uint16_t v = 0;
			if (io_read(h->s, base + 0x24, &v, 2)) {
				h->hits++;
				h->wrong += v != 0x24;
			}
		}
	}
	return NULL;
}

static void test_concurrent(void **state)
{
	struct hammer h[3] = { 0 };
	pthread_t t[3];
	struct io_space *s;
	assert_int_equal(io_space_create(&s, "mmio", UINT64_MAX, NULL), 0);
	for (int i = 0; i < 3; i++) {
		h[i].s = s;
		pthread_create(&t[i], NULL, hammer, &h[i]);
	}
	for (int round = 0; round < 400; round++) {
		/* freed right after io_unmap(): a late call would be a use after free */
		struct { struct moving m; struct io_window w; } *d = calloc(1, sizeof *d);
		pthread_mutex_init(&d->m.lock, NULL);
		d->m.alive = true;
		d->w = (struct io_window){ .name = "m", .ops = &mv_ops, .opaque = &d->m, .size = 0x100,
					   .lock = round & 1 ? &d->m.lock : NULL };
		assert_int_equal(io_map(s, &d->w, 0x1000, NULL), 0);
		usleep(50);
		assert_int_equal(io_map(s, &d->w, 0x2000, NULL), 0);
		if (round % 8 == 0)
			usleep(50);
		io_unmap(s, &d->w);
		__atomic_store_n(&d->m.alive, false, __ATOMIC_RELEASE);
		pthread_mutex_destroy(&d->m.lock);
		memset(d, 0x5a, sizeof *d);
		free(d);
	}
	uint64_t hits = 0;
	for (int i = 0; i < 3; i++) {
		__atomic_store_n(&h[i].stop, true, __ATOMIC_RELAXED);
		pthread_join(t[i], NULL);
		hits += h[i].hits;
		assert_int_equal(h[i].wrong, 0);
	}
	assert_true(hits > 0);
	io_space_destroy(s);
}

/* A handler that moves another window while holding its lock, from two threads: must not lock up. */
struct mover { struct io_space *s; struct io_window *target; pthread_mutex_t *lock; unsigned n; };

static void mover_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct mover *m = opaque;
	pthread_mutex_lock(m->lock);
	io_unmap(m->s, m->target);
	io_map(m->s, m->target, m->n++ & 1 ? 0x1000 : 0x2000, NULL);
	pthread_mutex_unlock(m->lock);
}

static void *move_many(void *arg)
{
	uint32_t v = 0;
	for (int i = 0; i < 300; i++)
		io_write(arg, 0x9000, &v, 4);
	return NULL;
}

static void test_move_inside_handler(void **state)
{
	static const struct io_ops ops = { NULL, mover_write, 0, 0 };
	struct io_space *s;
	pthread_t t[2], ht;
	struct moving m = { .alive = true };
	pthread_mutex_init(&m.lock, NULL);
	assert_int_equal(io_space_create(&s, "mmio", UINT64_MAX, NULL), 0);
	struct io_window w = { .name = "bar", .ops = &mv_ops, .opaque = &m, .size = 0x100, .lock = &m.lock };
	struct mover mv = { s, &w, &m.lock, 0 };
	struct io_window cfg = { .name = "cfg", .ops = &ops, .opaque = &mv, .size = 4 };
	struct hammer h = { .s = s };
	io_map(s, &w, 0x1000, NULL);
	io_map(s, &cfg, 0x9000, NULL);
	pthread_create(&ht, NULL, hammer, &h);
	for (int i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, move_many, s);
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	__atomic_store_n(&h.stop, true, __ATOMIC_RELAXED);
	pthread_join(ht, NULL);
	assert_int_equal(h.wrong, 0);
	io_space_destroy(s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_priority), cmocka_unit_test(test_sizes), cmocka_unit_test(test_model),
		cmocka_unit_test(test_concurrent), cmocka_unit_test(test_move_inside_handler),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
