/* The NBD client against the NBD server in one process: names, many threads and requests in flight, the server's end and a new one. */
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
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "block/driver.h"
#include "block/nbd.h"
#include "loop/loop.h"

enum { SIZE = 4 << 20, THREADS = 4, PART = SIZE / THREADS };
static char dir[] = "/var/tmp/nbd-test-XXXXXX";
static char image[64], path[64], name[96];

/* --- names --- */

static void check_name(const char *file, const char *host, const char *port, const char *sock, const char *export, const char *text)
{
	struct nbd_config c;
	struct err e = { 0 };
	if (nbd_config_name(&c, file, &e))
		fail_msg("%s: %s", file, e.msg);
	if (host) {
		assert_string_equal(c.host, host);
		assert_string_equal(c.port, port);
	} else {
		assert_string_equal(c.path, sock);
	}
	assert_string_equal(c.export, export);
	char *t = nbd_config_text(&c);
	assert_string_equal(t, text);
	free(t);
	nbd_config_free(&c);
}

static void test_names(void **state)
{
	check_name("nbd:localhost:10809", "localhost", "10809", NULL, "", "nbd://localhost:10809");
	check_name("nbd:h:1:exportname=a:b", "h", "1", NULL, "a:b", "nbd://h:1/a%3Ab");
	check_name("nbd:[::1]:99", "::1", "99", NULL, "", "nbd://[::1]:99");
	check_name("nbd:unix:/a/b", NULL, NULL, "/a/b", "", "nbd+unix://?socket=/a/b");
	check_name("nbd:unix:/a/b:exportname=x y", NULL, NULL, "/a/b", "x y", "nbd+unix:///x%20y?socket=/a/b");
	check_name("nbd://h", "h", "10809", NULL, "", "nbd://h:10809");
	check_name("nbd://[fe80::1]:7/x%2Fy", "fe80::1", "7", NULL, "x/y", "nbd://[fe80::1]:7/x/y");
	check_name("nbds://u@h:7/", "h", "7", NULL, "", "nbds://h:7");
	check_name("nbd+unix:///e?socket=/s%20t", NULL, NULL, "/s t", "e", "nbd+unix:///e?socket=/s t");
	static const char *const bad[] = { "nbd:", "nbd:x", "nbd::1", "nbd:h:", "nbd:unix:", "nbd://[::1", "nbd://h/%4", "nbd://h/%00", "nbd+unix:///x",
					   "nbd+unix://h/x?socket=s", "nbd+unix:///?socket=", "nbd+unix:///?sock=x", "nbd+unix:///?socket=a&socket=b", "nbd://h?socket=/s",
					   "nbd://[::1]x" };
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct nbd_config c;
		struct err e = { 0 };
		if (!nbd_config_name(&c, bad[i], &e))
			fail_msg("%s was taken", bad[i]);
		assert_true(e.msg[0]);
	}
}

/* --- both ends --- */

struct served { struct workers *w; struct block *b; struct nbd_server *s; };

static void serve(struct served *v, bool fresh)
{
	struct block_opts o = { .file = image, .format = "raw", .discard_unmap = true };
	struct nbd_server_opts so = { 0 };
	struct err e = { 0 };
	int fd = open(image, O_RDWR | O_CREAT | (fresh ? O_TRUNC : 0), 0600);
	assert_true(fd >= 0 && !ftruncate(fd, SIZE));
	close(fd);
	assert_int_equal(workers_create(&v->w, NULL, 4, &e), 0);
	if (block_open(&v->b, &o, NULL, v->w, &e))
		fail_msg("%s", e.msg);
	struct nbd_export x = { .name = "", .blk = v->b, .len = SIZE, .writable = true, .multi_conn = true };
	assert_int_equal(nbd_server_new(&v->s, &so, &e), 0);
	assert_int_equal(nbd_server_add(v->s, &x, &e), 0);
	fd = nbd_listen_unix(path, &e);
	if (fd < 0)
		fail_msg("%s", e.msg);
	assert_int_equal(nbd_server_listen(v->s, fd, &e), 0);
}

static void unserve(struct served *v)
{
	unlink(path);
	nbd_server_free(v->s);
	block_close(v->b);
	workers_destroy(v->w);
}

static struct block *dial_as(const char *file, const char *delay, struct workers *w, bool polled)
{
	struct block_opts o = { .file = file, .discard_unmap = true, .format = "raw", .polled = polled };
	struct keyvals l = { 0 };
	struct block *b;
	struct err e = { 0 };
	if (delay) {
		keyvals_add(&l, "driver", "nbd");
		keyvals_add(&l, "path", path);
		keyvals_add(&l, "reconnect-delay", delay);
		o.file = NULL;
		o.leaf = &l;
	}
	if (block_open(&b, &o, NULL, w, &e))
		fail_msg("%s", e.msg);
	keyvals_free(&l);
	return b;
}

static struct block *dial(const char *file, const char *delay, struct workers *w)
{
	return dial_as(file, delay, w, false);
}

struct user { struct block *b; unsigned nth, rounds, errors; bool may_fail; uint8_t model[PART]; };

static uint64_t pick(unsigned *seed, uint64_t *len)
{
	*len = 512u << rand_r(seed) % 8;
	return (uint64_t)rand_r(seed) % ((PART - *len) / 512) * 512;
}

/* Random operations on a part of the disk that is this thread's own, checked against an array. */
static void *use(void *arg)
{
	struct user *u = arg;
	unsigned seed = u->nth + 1;
	uint64_t base = (uint64_t)u->nth * PART, len;
	uint8_t *buf = malloc(65536);
	for (unsigned i = 0; i < u->rounds; i++) {
		uint64_t off = pick(&seed, &len);
		int r = 0;
		switch (rand_r(&seed) % 6) {
		case 0:
		case 1:
			memset(buf, (int)(i + u->nth), len);
			r = image_write(u->b, base + off, buf, len);
			if (!r)
				memset(u->model + off, (int)(i + u->nth) & 255, len);
			break;
		case 2:
			r = image_zero(u->b, base + off, len, i & 1);
			if (!r)
				memset(u->model + off, 0, len);
			break;
		case 3:
			r = image_flush(u->b);
			break;
		case 4: {
			struct block_extent e;
			r = image_map(u->b, NULL, base + off, len, &e);
			break;
		}
		default:
			r = image_read(u->b, base + off, buf, len);
			if (!r && memcmp(buf, u->model + off, len))
				u->errors++;
		}
		if (r && !u->may_fail)
			u->errors++;
		else if (r)
			break;
	}
	free(buf);
	return NULL;
}

static void run_users(struct block **b, unsigned nblocks, bool may_fail, unsigned rounds, void (*meanwhile)(void *), void *opaque)
{
	static struct user u[THREADS];
	pthread_t t[THREADS];
	for (unsigned i = 0; i < THREADS; i++) {
		u[i].b = b[i % nblocks];
		u[i].nth = i;
		u[i].rounds = rounds;
		u[i].may_fail = may_fail;
		u[i].errors = 0;
		assert_int_equal(image_read(u[i].b, (uint64_t)i * PART, u[i].model, PART), 0);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_create(&t[i], NULL, use, &u[i]);
	if (meanwhile)
		meanwhile(opaque);
	for (unsigned i = 0; i < THREADS; i++) {
		pthread_join(t[i], NULL);
		assert_int_equal(u[i].errors, 0);
	}
}

/* One connection for all, then one each. */
static void test_threads(void **state)
{
	struct served v;
	struct block *b[THREADS];
	serve(&v, true);
	for (unsigned i = 0; i < THREADS; i++)
		b[i] = dial(name, NULL, NULL);
	run_users(b, 1, false, 400, NULL, NULL);
	run_users(b, THREADS, false, 400, NULL, NULL);
	for (unsigned i = 0; i < THREADS; i++)
		block_close(b[i]);
	unserve(&v);
}

struct flight { struct block_req r; struct iovec v; uint8_t *buf; unsigned *left; pthread_mutex_t *lock; pthread_cond_t *cond; };

static void landed(struct block_req *r)
{
	struct flight *f = container_of(r, struct flight, r);
	pthread_mutex_lock(f->lock);
	--*f->left;
	pthread_cond_signal(f->cond);
	pthread_mutex_unlock(f->lock);
}

/* From a queue, 64 at a time; with and without other threads that wait for their own. */
static void test_queue(void **state)
{
	enum { N = 64 };
	struct served v;
	struct workers *w;
	static struct flight f[N];
	pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
	serve(&v, true);
	assert_int_equal(workers_create(&w, NULL, 4, NULL), 0);
	struct block *b = dial(name, NULL, w);
	for (unsigned round = 0; round < 20; round++) {
		unsigned left = N;
		for (unsigned i = 0; i < N; i++) {
			bool write = round % 2 == 0;
			if (!f[i].buf)
				f[i].buf = malloc(4096);
			memset(f[i].buf, write ? (int)(round + i) : 0xee, 4096);
			f[i].v = (struct iovec){ f[i].buf, 4096 };
			f[i].left = &left;
			f[i].lock = &lock;
			f[i].cond = &cond;
			f[i].r = (struct block_req){ .op = write ? BLOCK_WRITE : BLOCK_READ, .off = i * 4096ull, .len = 4096, .iov = &f[i].v, .iovcnt = 1, .done = landed };
			block_submit(b, &f[i].r);
		}
		uint8_t head[512];
		assert_int_equal(image_read(b, SIZE - 512, head, 512), 0);
		pthread_mutex_lock(&lock);
		while (left)
			pthread_cond_wait(&cond, &lock);
		pthread_mutex_unlock(&lock);
		for (unsigned i = 0; i < N; i++) {
			assert_int_equal(f[i].r.ret, 0);
			if (round % 2)
				assert_int_equal(f[i].buf[4095], (round - 1 + i) & 255);
		}
	}
	for (unsigned i = 0; i < N; i++)
		free(f[i].buf);
	block_close(b);
	workers_destroy(w);
	unserve(&v);
}

/* --- one thread that asks for the ends of its requests --- */

enum { POLLED = 7, POLLED_PART = SIZE / POLLED / 4096 * 4096 };
struct polled { struct block_req r; struct iovec v[2]; uint8_t *buf, *model; bool busy, unsure; };

static void polled_done(struct block_req *r) { container_of(r, struct polled, r)->busy = false; }

static void polled_check(struct polled *p, uint64_t base, bool may_fail)
{
	uint64_t at = p->r.off - base;
	if (!may_fail)
		assert_int_equal(p->r.ret, 0);
	if (p->r.op == BLOCK_WRITE && !p->r.ret)
		memcpy(p->model + at, p->buf, p->r.len);
	else if (p->r.op == BLOCK_WRITE)
		p->unsure = true; /* from here on its part holds one or the other */
	else if (p->r.op == BLOCK_READ && !p->r.ret && !p->unsure)
		assert_memory_equal(p->buf, p->model + at, p->r.len);
}

static void polled_start(struct block *b, struct polled *p, uint64_t base, unsigned *seed)
{
	/* More than a socket takes, so that both ends have something to send. */
	uint64_t len = 512u * (1 + (unsigned)rand_r(seed) % (rand_r(seed) % 2 ? 8 : POLLED_PART / 512)), off = (uint64_t)rand_r(seed) % ((POLLED_PART - len) / 512 + 1) * 512;
	static const enum block_op ops[] = { BLOCK_READ, BLOCK_WRITE, BLOCK_WRITE, BLOCK_READ, BLOCK_FLUSH };
	enum block_op op = ops[rand_r(seed) % ARRAY_SIZE(ops)];
	memset(p->buf, rand_r(seed), len);
	p->v[0] = (struct iovec){ p->buf, len / 1024 * 512 };
	p->v[1] = (struct iovec){ p->buf + p->v[0].iov_len, len - p->v[0].iov_len };
	p->r = (struct block_req){ .op = op, .off = base + off, .len = len, .iov = p->v, .iovcnt = 2, .done = polled_done,
				   .flags = rand_r(seed) % 2 ? BLOCK_REQ_MORE : 0 };
	if (op == BLOCK_FLUSH)
		p->r = (struct block_req){ .op = op, .off = base, .done = polled_done };
	p->busy = true;
	block_submit(b, &p->r);
}

/* may_fail: until something did, and a little longer. */
static void run_polled(struct block *b, unsigned rounds, bool may_fail, void *(*meanwhile)(void *), struct served *v)
{
	static struct polled p[POLLED];
	unsigned seed = 5, failed = 0;
	pthread_t t;
	assert_true(block_can_poll(b, true));
	for (unsigned i = 0; i < POLLED; i++) {
		p[i] = (struct polled){ .buf = malloc(POLLED_PART), .model = malloc(POLLED_PART), .r.op = BLOCK_FLUSH };
		assert_int_equal(image_read(b, i * (uint64_t)POLLED_PART, p[i].model, POLLED_PART), 0);
	}
	if (meanwhile)
		pthread_create(&t, NULL, meanwhile, v);
	for (unsigned k = 0; k < rounds && failed < 50; k++) {
		for (unsigned i = 0; i < POLLED; i++) {
			if (p[i].busy)
				continue;
			failed += p[i].r.ret != 0;
			polled_check(&p[i], i * (uint64_t)POLLED_PART, may_fail);
			polled_start(b, &p[i], i * (uint64_t)POLLED_PART, &seed);
		}
		bool any = false;
		for (unsigned i = 0; i < POLLED; i++)
			any |= p[i].busy;
		assert_int_equal(block_poll(b), any);
	}
	while (block_poll(b))
		;
	for (unsigned i = 0; i < POLLED; i++) {
		assert_false(p[i].busy);
		polled_check(&p[i], i * (uint64_t)POLLED_PART, may_fail);
		free(p[i].buf);
		free(p[i].model);
	}
	if (meanwhile)
		pthread_join(t, NULL);
}

static void test_polled(void **state)
{
	struct served v;
	serve(&v, true);
	struct block *b = dial_as(name, NULL, NULL, true);
	assert_false(block_poll(b));
	run_polled(b, 400, false, NULL, NULL);
	block_close(b);
	unserve(&v);
}

static void restart(void *opaque)
{
	struct served *v = opaque;
	for (int i = 0; i < 4; i++) {
		usleep(50000);
		unserve(v);
		usleep(20000);
		serve(v, false);
	}
}

/* The server goes and comes back under load: with reconnect-delay nobody notices. */
static void test_reconnect(void **state)
{
	struct served v;
	serve(&v, true);
	struct block *b = dial(NULL, "60", NULL);
	run_users(&b, 1, false, 3000, restart, &v);
	block_close(b);
	unserve(&v);
}

static void kill_it(void *opaque)
{
	usleep(50000);
	unserve(opaque);
}

static void *kill_thread(void *v) { kill_it(v); return NULL; }
static void *restart_thread(void *v) { restart(v); return NULL; }

/* The same of a polled node; then a server that goes for good, under load. */
static void test_polled_lost(void **state)
{
	struct served v;
	serve(&v, true);
	struct block *b = dial_as(NULL, "60", NULL, true);
	run_polled(b, 600, false, restart_thread, &v);
	run_polled(b, 10, false, NULL, NULL);
	block_close(b);
	b = dial_as(name, NULL, NULL, true);
	run_polled(b, 1000000, true, kill_thread, &v);
	block_close(b);
}

/* Without it requests fail at once, and later ones work again. */
static void test_lost(void **state)
{
	struct served v;
	uint8_t buf[512];
	serve(&v, true);
	struct block *b = dial(name, NULL, NULL);
	run_users(&b, 1, true, 1000000, kill_it, &v);
	assert_int_equal(image_read(b, 0, buf, 512), -EIO);
	serve(&v, false);
	int r = -EIO;
	for (int i = 0; i < 600 && r; i++) {
		usleep(100000);
		r = image_read(b, 0, buf, 512);
	}
	assert_int_equal(r, 0);
	block_close(b);
	unserve(&v);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_names), cmocka_unit_test(test_threads), cmocka_unit_test(test_queue), cmocka_unit_test(test_polled), cmocka_unit_test(test_polled_lost), cmocka_unit_test(test_reconnect),
		cmocka_unit_test(test_lost),
	};
	if (!mkdtemp(dir))
		return 1;
	snprintf(image, sizeof image, "%s/image", dir);
	snprintf(path, sizeof path, "%s/sock", dir);
	snprintf(name, sizeof name, "nbd:unix:%s", path);
	int r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(image);
	unlink(path);
	rmdir(dir);
	return r;
}
