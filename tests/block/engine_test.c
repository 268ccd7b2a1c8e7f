/* The engine on top of leaves: io_uring beside threads, limits against a stepped clock, resizing under load. */
#include <errno.h>
#include <fcntl.h>
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
#include "block/driver.h"
#include "block/image.h"
#include "block/throttle.h"
#include "loop/loop.h"

enum { SIZE = 8 << 20, DEPTH = 24, LONGEST = 512 * 512, ENTRIES = 257 };
static char on_disk[] = "/var/tmp/block-engine-XXXXXX", in_memory[] = "/dev/shm/block-engine-XXXXXX", *path = on_disk;

struct bed { struct loop *loop; struct workers *workers; pthread_t thread; struct block *b; bool polled; };

static void *run_loop(void *l) { loop_run(l); return NULL; }

static void bed_open(struct bed *t, struct block_opts o, bool qcow2)
{
	struct err err = { 0 };
	struct image_create c;
	image_create_init(&c);
	c.file = path;
	c.format = qcow2 ? "qcow2" : "raw";
	c.size = SIZE;
	assert_int_equal(image_create(&c, &err), 0);
	o.file = path;
	o.format = c.format;
	t->polled = o.polled;
	assert_int_equal(loop_create(&t->loop, NULL), 0);
	assert_int_equal(workers_create(&t->workers, t->loop, 3, NULL), 0);
	pthread_create(&t->thread, NULL, run_loop, t->loop);
	if (block_open(&t->b, &o, o.polled ? NULL : t->loop, o.polled ? NULL : t->workers, &err))
		fail_msg("%s", err.msg);
}

static void bed_close(struct bed *t)
{
	block_close(t->b);
	workers_destroy(t->workers);
	loop_stop(t->loop, 0);
	pthread_join(t->thread, NULL);
	loop_destroy(t->loop);
}

/* --- many requests at once, each in its own piece of the disk, against an array --- */

struct slot { struct block_req r; struct iovec v[ENTRIES]; uint8_t *buf; uint64_t off; uint8_t fill; pthread_mutex_t *lock; pthread_cond_t *cond; bool busy; };

static void slot_done(struct block_req *r)
{
	struct slot *s = container_of(r, struct slot, r);
	pthread_mutex_lock(s->lock);
	s->busy = false;
	pthread_cond_signal(s->cond);
	pthread_mutex_unlock(s->lock);
}

static void slot_check(struct slot *s, uint8_t *model)
{
	assert_int_equal(s->r.ret, 0);
	if (s->r.op == BLOCK_READ)
		assert_memory_equal(s->buf, model + s->off, s->r.len);
	else if (s->r.op == BLOCK_WRITE)
		memset(model + s->off, s->fill, s->r.len);
	s->r.op = BLOCK_FLUSH;
}

static void slot_start(struct bed *t, struct slot *s, unsigned i, uint8_t *model, bool more)
{
	uint64_t piece = SIZE / DEPTH / 4096 * 4096, len = 512 * (1 + (uint64_t)rand() % (rand() % 4 ? 64 : LONGEST / 512));
	s->off = i * piece + (uint64_t)rand() % ((piece - len) / 512) * 512;
	s->fill = (uint8_t)rand();
	enum block_op op = rand() % 9 ? rand() % 2 ? BLOCK_READ : BLOCK_WRITE : BLOCK_FLUSH;
	memset(s->buf, s->fill, len);
	uint64_t cut = rand() % 3 ? rand() % 3 ? 1024 : 65536 : 512, entry = len < 4 * cut || len > cut * (ENTRIES - 1) ? len : cut;
	int n = 0;
	for (uint64_t at = 0; at < len; at += entry)
		s->v[n++] = (struct iovec){ s->buf + at, MIN(entry, len - at) };
	s->r = (struct block_req){ .op = op, .off = s->off, .len = op == BLOCK_FLUSH ? 0 : len, .iov = s->v, .iovcnt = n, .done = slot_done, .lane = i,
				   .flags = (rand() % 3 ? 0 : BLOCK_REQ_INLINE) | (rand() % 9 ? 0 : BLOCK_REQ_FUA) | (more ? BLOCK_REQ_MORE : 0) };
	s->busy = true;
	block_submit(t->b, &s->r);
}

static void wait_for_one(struct bed *t, pthread_cond_t *cond, pthread_mutex_t *lock)
{
	if (!t->polled) {
		pthread_cond_wait(cond, lock);
		return;
	}
	pthread_mutex_unlock(lock);
	assert_true(block_poll(t->b));
	pthread_mutex_lock(lock);
}

/* Requests in slots [from, to), one at a time in each; `model` is the caller's there. */
static void deep_part(struct bed *t, unsigned rounds, unsigned from, unsigned to, uint8_t *model)
{
	struct slot s[DEPTH] = { 0 };
	pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
	for (unsigned i = from; i < to; i++) {
		assert_int_equal(posix_memalign((void **)&s[i].buf, 4096, LONGEST), 0);
		s[i].lock = &lock;
		s[i].cond = &cond;
		s[i].r.op = BLOCK_FLUSH;
	}
	for (unsigned k = 0; k < rounds; k++) {
		bool more = rand() % 2;
		for (unsigned i = from; i < to; i++) {
			pthread_mutex_lock(&lock);
			bool busy = s[i].busy;
			pthread_mutex_unlock(&lock);
			if (busy)
				continue;
			slot_check(&s[i], model);
			slot_start(t, &s[i], i, model, more);
		}
		block_unplug(t->b);
		pthread_mutex_lock(&lock);
		for (bool idle = false; !idle;) {
			for (unsigned i = from; i < to; i++)
				idle |= !s[i].busy;
			if (!idle)
				wait_for_one(t, &cond, &lock);
		}
		pthread_mutex_unlock(&lock);
	}
	pthread_mutex_lock(&lock);
	for (unsigned i = from; i < to; i++)
		while (s[i].busy)
			wait_for_one(t, &cond, &lock);
	pthread_mutex_unlock(&lock);
	for (unsigned i = from; i < to; i++) {
		slot_check(&s[i], model);
		free(s[i].buf);
	}
}

static void check_all(struct bed *t, const uint8_t *model)
{
	block_drain(t->b);
	int fd = open(path, O_RDWR); /* what is read now comes from the disk */
	assert_int_equal(fdatasync(fd) || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
	close(fd);
	uint8_t *all = malloc(SIZE);
	assert_int_equal(image_read(t->b, 0, all, SIZE), 0);
	assert_memory_equal(all, model, SIZE);
	free(all);
}

static uint8_t model[SIZE];

static void deep(struct bed *t, unsigned rounds)
{
	memset(model, 0, SIZE);
	deep_part(t, rounds, 0, DEPTH, model);
	check_all(t, model);
}

/* One thread that asks for the ends of its requests. */
static void test_polled(void **state)
{
	srand(12);
	for (int aio = AIO_AUTO; aio <= AIO_IO_URING; aio++) {
		for (int variant = 0; variant < 4; variant++) {
			struct bed t;
			bed_open(&t, (struct block_opts){ .cache = variant & 2 ? CACHE_NONE : CACHE_WRITEBACK, .aio = (enum block_aio)aio, .polled = true,
							  .discard_unmap = true }, variant & 1);
			assert_false(block_poll(t.b));
			if (aio == AIO_THREADS)
				assert_false(block_can_poll(t.b, true));
			deep(&t, 100);
			assert_false(block_poll(t.b));
			bed_close(&t);
		}
	}
}

/* --- copies --- */

static void count_end(struct block_req *r)
{
	assert_int_equal(r->ret, 0);
	++*(unsigned *)(uintptr_t)r->priv[3];
}

/* `rounds` of `n` requests of 64 KiB that are under way together. */
static bool copies_after(struct bed *t, enum block_op op, unsigned n, unsigned rounds)
{
	static _Alignas(4096) uint8_t buf[65536];
	struct iovec v = { buf, sizeof buf };
	unsigned ended = 0;
	for (unsigned k = 0; k < rounds; k++) {
		struct block_req r[8];
		for (unsigned i = 0; i < n; i++) {
			r[i] = (struct block_req){ .op = op, .off = i * sizeof buf, .len = sizeof buf, .iov = &v, .iovcnt = 1, .flags = BLOCK_REQ_MORE, .done = count_end };
			r[i].priv[3] = (uintptr_t)&ended;
			block_submit(t->b, &r[i]);
		}
		while (block_poll(t->b))
			;
	}
	assert_int_equal(ended, n * rounds);
	return block_copies(t->b);
}

/* The kernel may have to wait for a page now and then. */
static bool turn_out_as_copies(struct bed *t)
{
	for (int i = 0; i < 100; i++)
		if (copies_after(t, BLOCK_READ, 8, 30))
			return true;
	return false;
}

/* Reads that the page cache has are copies; writes that have to be on the disk are not; one request says nothing. */
static void test_copies(void **state)
{
	for (int qcow2 = 0; qcow2 < 2; qcow2++) {
		struct bed t;
		bed_open(&t, (struct block_opts){ .aio = AIO_IO_URING, .polled = true }, qcow2);
		if (block_can_poll(t.b, true)) {
			assert_int_equal(image_write(t.b, 0, model, SIZE / 2), 0);
			assert_false(copies_after(&t, BLOCK_READ, 1, 100));
			assert_true(turn_out_as_copies(&t));
		}
		bed_close(&t);
	}
	struct bed t;
	bed_open(&t, (struct block_opts){ .aio = AIO_IO_URING, .polled = true, .cache = CACHE_WRITETHROUGH }, false);
	if (block_can_poll(t.b, true)) {
		assert_true(turn_out_as_copies(&t));
		assert_false(copies_after(&t, BLOCK_WRITE, 8, 1));
		assert_false(copies_after(&t, BLOCK_READ, 8, 40)); /* not asked again at once */
		assert_true(turn_out_as_copies(&t));
	}
	bed_close(&t);
}

/* Several queues: each thread submits to its own pieces, while snapshots are made of the whole. */
struct submitter { struct bed *t; unsigned from, to; };

static void *submit_part(void *opaque)
{
	struct submitter *s = opaque;
	deep_part(s->t, 60, s->from, s->to, model);
	return NULL;
}

static void test_queues(void **state)
{
	for (int cache = CACHE_WRITEBACK; cache <= CACHE_NONE; cache++) {
		struct submitter s[3];
		pthread_t th[3];
		struct bed t;
		bed_open(&t, (struct block_opts){ .cache = (enum block_cache)cache, .discard_unmap = true }, true);
		memset(model, 0, SIZE);
		for (unsigned i = 0; i < 3; i++) {
			s[i] = (struct submitter){ &t, i * DEPTH / 3, (i + 1) * DEPTH / 3 };
			pthread_create(&th[i], NULL, submit_part, &s[i]);
		}
		for (unsigned i = 0; i < 4; i++) {
			usleep(2000);
			assert_int_equal(image_snapshot_create(t.b, "s", NULL), 0);
		}
		for (unsigned i = 0; i < 3; i++)
			pthread_join(th[i], NULL);
		check_all(&t, model);
		struct image_check c = { 0 };
		assert_int_equal(image_check(t.b, 0, &c, NULL), 0);
		assert_int_equal(c.corruptions + c.errors, 0);
		bed_close(&t);
	}
}

static void test_deep(void **state)
{
	srand(11);
	for (int aio = AIO_AUTO; aio <= AIO_IO_URING; aio++) {
		for (int variant = 0; variant < 6; variant++) {
			struct bed t;
			bed_open(&t, (struct block_opts){ .aio = (enum block_aio)aio, .cache = variant % 3 == 0 ? CACHE_WRITEBACK : variant % 3 == 1 ? CACHE_NONE : CACHE_WRITETHROUGH },
				 variant >= 3);
			deep(&t, 60);
			bed_close(&t);
		}
	}
}

/* Past the page cache of a file system in memory: copies, which helpers share. */
static void test_in_memory(void **state)
{
	srand(13);
	close(mkstemp(in_memory));
	int fd = open(in_memory, O_RDONLY | O_DIRECT);
	if (fd >= 0) {
		close(fd);
		path = in_memory;
		for (int qcow2 = 0; qcow2 < 2; qcow2++) {
			struct bed t;
			bed_open(&t, (struct block_opts){ .cache = CACHE_NONE }, qcow2);
			const struct block *leaf = qcow2 ? t.b->child : t.b;
			assert_true(leaf->in_memory);
			if (leaf->uring && sysconf(_SC_NPROCESSORS_ONLN) > 1)
				assert_non_null(leaf->copier);
			deep(&t, 100);
			bed_close(&t);
		}
		path = on_disk;
	}
	unlink(in_memory);
	if (fd < 0)
		skip();
}

/* --- many that want a flush --- */

enum { FLUSHERS = 8, FLUSHES = 20 };
static struct { const struct block_driver *real; struct block *b; unsigned begun, ended; } disk; /* atomic; the number of the last flush that ended */

static int slow_flush(struct block *b)
{
	unsigned mine = __atomic_add_fetch(&disk.begun, 1, __ATOMIC_SEQ_CST);
	usleep(2000);
	int r = disk.real->flush(b);
	__atomic_store_n(&disk.ended, mine, __ATOMIC_SEQ_CST); /* one at a time */
	return r;
}

/* NULL, or what went wrong. */
static void *write_and_flush(void *opaque)
{
	static uint8_t buf[4096];
	for (unsigned i = 0; i < FLUSHES; i++) {
		if (image_write(disk.b, (uintptr_t)opaque * 4096, buf, sizeof buf))
			return "write";
		unsigned before = __atomic_load_n(&disk.begun, __ATOMIC_SEQ_CST);
		if (image_flush(disk.b))
			return "flush";
		if (__atomic_load_n(&disk.ended, __ATOMIC_SEQ_CST) <= before)
			return "no flush that began after the write has ended";
	}
	return NULL;
}

/* Whoever waits shares the next one. */
static void test_flushes(void **state)
{
	struct bed t;
	pthread_t th[FLUSHERS];
	void *bad;
	bed_open(&t, (struct block_opts){ 0 }, true);
	assert_int_equal(image_write(t.b, 0, model, FLUSHERS * 4096), 0);
	assert_int_equal(image_flush(t.b), 0);
	struct block *leaf = t.b->child;
	struct block_driver slow = *leaf->drv;
	disk.real = leaf->drv;
	disk.b = t.b;
	slow.flush = slow_flush;
	leaf->drv = &slow;
	for (uintptr_t i = 0; i < FLUSHERS; i++)
		pthread_create(&th[i], NULL, write_and_flush, (void *)i);
	for (unsigned i = 0; i < FLUSHERS; i++) {
		pthread_join(th[i], &bad);
		if (bad)
			fail_msg("%s", (const char *)bad);
	}
	if (disk.begun > FLUSHERS * FLUSHES / 2)
		fail_msg("%u flushes of the disk for %u", disk.begun, FLUSHERS * FLUSHES);
	leaf->drv = disk.real;
	bed_close(&t);
}

/* The completions move to another loop and back. */
static void test_move(void **state)
{
	struct iothread *io;
	struct bed t;
	assert_int_equal(iothread_create(&io, NULL), 0);
	bed_open(&t, (struct block_opts){ .cache = CACHE_NONE }, false);
	assert_int_equal(block_set_loop(t.b, iothread_loop(io), NULL), 0);
	deep(&t, 40);
	assert_int_equal(block_set_loop(t.b, t.loop, NULL), 0);
	bed_close(&t);
	iothread_destroy(io);
}

/* Three I/O threads and three queues, raw and qcow2; then two, then the loop again. */
static void test_lanes(void **state)
{
	for (int qcow2 = 0; qcow2 < 2; qcow2++) {
		struct iothread *io[3];
		struct loop *l[3];
		struct submitter s[3];
		struct bed t;
		pthread_t th[3];
		bed_open(&t, (struct block_opts){ .cache = CACHE_NONE, .aio = AIO_IO_URING }, qcow2);
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(iothread_create(&io[i], NULL), 0);
			l[i] = iothread_loop(io[i]);
		}
		memset(model, 0, SIZE);
		for (unsigned n = 3; n > 1; n--) {
			assert_int_equal(block_set_loops(t.b, l, n, NULL), 0);
			for (unsigned i = 0; i < 3; i++) {
				s[i] = (struct submitter){ &t, i * DEPTH / 3, (i + 1) * DEPTH / 3 };
				pthread_create(&th[i], NULL, submit_part, &s[i]);
			}
			for (unsigned i = 0; i < 3; i++)
				pthread_join(th[i], NULL);
			check_all(&t, model);
		}
		assert_int_equal(block_set_loop(t.b, t.loop, NULL), 0);
		for (unsigned i = 0; i < 3; i++)
			iothread_destroy(io[i]);
		deep_part(&t, 10, 0, DEPTH, model);
		check_all(&t, model);
		bed_close(&t);
	}
}

/* --- limits --- */

static unsigned n_done;
static void count_done(struct block_req *r) { assert_int_equal(r->ret, 0); n_done++; }

static unsigned done_after(struct clock *c, uint64_t ns) { clock_step(c, ns); return n_done; }

static void throttled(const struct throttle_limits *l, struct block_req *r, unsigned n, struct block **b, struct clock **c,
		      struct throttle_group **g)
{
	struct err err = { 0 };
	static uint8_t buf[65536];
	static struct iovec v;
	n_done = 0;
	*c = clock_stepped_create();
	assert_int_equal(throttle_check(l, &err), 0);
	*g = throttle_group_new(l, *c);
	struct block_opts o = { .file = path, .format = "raw", .throttle = *g };
	assert_int_equal(block_open(b, &o, NULL, NULL, &err), 0);
	for (unsigned i = 0; i < n; i++) {
		v = (struct iovec){ buf, 65536 };
		r[i] = (struct block_req){ .op = i % 2 ? BLOCK_READ : BLOCK_WRITE, .len = 65536, .iov = &v, .iovcnt = 1, .done = count_done };
		block_submit(*b, &r[i]);
	}
}

static void throttled_end(struct block *b, struct clock *c, struct throttle_group *g)
{
	block_close(b);
	throttle_group_unref(g);
	clock_stepped_destroy(c);
}

#define SEC 1000000000ull

static void test_limits(void **state)
{
	struct throttle_limits l = { .b[THROTTLE_IOPS_TOTAL].avg = 100 };
	struct block_req r[200];
	struct throttle_group *g;
	struct clock *c;
	struct block *b;
	struct bed t;
	bed_open(&t, (struct block_opts){ 0 }, false);
	bed_close(&t);

	/* Ten operations fit the bucket of a tenth of a second, one more brims it over; then a hundred a second. */
	throttled(&l, r, 200, &b, &c, &g);
	assert_int_equal(n_done, 11);
	assert_in_range(done_after(c, SEC / 2), 60, 62);
	assert_in_range(done_after(c, SEC / 2), 110, 112);
	/* Draining does not wait for the rest. */
	block_drain(b);
	assert_int_equal(n_done, 200);
	throttled_end(b, c, g);

	/* Bytes, one direction: the others pass. */
	l = (struct throttle_limits){ .b[THROTTLE_BPS_WRITE].avg = 65536 * 10 };
	throttled(&l, r, 40, &b, &c, &g);
	assert_in_range(n_done, 21, 22);
	assert_in_range(done_after(c, SEC), 31, 32);
	throttled_end(b, c, g);

	/* A burst: 50 a second for two seconds, then 10 a second. */
	l = (struct throttle_limits){ .b[THROTTLE_IOPS_TOTAL] = { 10, 50, 2 } };
	throttled(&l, r, 200, &b, &c, &g);
	assert_in_range(n_done, 1, 7);
	unsigned two = 0;
	for (int i = 0; i < 200; i++)
		two = done_after(c, SEC / 100);
	assert_in_range(two, 95, 108);
	for (int i = 0; i < 300; i++)
		clock_step(c, SEC / 100);
	assert_in_range(n_done - two, 25, 55);
	/* Other limits at run time. */
	throttle_group_set(g, &(struct throttle_limits){ 0 });
	clock_step(c, SEC / 1000);
	assert_int_equal(n_done, 200);
	throttled_end(b, c, g);
}

static void test_limits_refused(void **state)
{
	struct err err = { 0 };
	struct throttle_limits l = { .b[THROTTLE_BPS_TOTAL].avg = 1, .b[THROTTLE_BPS_READ].avg = 1 };
	assert_int_equal(throttle_check(&l, &err), -EINVAL);
	l = (struct throttle_limits){ .b[THROTTLE_BPS_TOTAL].max = 5 };
	assert_int_equal(throttle_check(&l, &err), -EINVAL);
	l = (struct throttle_limits){ .b[THROTTLE_BPS_TOTAL] = { 10, 5, 0 } };
	assert_int_equal(throttle_check(&l, &err), -EINVAL);
	l = (struct throttle_limits){ .b[THROTTLE_BPS_TOTAL] = { 10, 0, 5 } };
	assert_int_equal(throttle_check(&l, &err), -EINVAL);
	l = (struct throttle_limits){ .op_size = 4096 };
	assert_int_equal(throttle_check(&l, &err), -EINVAL);
}

/* --- resizing --- */

static uint64_t seen;
static void on_resized(void *opaque) { seen = block_length(opaque); }

static void *resizer(void *opaque)
{
	for (unsigned i = 0; i < 20; i++)
		if (block_resize(opaque, SIZE + (i % 5) * 65536, NULL))
			return opaque;
	return NULL;
}

static void test_resize(void **state)
{
	for (int qcow2 = 0; qcow2 < 2; qcow2++) {
		struct bed t;
		pthread_t th;
		void *bad;
		bed_open(&t, (struct block_opts){ 0 }, qcow2);
		block_listen(t.b, &(struct block_listener){ on_resized, t.b });
		pthread_create(&th, NULL, resizer, t.b);
		deep(&t, 60);
		pthread_join(th, &bad);
		assert_null(bad);
		assert_int_equal(seen, SIZE + 4 * 65536);
		assert_int_equal(block_length(t.b), seen);
		assert_int_equal(block_resize(t.b, 1000, NULL), -EINVAL);
		block_listen(t.b, NULL);
		bed_close(&t);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_deep), cmocka_unit_test(test_polled), cmocka_unit_test(test_copies), cmocka_unit_test(test_in_memory), cmocka_unit_test(test_flushes), cmocka_unit_test(test_queues), cmocka_unit_test(test_move), cmocka_unit_test(test_lanes), cmocka_unit_test(test_limits), cmocka_unit_test(test_limits_refused),
		cmocka_unit_test(test_resize),
	};
	close(mkstemp(on_disk));
	int r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(on_disk);
	return r;
}
