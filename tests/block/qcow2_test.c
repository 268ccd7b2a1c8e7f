/*
 * qcow2 against a model: random operations, power cuts at every point, errors at every call.
 *
 * usage: test-qcow2 [--ops N] [--crashes N] [--seed S]
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/log.h"
#include "block/qcow2.h"
#include "fault.h"

enum { MAX_SIZE = 1 << 20, SNAPS = 3 };

static unsigned long nops = 6000, ncrashes = 500;
static unsigned seed0 = 1;
static char path[] = "/var/tmp/qcow2-test-XXXXXX";

struct shape { uint32_t cluster, refbits; unsigned version; bool ext; };
static const struct shape shapes[] = {
	{ 512, 16, 3, false }, { 4096, 16, 3, false }, { 65536, 16, 2, false }, { 16384, 8, 3, true }, { 512, 64, 3, false },
	{ 1024, 1, 3, false }, { 65536, 16, 3, true }, { 4096, 4, 3, false },
};

static uint8_t *load(const char *file, uint64_t *len)
{
	FILE *f = fopen(file, "rb");
	assert_non_null(f);
	fseek(f, 0, SEEK_END);
	*len = (uint64_t)ftell(f);
	rewind(f);
	uint8_t *p = malloc(*len + 1);
	assert_int_equal(fread(p, 1, *len, f), *len);
	fclose(f);
	return p;
}

static uint8_t *new_image(const struct shape *s, uint64_t size, uint64_t *len)
{
	struct image_create c;
	struct err e = { 0 };
	image_create_init(&c);
	c.file = path;
	c.format = "qcow2";
	c.size = size;
	c.cluster_size = s->cluster;
	c.refcount_bits = s->refbits;
	c.version = s->version;
	c.extended_l2 = s->ext;
	if (image_create(&c, &e))
		fail_msg("%s", e.msg);
	return load(path, len);
}

/* qcow2 over a leaf; on failure the leaf is gone. */
static struct block *open_over(struct block *leaf, bool read_only, struct err *e)
{
	struct block_opts o = { .file = "image", .read_only = read_only, .discard_unmap = true };
	struct block *b = block_new(&o, NULL, NULL);
	b->child = leaf;
	if (!qcow2_open(b, &o, 0, e))
		return b;
	block_free(b);
	return NULL;
}

static struct block *open_ok(struct block *leaf)
{
	struct err e = { 0 };
	struct block *b = open_over(leaf, false, &e);
	if (!b)
		fail_msg("open: %s", e.msg);
	return b;
}

static void say(void *opaque, const char *line)
{
	(void)opaque;
	fprintf(stderr, "  %s\n", line);
}

static void check_clean(struct block *b, bool leaks_ok, const char *what)
{
	struct image_check c = { 0 }, again = { .say = say };
	struct err e = { 0 };
	if (image_check(b, 0, &c, &e))
		fail_msg("%s: check: %s", what, e.msg);
	if (c.corruptions || c.errors || (c.leaks && !leaks_ok)) {
		image_check(b, 0, &again, &e);
		fail_msg("%s: %llu corruptions, %llu errors, %llu leaks", what, (unsigned long long)c.corruptions, (unsigned long long)c.errors,
			 (unsigned long long)c.leaks);
	}
}

/* --- the model --- */

struct model { uint8_t *now; uint64_t size; struct { uint8_t *data; uint64_t size; } snap[SNAPS]; unsigned nsnaps; unsigned seed; };

static unsigned rnd(struct model *m, unsigned n)
{
	return (unsigned)rand_r(&m->seed) % n;
}

static void range(struct model *m, uint64_t *off, uint64_t *len)
{
	static const unsigned lens[] = { 512, 1024, 4096, 16384, 70144, 262144 };
	*len = MIN((uint64_t)lens[rnd(m, 6)], m->size);
	*off = rnd(m, (unsigned)((m->size - *len) / 512 + 1)) * 512ull;
	if (rnd(m, 2))
		*off = MIN(ALIGN_DOWN(*off, 65536ull), m->size - *len);
}

static int do_write(struct model *m, struct block *b, uint64_t off, uint64_t len)
{
	uint8_t *buf = malloc(len);
	unsigned v = rnd(m, 1 << 20);
	for (uint64_t i = 0; i < len; i += 4)
		memcpy(buf + i, &(unsigned){ v + (unsigned)(off + i) / 4 * 7 }, 4);
	int r = image_write(b, off, buf, len);
	if (!r)
		memcpy(m->now + off, buf, len);
	free(buf);
	return r;
}

static int do_compressed(struct model *m, struct block *b)
{
	uint32_t cs = b->qcow2->cs;
	uint64_t off = ALIGN_DOWN((uint64_t)rnd(m, (unsigned)m->size), (uint64_t)cs), len = MIN((uint64_t)cs, m->size - off);
	uint8_t *buf = malloc(len);
	memset(buf, (int)rnd(m, 256), len);
	buf[rnd(m, (unsigned)len)] ^= 1;
	int r = image_write_compressed(b, off, buf, len);
	if (!r)
		memcpy(m->now + off, buf, len);
	free(buf);
	return r;
}

static int do_resize(struct model *m, struct block *b)
{
	uint64_t size = (rnd(m, MAX_SIZE / 512 - 600) + 600) * 512ull;
	struct err e = { 0 };
	if (b->qcow2->h.version < 3 && m->nsnaps)
		return 0;
	int r = image_resize(b, size, PREALLOC_OFF, &e);
	if (!r) {
		if (size > m->size)
			memset(m->now + m->size, 0, size - m->size);
		m->size = size;
	}
	return r;
}

static int do_snapshot(struct model *m, struct block *b)
{
	char name[16];
	struct err e = { 0 };
	unsigned k = m->nsnaps ? rnd(m, m->nsnaps) : 0, what = rnd(m, 3);
	if (b->qcow2->ref_bits < 4)
		return 0;
	if (what == 0 && m->nsnaps < SNAPS) {
		snprintf(name, sizeof name, "s%u", m->nsnaps);
		int r = image_snapshot_create(b, name, &e);
		if (r == -EINVAL && b->qcow2->ref_bits == 4 && strstr(e.msg, "refcount bits"))
			return 0; /* a cluster holds several compressed ones, and each snapshot counts them all */
		if (r)
			return r;
		m->snap[m->nsnaps].data = malloc(MAX_SIZE);
		memcpy(m->snap[m->nsnaps].data, m->now, m->size);
		m->snap[m->nsnaps++].size = m->size;
	} else if (what == 1 && m->nsnaps) {
		snprintf(name, sizeof name, "s%u", k);
		int r = image_snapshot_apply(b, name, &e);
		if (r)
			return r;
		m->size = m->snap[k].size;
		memcpy(m->now, m->snap[k].data, m->size);
	} else if (what == 2 && m->nsnaps) {
		snprintf(name, sizeof name, "s%u", m->nsnaps - 1);
		int r = image_snapshot_delete(b, name, &e);
		if (r)
			return r;
		free(m->snap[--m->nsnaps].data);
	}
	return 0;
}

/* To the other version and back; what version 2 cannot say is refused. */
static int do_amend(struct block *b)
{
	const struct qcow2 *q = b->qcow2;
	struct image_amend a = { .set_version = true, .version = q->h.version == 2 ? 3 : 2 };
	struct err e = { 0 };
	bool may = q->ref_bits == 16 && q->nsub == 1;
	for (unsigned i = 0; i < q->nsnaps; i++)
		may &= q->snaps[i].s.disk_size == q->h.size;
	int r = image_amend(b, &a, &e);
	return r == -ENOTSUP && !may ? 0 : r;
}

static int step(struct model *m, struct block *b, bool shapes_too)
{
	uint64_t off, len;
	unsigned what = rnd(m, 100);
	int r = 0;
	range(m, &off, &len);
	if (what < 55)
		return do_write(m, b, off, len);
	if (what < 65) {
		r = image_zero(b, off, len, what & 1);
		if (!r)
			memset(m->now + off, 0, len);
	} else if (what < 75) {
		/* What a discard does not take is unchanged; what it takes reads as zeroes: look which. */
		uint8_t *buf = malloc(len);
		r = image_discard(b, off, len);
		if (!r)
			r = image_read(b, off, buf, len);
		for (uint64_t i = 0; !r && i < len; i += 512) {
			static const uint8_t zero[512];
			if (memcmp(buf + i, m->now + off + i, 512)) {
				assert_memory_equal(buf + i, zero, 512);
				memset(m->now + off + i, 0, 512);
			}
		}
		free(buf);
	} else if (what < 85) {
		return do_compressed(m, b);
	} else if (what < 92 || !shapes_too) {
		r = image_flush(b);
	} else if (what < 96) {
		return do_snapshot(m, b);
	} else if (what < 98) {
		return do_resize(m, b);
	} else {
		return do_amend(b);
	}
	return r;
}

static void compare(struct model *m, struct block *b, const char *what)
{
	uint8_t *buf = malloc(m->size);
	assert_int_equal(block_length(b), m->size);
	assert_int_equal(image_read(b, 0, buf, m->size), 0);
	for (uint64_t i = 0; i < m->size; i += 512)
		if (memcmp(buf + i, m->now + i, 512))
			fail_msg("%s: sector at %llu differs", what, (unsigned long long)i);
	free(buf);
}

static void model_init(struct model *m, unsigned seed)
{
	*m = (struct model){ .now = calloc(1, MAX_SIZE), .size = MAX_SIZE - 512 * 3, .seed = seed };
}

static void model_free(struct model *m)
{
	free(m->now);
	while (m->nsnaps)
		free(m->snap[--m->nsnaps].data);
}

/* --- tests --- */

static void test_random(void **state)
{
	for (unsigned s = 0; s < ARRAY_SIZE(shapes); s++) {
		struct model m;
		uint64_t len;
		model_init(&m, seed0 * 1000 + s);
		free(new_image(&shapes[s], m.size, &len));
		struct block_opts o = { .file = path, .format = "qcow2", .discard_unmap = true };
		struct block *b;
		struct err e = { 0 };
		if (block_open(&b, &o, NULL, NULL, &e))
			fail_msg("%s", e.msg);
		for (unsigned long i = 0; i < nops / ARRAY_SIZE(shapes); i++) {
			char what[64];
			snprintf(what, sizeof what, "shape %u, seed %u, op %lu", s, seed0, i);
			int r = step(&m, b, true);
			if (r)
				fail_msg("%s: %s", what, strerror(-r));
			if (i % 97 == 96) {
				compare(&m, b, what);
				check_clean(b, false, what);
			}
			if (i % 211 == 210) {
				assert_int_equal(block_close_checked(b), 0);
				if (block_open(&b, &o, NULL, NULL, &e))
					fail_msg("%s: %s", what, e.msg);
				check_clean(b, false, what);
			}
		}
		compare(&m, b, "end");
		check_clean(b, false, "end");
		block_close(b);
		model_free(&m);
	}
}

/* What each sector may hold after a power cut: what was flushed, or anything written since. */
struct past { uint64_t writes, flushes; bool whole; uint8_t *data; uint64_t size; };

static void check_crash(struct block *leaf, uint64_t at, unsigned *seed, const struct past *past, unsigned n, unsigned flushed, unsigned shape)
{
	char what[96];
	uint64_t len;
	unsigned was = *seed;
	uint8_t *file = fault_crash(leaf, at, seed, &len), *buf;
	struct err e = { 0 };
	snprintf(what, sizeof what, "shape %u, power cut at write %llu, seed %u", shape, (unsigned long long)at, was);
	struct block *l2 = fault_new(file, len), *b = open_over(l2, false, &e);
	if (!b)
		fail_msg("%s: %s", what, e.msg);
	check_clean(b, true, what);
	/* The disk's size is one of those it had since. */
	bool size_ok = false;
	for (unsigned k = flushed; k < n; k++)
		size_ok |= past[k].size == block_length(b);
	if (!size_ok)
		fail_msg("%s: size %llu", what, (unsigned long long)block_length(b));
	buf = malloc(block_length(b));
	assert_int_equal(image_read(b, 0, buf, block_length(b)), 0);
	for (uint64_t i = 0; i < block_length(b); i += 512) {
		static const uint8_t zero[512];
		bool ok = false;
		for (unsigned k = flushed; k < n && !ok; k++)
			ok = i >= past[k].size ? !memcmp(buf + i, zero, 512) : !memcmp(buf + i, past[k].data + i, 512);
		if (!ok)
			fail_msg("%s: sector at %llu is neither old nor new", what, (unsigned long long)i);
	}
	free(buf);
	/* Leaks go away by repair, and the image works. */
	struct image_check c = { 0 };
	assert_int_equal(image_check(b, CHECK_FIX_LEAKS, &c, &e), 0);
	check_clean(b, false, what);
	uint8_t one[512];
	memset(one, 0x5a, sizeof one);
	assert_int_equal(image_write(b, 4096, one, 512), 0);
	assert_int_equal(block_close_checked(b), 0);
	free(file);
}

enum { HISTORY = 40 };

static void crash_round(unsigned shape, unsigned seed, unsigned points)
{
	struct model m;
	struct past past[HISTORY + 1] = { 0 };
	unsigned n = 0;
	uint64_t len;
	model_init(&m, seed);
	uint8_t *file = new_image(&shapes[shape], m.size, &len);
	struct block *leaf = fault_new(file, len), *b = open_ok(leaf);
	free(file);
	unsigned long warm = rnd(&m, 30);
	for (unsigned long i = 0; i < warm; i++)
		assert_int_equal(step(&m, b, true), 0);
	assert_int_equal(image_flush(b), 0);
	uint64_t first = fault_writes(leaf);
	for (n = 0; n <= HISTORY; n++) {
		uint64_t before = fault_flushed(leaf);
		bool flush = n && rnd(&m, 8) == 0;
		if (n)
			assert_int_equal(flush ? image_flush(b) : step(&m, b, true), 0);
		past[n] = (struct past){ fault_writes(leaf), before, flush || !n, malloc(m.size), m.size };
		memcpy(past[n].data, m.now, m.size);
	}
	uint64_t last = fault_writes(leaf);
	assert_true(last > first);
	for (unsigned p = 0; p < points; p++) {
		uint64_t at = first + 1 + (uint64_t)rnd(&m, (unsigned)(last - first)); /* behind the flush that `first` ends with */
		unsigned flushed = 0, end = 1;
		/* States before `flushed` are impossible; those begun after the cut, too. */
		for (unsigned k = 0; k <= HISTORY; k++) {
			if (past[k].whole && past[k].writes < at)
				flushed = k;
			if (k && past[k - 1].writes <= at)
				end = k + 1;
		}
		check_crash(leaf, at, &m.seed, past, end, flushed, shape);
	}
	block_free(b);
	for (unsigned k = 0; k < n; k++)
		free(past[k].data);
	model_free(&m);
}

static void test_power(void **state)
{
	unsigned per = 10;
	for (unsigned long i = 0; i < ncrashes / per; i++)
		crash_round((unsigned)i % ARRAY_SIZE(shapes), seed0 * 7919 + (unsigned)i, per);
}

/* Each call in turn fails: the request says so, the image stays sound, what was flushed before is there. */
static void test_errors(void **state)
{
	static const int errors[] = { -EIO, -ENOSPC };
	for (unsigned s = 0; s < ARRAY_SIZE(shapes); s++) {
		for (unsigned k = 0; k < 60; k++) {
			struct model m;
			uint64_t len;
			char what[64];
			model_init(&m, seed0 + s * 100 + k / 20);
			uint8_t *file = new_image(&shapes[s], m.size, &len), *safe = malloc(MAX_SIZE);
			struct block *leaf = fault_new(file, len), *b = open_ok(leaf);
			struct err e = { 0 };
			int r = 0;
			free(file);
			for (unsigned i = 0; i < 15; i++)
				assert_int_equal(step(&m, b, false), 0);
			assert_int_equal(image_flush(b), 0);
			memcpy(safe, m.now, m.size);
			snprintf(what, sizeof what, "shape %u, call %u fails", s, k);
			fault_at(leaf, k * 2, errors[k & 1], k & 2, k & 4);
			for (unsigned i = 0; i < 12 && !r; i++)
				r = step(&m, b, false);
			fault_at(leaf, 0, 0, false, false);
			/* The file as it is after a close that may fail, too. */
			if (!r)
				assert_int_equal(image_flush(b), 0);
			uint64_t now_len = (uint64_t)leaf->drv->file_length(leaf);
			uint8_t *now = malloc(now_len);
			struct iovec v = { now, now_len };
			assert_int_equal(leaf->drv->read(leaf, 0, &v, 1, now_len), 0);
			struct block *l2 = fault_new(now, now_len), *c = open_over(l2, false, &e);
			if (!c)
				fail_msg("%s: %s", what, e.msg);
			check_clean(c, true, what);
			if (!r)
				compare(&m, c, what);
			block_free(c);
			/* The failed image itself goes on. */
			assert_int_equal(image_flush(b), 0);
			check_clean(b, true, what);
			block_free(b);
			free(now);
			free(safe);
			model_free(&m);
		}
	}
}

/* --- one flush for all who wait --- */

struct flusher { struct block *b; pthread_t thread; atomic_int tid; int r; };

static void *flusher(void *opaque)
{
	struct flusher *f = opaque;
	atomic_store(&f->tid, (int)gettid());
	f->r = image_flush(f->b);
	return NULL;
}

/* It waits for something, and has called image_flush(): between that and telling its id there is nothing to wait for. */
static bool is_asleep(const struct flusher *f)
{
	char name[64], text[256] = "";
	int tid = atomic_load(&f->tid);
	snprintf(name, sizeof name, "/proc/self/task/%d/stat", tid);
	FILE *stat = tid ? fopen(name, "r") : NULL;
	size_t n = stat ? fread(text, 1, sizeof text - 1, stat) : 0;
	if (stat)
		fclose(stat);
	char *state = n ? strrchr(text, ')') : NULL;
	return state && state[2] == 'S';
}

static void start_flush(struct flusher *f, struct block *b)
{
	*f = (struct flusher){ .b = b };
	assert_int_equal(pthread_create(&f->thread, NULL, flusher, f), 0);
	while (!is_asleep(f))
		usleep(1000);
}

static void test_shared_flush(void **state)
{
	enum { WAITING = 4 };
	struct flusher first, more[WAITING];
	uint64_t len;
	uint8_t *file = new_image(&shapes[2], 1 << 20, &len);
	struct block *leaf = fault_new(file, len), *b = open_ok(leaf);
	free(file);
	for (int fail = 0; fail < 2; fail++) {
		assert_int_equal(image_write(b, 0, "data", 4), 0);
		assert_int_equal(image_flush(b), 0);
		fault_hold(leaf, true);
		start_flush(&first, b);
		assert_int_equal(fault_held(leaf), 1);
		for (unsigned i = 0; i < WAITING; i++)
			start_flush(&more[i], b);
		uint64_t calls = fault_calls(leaf);
		fault_at(leaf, 0, fail ? -EIO : 0, false, false);
		fault_hold(leaf, false);
		pthread_join(first.thread, NULL);
		assert_int_equal(first.r, 0); /* it began before they came */
		for (unsigned i = 0; i < WAITING; i++) {
			pthread_join(more[i].thread, NULL);
			assert_int_equal(more[i].r, fail ? -EIO : 0);
		}
		assert_int_equal(fault_calls(leaf) - calls, 1);
		fault_at(leaf, 0, fail ? -EIO : 0, false, false);
		assert_int_equal(image_flush(b), fail ? -EIO : 0); /* and nobody lives on what an earlier one did */
		assert_int_equal(image_flush(b), 0);
		assert_int_equal(fault_calls(leaf) - calls, 3);
	}
	block_free(b);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_random), cmocka_unit_test(test_power), cmocka_unit_test(test_errors),
		cmocka_unit_test(test_shared_flush) };
	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--ops"))
			nops = strtoul(argv[i + 1], NULL, 0);
		else if (!strcmp(argv[i], "--crashes"))
			ncrashes = strtoul(argv[i + 1], NULL, 0);
		else if (!strcmp(argv[i], "--seed"))
			seed0 = (unsigned)strtoul(argv[i + 1], NULL, 0);
	}
	close(mkstemp(path));
	int r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(path);
	return r;
}
