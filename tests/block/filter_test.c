/* Nodes above nodes from many threads: copy on read beside writes, limits in the middle of a graph and draining. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/keyvals.h"
#include "base/util.h"
#include "block/image.h"
#include "block/throttle.h"
#include "loop/loop.h"
#include "request.h"

enum { SIZE = 1 << 20, SECTORS = SIZE / 512, THREADS = 3, ROUNDS = 400 };
static char dir[] = "/var/tmp/filter-test-XXXXXX";

static int sectors(struct block *b, enum block_op op, uint64_t sector, void *buf, uint64_t n, unsigned flags)
{
	return request(b, op, sector * 512, n * 512, &(struct iovec){ buf, n * 512 }, 1, flags);
}

static struct block *open_options(const char *text, const struct throttle_set *t, bool cor, struct workers *w)
{
	struct keyvals l;
	struct err e = { 0 };
	struct block *b;
	char full[1024];
	snprintf(full, sizeof full, text, dir);
	if (keyvals_parse(&l, "test", full, "driver", &e))
		fail_msg("%s", e.msg);
	if (block_open(&b, &(struct block_opts){ .options = &l, .throttles = t, .copy_on_read = cor, .cache = CACHE_UNSAFE }, NULL, w, &e))
		fail_msg("%s: %s", full, e.msg);
	keyvals_free(&l);
	return b;
}

static void make_images(uint32_t cluster, bool sub)
{
	struct image_create c;
	struct err e = { 0 };
	struct block *b;
	uint8_t sector[512];
	char base[64], top[64];
	snprintf(base, sizeof base, "%s/base", dir);
	snprintf(top, sizeof top, "%s/top", dir);
	image_create_init(&c);
	c.file = base;
	c.format = "raw";
	c.size = SIZE;
	assert_int_equal(image_create(&c, &e), 0);
	assert_int_equal(block_open(&b, &(struct block_opts){ .file = base, .format = "raw" }, NULL, NULL, &e), 0);
	for (unsigned i = 0; i < SECTORS; i++) {
		memset(sector, i % 5 ? (int)(i % 200) + 1 : 0, sizeof sector);
		assert_int_equal(image_write(b, i * 512ull, sector, 512), 0);
	}
	block_close(b);
	image_create_init(&c);
	c.file = top;
	c.format = "qcow2";
	c.size = SIZE;
	c.backing = base;
	c.backing_format = "raw";
	c.cluster_size = cluster;
	c.extended_l2 = sub;
	if (image_create(&c, &e))
		fail_msg("%s", e.msg);
}

/* Sector i belongs to thread i % THREADS; what is in it is known to that one. */
struct user { struct block *b; pthread_t thread; unsigned id, seed; uint8_t *model; uint8_t *buf; };

/* In a thread cmocka cannot unwind. */
static void die(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	abort();
}

static void must(int r)
{
	if (r)
		die("request: %s\n", strerror(-r));
}

static void check_mine(struct user *u, unsigned at, unsigned n)
{
	for (unsigned i = at; i < at + n; i++) {
		uint8_t *p = u->buf + (i - at) * 512ull;
		if (i % THREADS == u->id && (p[0] != u->model[i] || p[511] != u->model[i]))
			die("sector %u is %u, %u was written", i, p[0], u->model[i]);
	}
}

static void *use(void *opaque)
{
	struct user *u = opaque;
	for (int i = 0; i < ROUNDS; i++) {
		unsigned at = (unsigned)rand_r(&u->seed) % SECTORS, n = 1 + (unsigned)rand_r(&u->seed) % MIN(64u, SECTORS - at);
		unsigned flags = rand_r(&u->seed) & 1 ? BLOCK_REQ_INLINE : 0;
		if (rand_r(&u->seed) & 1) {
			must(sectors(u->b, BLOCK_READ, at, u->buf, n, flags));
			check_mine(u, at, n);
			continue;
		}
		at = at / THREADS * THREADS + u->id;
		if (at >= SECTORS)
			continue;
		u->model[at] = (uint8_t)rand_r(&u->seed);
		memset(u->buf, u->model[at], 512);
		must(sectors(u->b, BLOCK_WRITE, at, u->buf, 1, flags));
	}
	return NULL;
}

static void hammer(struct block *b, uint8_t *model)
{
	struct user u[THREADS];
	for (unsigned i = 0; i < THREADS; i++) {
		u[i] = (struct user){ .b = b, .id = i, .seed = i + 1, .model = model, .buf = malloc(SIZE) };
		assert_int_equal(pthread_create(&u[i].thread, NULL, use, &u[i]), 0);
	}
	for (unsigned i = 0; i < THREADS; i++) {
		pthread_join(u[i].thread, NULL);
		free(u[i].buf);
	}
}

static void check_all(struct block *b, const uint8_t *model)
{
	static uint8_t buf[SIZE];
	struct block_extent e;
	assert_int_equal(image_read(b, 0, buf, SIZE), 0);
	for (unsigned i = 0; i < SIZE; i++)
		if (buf[i] != model[i / 512])
			fail_msg("byte %u is %u, %u was written", i, buf[i], model[i / 512]);
	for (uint64_t off = 0; off < SIZE; off += e.len) { /* a copy of everything now */
		assert_int_equal(image_map(b, image_backing(b), off, SIZE - off, &e), 0);
		assert_true(e.present);
	}
}

static void cor_case(struct workers *w, const struct throttle_set *t, uint32_t cluster, bool sub, const char *text, bool flag)
{
	struct image_check c = { 0 };
	struct err e = { 0 };
	uint8_t model[SECTORS];
	make_images(cluster, sub);
	for (unsigned i = 0; i < SECTORS; i++)
		model[i] = i % 5 ? (uint8_t)(i % 200 + 1) : 0;
	struct block *b = open_options(text, t, flag, w);
	hammer(b, model);
	check_all(b, model);
	assert_int_equal(block_close_checked(b), 0);
	b = open_options("driver=qcow2,backing=,file.driver=file,file.filename=%s/top", NULL, false, NULL);
	check_all(b, model); /* without the backing file */
	assert_int_equal(image_check(b, 0, &c, &e), 0);
	assert_int_equal(c.corruptions + c.leaks + c.errors, 0);
	block_close(b);
}

#define TOP "driver=qcow2,file.driver=file,file.filename=%1$s/top"
/* Backing reads that take a while, so that writes come in between. */
#define SLOW ",backing.driver=throttle,backing.throttle-group=slow,backing.file.driver=file,backing.file.filename=%1$s/base"
static void test_cor(void **state)
{
	struct throttle_set t = { 0 };
	struct throttle_limits l = { .b[THROTTLE_IOPS_TOTAL].avg = 1000000 };
	struct workers *w;
	struct err e = { 0 };
	assert_int_equal(workers_create(&w, NULL, 4, &e), 0);
	assert_int_equal(throttle_set_add(&t, "g", &l, NULL, NULL), 0);
	l.b[THROTTLE_IOPS_TOTAL].avg = 1000;
	assert_int_equal(throttle_set_add(&t, "slow", &l, NULL, NULL), 0);
	cor_case(w, &t, 65536, false, TOP, true);
	cor_case(w, &t, 4096, false, TOP SLOW, true);
	cor_case(w, &t, 65536, true, TOP, true);
	cor_case(w, &t, 512, false, "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename=%s/top", false);
	cor_case(w, &t, 65536, false, "driver=copy-on-read,file.driver=throttle,file.throttle-group=g,file.file.driver=qcow2,file.file.file.driver=throttle,"
		 "file.file.file.throttle-group=g,file.file.file.file.driver=file,file.file.file.file.filename=%s/top", false);
	throttle_set_free(&t);
	workers_destroy(w);
}

/* --- blkdebug --- */

static void *read_one(void *opaque)
{
	struct user *u = opaque;
	must(sectors(u->b, BLOCK_READ, u->id, u->buf, 1, 0));
	__atomic_store_n(&u->seed, 1, __ATOMIC_RELEASE);
	return NULL;
}

/* Widened and cut requests of several threads share blocks. */
static void test_blkdebug_limits(void **state)
{
	static const char *const limits[] = { "align=4096", "align=4096,file.max-transfer=8192,file.opt-write-zero=16384,file.max-write-zero=16384",
					      "align=65536,file.opt-discard=131072,file.max-discard=131072", "max-transfer=512" };
	struct workers *w;
	struct err e = { 0 };
	assert_int_equal(workers_create(&w, NULL, 4, &e), 0);
	for (unsigned i = 0; i < ARRAY_SIZE(limits); i++) {
		static uint8_t got[SIZE];
		uint8_t model[SECTORS];
		char text[512];
		make_images(65536, false);
		for (unsigned k = 0; k < SECTORS; k++)
			model[k] = k % 5 ? (uint8_t)(k % 200 + 1) : 0;
		snprintf(text, sizeof text, "driver=raw,file.driver=blkdebug,file.%s,file.image.driver=file,file.image.filename=%%s/base", limits[i]);
		struct block *b = open_options(text, NULL, false, w);
		hammer(b, model);
		assert_int_equal(image_zero(b, 7 * 512, 300 * 512, true), 0);
		memset(model + 7, 0, 300);
		assert_int_equal(image_discard(b, SIZE - 512, 512), 0); /* less than what can be discarded, or nothing that reads otherwise */
		assert_int_equal(image_read(b, 0, got, SIZE - 512), 0);
		for (unsigned k = 0; k < SIZE - 512; k++)
			if (got[k] != model[k / 512])
				fail_msg("%s: byte %u is %u, not %u", limits[i], k, got[k], model[k / 512]);
		block_close(b);
	}
	workers_destroy(w);
}

/* Two stop at one point each, go on one by one, and closing finds nobody. */
static void test_breakpoints(void **state)
{
	struct workers *w;
	struct err e = { 0 };
	struct user u[2];
	uint8_t buf[2][512];
	char *tag;
	make_images(65536, false);
	assert_int_equal(workers_create(&w, NULL, 4, &e), 0);
	struct block *b = open_options("driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=%s/top", NULL, false, w);
	assert_int_equal(image_break(b, "nothing", "a"), -2);
	assert_int_equal(image_break(b, "read_backing_aio", "a"), 0);
	assert_int_equal(image_break(b, "read_backing_aio", "b"), 0);
	assert_int_equal(image_break(b, "write_aio", "c"), 0);
	assert_int_equal(image_unbreak(b, "c"), 0);
	for (unsigned i = 0; i < 2; i++) {
		u[i] = (struct user){ .b = b, .id = i, .buf = buf[i] };
		assert_int_equal(pthread_create(&u[i].thread, NULL, read_one, &u[i]), 0);
	}
	/* Whoever comes first meets both, one after the other. */
	for (int i = 0; i < 2; i++) {
		while (!image_stopped(b, NULL))
			usleep(1000);
		assert_non_null(tag = image_stop_news(b));
		assert_int_equal(image_stopped(b, tag), 1);
		assert_int_equal(image_resume(b, "nowhere"), -2);
		assert_int_equal(image_resume(b, tag), 0);
		free(tag);
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_join(u[i].thread, NULL);
	assert_int_equal(image_resume(b, "a"), -2);
	block_close(b);
	workers_destroy(w);
}

/* --- quorum and blkverify --- */

#define THREE "driver=quorum,vote-threshold=2,rewrite-corrupted=on,children.0.driver=raw,children.0.file.filename=%1$s/base," \
	"children.1.driver=qcow2,children.1.file.filename=%1$s/top,children.2.driver=raw,children.2.file.filename=%1$s/third"
#define PAIR "driver=blkverify,raw.filename=%1$s/base,test.driver=qcow2,test.file.filename=%1$s/top,test.backing="

static void make_third(unsigned char fill)
{
	char name[64];
	snprintf(name, sizeof name, "%s/third", dir);
	FILE *f = fopen(name, "w");
	assert_non_null(f);
	for (unsigned i = 0; i < SIZE; i++)
		fputc(fill, f);
	fclose(f);
}

/* One of three is wrong everywhere: reads of all threads are right beside their writes, and rewriting undoes none. */
static void test_quorum(void **state)
{
	struct workers *w;
	struct err e = { 0 };
	uint8_t model[SECTORS], *got = malloc(SIZE);
	assert_int_equal(workers_create(&w, NULL, 4, &e), 0);
	make_images(65536, false); /* base is locked by the qcow2 image's backing file, too: a copy for that one */
	struct block *b = open_options("driver=qcow2,file.driver=file,file.filename=%1$s/top", NULL, true, NULL);
	assert_int_equal(image_read(b, 0, got, SIZE), 0); /* all of it is in the image now */
	assert_int_equal(image_set_backing(b, NULL, NULL, &e), 0);
	block_close(b);
	make_third(0xee);
	for (unsigned i = 0; i < SECTORS; i++)
		model[i] = i % 5 ? (uint8_t)(i % 200 + 1) : 0;
	b = open_options(THREE, NULL, false, w);
	hammer(b, model);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(image_read(b, 0, got, SIZE), 0);
		for (unsigned k = 0; k < SIZE; k++)
			if (got[k] != model[k / 512])
				fail_msg("byte %u is %u, not %u", k, got[k], model[k / 512]);
		block_close(b);
		if (!i) /* the one that was wrong is as the others now */
			b = open_options("driver=raw,file.filename=%s/third", NULL, false, NULL);
	}
	b = open_options(PAIR, NULL, false, w);
	hammer(b, model);
	assert_int_equal(image_read(b, 0, got, SIZE), 0);
	block_close(b);
	b = open_options("driver=raw,file.filename=%s/base", NULL, false, NULL);
	assert_int_equal(image_write(b, 4711 * 3, "x", 1), 0);
	block_close(b);
	b = open_options(PAIR, NULL, false, w);
	assert_int_equal(image_read(b, 0, got, 512), 0);
	assert_int_equal(image_read(b, 0, got, SIZE), -5);
	block_close(b);
	free(got);
	workers_destroy(w);
}

/* --- compress: parts of clusters from several threads --- */

static void test_compress(void **state)
{
	struct image_check c = { 0 };
	struct workers *w;
	struct err e = { 0 };
	uint8_t model[SECTORS], *got = malloc(SIZE);
	assert_int_equal(workers_create(&w, NULL, 4, &e), 0);
	make_images(16384, false);
	for (unsigned i = 0; i < SECTORS; i++)
		model[i] = i % 5 ? (uint8_t)(i % 200 + 1) : 0;
	struct block *b = open_options("driver=compress,file.driver=qcow2,file.file.filename=%s/top", NULL, false, w);
	hammer(b, model);
	block_close(b);
	b = open_options("driver=qcow2,file.driver=file,file.filename=%s/top", NULL, false, NULL);
	assert_int_equal(image_read(b, 0, got, SIZE), 0);
	for (unsigned k = 0; k < SIZE; k++)
		if (got[k] != model[k / 512])
			fail_msg("byte %u is %u, not %u", k, got[k], model[k / 512]);
	assert_int_equal(image_check(b, 0, &c, &e), 0);
	assert_int_equal(c.corruptions + c.leaks + c.errors, 0);
	assert_true(c.compressed > 0 && c.compressed == c.allocated);
	block_close(b);
	free(got);
	workers_destroy(w);
}

/* --- descriptions that make no sense: an error or a node, never more --- */

static void test_mutations(void **state)
{
	static const char *const seeds[] = {
		"driver=qcow2,file.driver=blkdebug,file.config=%1$s/conf,file.image.filename=%1$s/top,file.inject-error.0.event=none,file.set-state.0.event=pwritev,file.align=4096",
		"driver=copy-on-read,bottom=x,file.driver=qcow2,file.file.filename=%1$s/top,file.backing.node-name=x,file.backing.driver=raw,file.backing.file.filename=%1$s/base",
		"driver=throttle,throttle-group=g,file.driver=raw,file.offset=512,file.size=1024,file.file.driver=qcow2,file.file.file.filename=%1$s/top",
		("driver=quorum,vote-threshold=1,blkverify=off,children.0.driver=raw,children.0.file.filename=%1$s/base,children.1.driver=blkverify,"
		 "children.1.raw.filename=%1$s/conf,children.1.test.driver=qcow2,children.1.test.file.filename=%1$s/top,children.1.test.backing="),
		"driver=raw,file.driver=blkdebug,file.image.driver=blkdebug,file.image.image.filename=blkdebug::%1$s/base",
	};
	static const char conf[] = "[inject-error]\nevent = \"write_aio\"\nstate = \"1\"\nsector = \"12\"\n\n# x\n[set-state \"a\"]\nevent = \"none\"\nnew_state = \"2\"\n";
	struct throttle_set t = { 0 };
	struct throttle_limits l = { 0 };
	unsigned seed = 7, opened = 0;
	char name[64];
	make_images(65536, false);
	snprintf(name, sizeof name, "%s/conf", dir);
	assert_int_equal(throttle_set_add(&t, "g", &l, NULL, NULL), 0);
	for (unsigned i = 0; i < 1500; i++) {
		struct keyvals kv = { 0 };
		struct err e = { 0 };
		struct block *b;
		char text[1024], file[sizeof conf];
		int n = snprintf(text, sizeof text, seeds[i % ARRAY_SIZE(seeds)], dir);
		memcpy(file, conf, sizeof conf);
		for (unsigned k = (unsigned)rand_r(&seed) % 3; k--;) {
			text[(unsigned)rand_r(&seed) % (unsigned)n] = ",.=019abz:"[rand_r(&seed) % 10];
			file[(unsigned)rand_r(&seed) % (sizeof conf - 1)] = (char)rand_r(&seed);
		}
		FILE *f = fopen(name, "w");
		assert_non_null(f);
		fwrite(file, 1, sizeof conf - 1, f);
		fclose(f);
		int r = keyvals_parse(&kv, "test", text, "driver", &e);
		if (!r)
			r = block_open(&b, &(struct block_opts){ .options = &kv, .throttles = &t, .cache = CACHE_UNSAFE }, NULL, NULL, &e);
		if (!r) {
			uint8_t sector[512];
			(void)image_read(b, 0, sector, 512);
			block_close(b);
			opened++;
		} else if (!*e.msg) {
			fail_msg("%s: refused without a word", text);
		}
		keyvals_free(&kv);
	}
	assert_true(opened > 100);
	throttle_set_free(&t);
	unlink(name);
}

/* --- limits below --- */

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* One request in 100 seconds: a drain does not wait for that. */
static void test_drain(void **state)
{
	struct throttle_set t = { 0 };
	struct throttle_limits l = { .b[THROTTLE_BPS_TOTAL].avg = 512, .b[THROTTLE_BPS_TOTAL].max = 0 };
	struct workers *w;
	struct err e = { 0 };
	struct user u[8];
	uint8_t buf[8][512], *big = malloc(SIZE);
	make_images(65536, false);
	assert_int_equal(workers_create(&w, NULL, 8, &e), 0);
	assert_int_equal(throttle_set_add(&t, "g", &l, NULL, NULL), 0);
	struct block *b = open_options("driver=raw,file.driver=throttle,file.throttle-group=g,file.file.driver=file,file.file.filename=%s/base", &t, false, w);
	assert_int_equal(image_read(b, 0, big, SIZE), 0); /* passes, and fills the bucket for half an hour */
	double start = now();
	for (unsigned i = 0; i < 8; i++) {
		u[i] = (struct user){ .b = b, .id = i, .buf = buf[i] };
		assert_int_equal(pthread_create(&u[i].thread, NULL, read_one, &u[i]), 0);
	}
	for (unsigned done = 0; done < 8;) { /* whoever was not there for one drain meets the next */
		block_drain(b);
		for (done = 0; done < 8 && __atomic_load_n(&u[done].seed, __ATOMIC_ACQUIRE); done++)
			;
		usleep(10000);
	}
	for (unsigned i = 0; i < 8; i++)
		pthread_join(u[i].thread, NULL);
	assert_true(now() - start < 300); /* the limit alone would take half an hour */
	block_close(b);
	free(big);
	throttle_set_free(&t);
	workers_destroy(w);
}

static int setup(void **state)
{
	return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
	char name[64];
	snprintf(name, sizeof name, "%s/base", dir);
	unlink(name);
	snprintf(name, sizeof name, "%s/third", dir);
	unlink(name);
	snprintf(name, sizeof name, "%s/top", dir);
	unlink(name);
	return rmdir(dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_cor), cmocka_unit_test(test_blkdebug_limits), cmocka_unit_test(test_breakpoints),
					    cmocka_unit_test(test_mutations), cmocka_unit_test(test_quorum), cmocka_unit_test(test_compress),
					    cmocka_unit_test(test_drain) };
	return cmocka_run_group_tests(tests, setup, teardown);
}
