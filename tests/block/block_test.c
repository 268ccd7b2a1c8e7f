/* Raw images: random requests against an array, snapshot, locks, kill -9 after flush, errors. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "block/block.h"
#include "block/image.h"
#include "loop/loop.h"
#include "request.h"

enum { SIZE = 1 << 20 };
static char dir[] = "/var/tmp/block-test-XXXXXX";
static char path[64];

static int rw(struct block *b, enum block_op op, uint64_t off, void *buf, size_t len)
{
	struct iovec v = { buf, len };
	return request(b, op, off, len, &v, 1, BLOCK_REQ_INLINE);
}

static void make_file(uint64_t size, int fill)
{
	FILE *f = fopen(path, "w");
	assert_non_null(f);
	for (uint64_t i = 0; i < size; i++)
		fputc(fill ? (int)(fill + i / 512) : 0, f);
	fclose(f);
}

static struct block *open_ok(struct block_opts *o, struct workers *w)
{
	struct block *b;
	struct err e = { 0 };
	o->file = path;
	if (!o->format)
		o->format = "raw";
	if (block_open(&b, o, NULL, w, &e))
		fail_msg("%s", e.msg);
	return b;
}

static int cut_iov(struct iovec *v, uint8_t *buf, size_t len, bool odd)
{
	int n = 0;
	while (len) {
		size_t part = odd ? 1 + (size_t)rand() % 3000 : 512 * (1 + (size_t)rand() % 8);
		part = n == 30 ? len : MIN(part, len);
		v[n++] = (struct iovec){ buf, part };
		buf += part;
		len -= part;
	}
	return n;
}

static void random_ops(struct block *b, uint8_t *model, uint64_t size, int rounds, bool odd, bool discards)
{
	static uint8_t raw[SIZE + 4096], *buf = raw;
	buf = (uint8_t *)ALIGN_UP((uintptr_t)raw, 4096);
	for (int i = 0; i < rounds; i++) {
		uint64_t sectors = size / 512, s = (uint64_t)rand() % sectors, most = rand() % 8 ? 16 : 700;
		uint64_t n = 1 + (uint64_t)rand() % MIN(sectors - s, most);
		uint64_t off = s * 512, len = n * 512;
		unsigned flags = (rand() & 1 ? BLOCK_REQ_INLINE : 0) | (rand() % 8 ? 0 : BLOCK_REQ_FUA) | (rand() & 1 ? BLOCK_REQ_MAY_UNMAP : 0);
		struct iovec v[32];
		int k = cut_iov(v, buf, len, odd);
		switch (rand() % 8) {
		case 0:
			assert_int_equal(request(b, BLOCK_ZERO, off, len, NULL, 0, flags), 0);
			memset(model + off, 0, len);
			break;
		case 1:
			assert_int_equal(request(b, BLOCK_FLUSH, 0, 0, NULL, 0, flags), 0);
			break;
		case 2:
			assert_int_equal(request(b, BLOCK_DISCARD, off, len, NULL, 0, flags), 0);
			if (discards)
				memset(model + off, 0, len);
			break;
		case 3: case 4: case 5:
			memset(buf, rand() % 4 ? rand() : 0, len);
			assert_int_equal(request(b, BLOCK_WRITE, off, len, v, k, flags), 0);
			memcpy(model + off, buf, len);
			break;
		default:
			memset(buf, 0x5a, len);
			assert_int_equal(request(b, BLOCK_READ, off, len, v, k, flags), 0);
			assert_memory_equal(buf, model + off, len);
		}
	}
}

static void check_file(const uint8_t *want, size_t size)
{
	static uint8_t got[SIZE];
	int fd = open(path, O_RDONLY);
	assert_int_equal(read(fd, got, size), size);
	assert_memory_equal(got, want, size);
	close(fd);
}

static void test_model(void **state)
{
	static uint8_t model[SIZE];
	struct loop *l;
	struct workers *w;
	assert_int_equal(loop_create(&l, NULL), 0);
	assert_int_equal(workers_create(&w, l, 4, NULL), 0);
	srand(7);
	for (int cache = CACHE_WRITEBACK; cache <= CACHE_UNSAFE; cache++) {
		for (int variant = 0; variant < 4; variant++) {
			struct block_opts o = { .cache = (enum block_cache)cache, .discard_unmap = variant & 1, .detect_zeroes = variant & 2 };
			make_file(SIZE, 0);
			memset(model, 0, SIZE);
			struct block *b = open_ok(&o, variant == 3 ? NULL : w);
			assert_int_equal(block_length(b), SIZE);
			random_ops(b, model, SIZE, 150, variant & 1, o.discard_unmap);
			block_close(b);
			check_file(model, SIZE);
		}
	}
	workers_destroy(w);
	loop_destroy(l);
}

static void test_snapshot(void **state)
{
	static uint8_t model[SIZE], before[SIZE];
	struct workers *w;
	assert_int_equal(workers_create(&w, NULL, 2, NULL), 0);
	make_file(SIZE, 3);
	int fd = open(path, O_RDONLY);
	assert_int_equal(read(fd, before, SIZE), SIZE);
	close(fd);
	chmod(path, 0444);
	memcpy(model, before, SIZE);
	struct block_opts o = { .snapshot = true, .discard_unmap = true };
	struct block *b = open_ok(&o, w);
	assert_false(block_read_only(b));
	random_ops(b, model, SIZE, 1500, true, true);
	block_close(b);
	check_file(before, SIZE);
	chmod(path, 0644);
	workers_destroy(w);
}

static void test_ragged_and_checks(void **state)
{
	uint8_t buf[1024];
	struct stat st;
	struct block_opts o = { 0 };
	make_file(1000, 0x11);
	struct block *b = open_ok(&o, NULL);
	assert_int_equal(block_length(b), 1024);
	assert_int_equal(rw(b, BLOCK_READ, 512, buf, 512), 0);
	assert_int_equal(buf[487], 0x12);
	assert_int_equal(buf[488], 0);
	assert_int_equal(rw(b, BLOCK_READ, 1024, buf, 512), -EINVAL);
	assert_int_equal(rw(b, BLOCK_READ, 512, buf, 1024), -EINVAL);
	assert_int_equal(rw(b, BLOCK_READ, 1, buf, 512), -EINVAL);
	assert_int_equal(rw(b, BLOCK_READ, 0, buf, 511), -EINVAL);
	assert_int_equal(rw(b, BLOCK_READ, UINT64_MAX - 511, buf, 512), -EINVAL);
	assert_int_equal(request(b, BLOCK_ZERO, 512, UINT64_MAX - 511, NULL, 0, 0), -EINVAL);
	assert_int_equal(request(b, (enum block_op)99, 0, 512, NULL, 0, 0), -EINVAL);
	struct iovec lie = { buf, 512 };
	assert_int_equal(request(b, BLOCK_WRITE, 0, 1024, &lie, 1, 0), -EINVAL);
	memset(buf, 0x77, 512);
	assert_int_equal(rw(b, BLOCK_WRITE, 512, buf, 512), 0);
	block_close(b);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_size, 1024);

	o.read_only = true;
	b = open_ok(&o, NULL);
	assert_int_equal(rw(b, BLOCK_WRITE, 0, buf, 512), -EPERM);
	assert_int_equal(request(b, BLOCK_FLUSH, 0, 0, NULL, 0, 0), 0);
	assert_int_equal(block_attach(b, "first", NULL), 0);
	struct err e = { 0 };
	assert_int_equal(block_attach(b, "second", &e), -EBUSY);
	assert_non_null(strstr(e.msg, "first"));
	block_close(b);
}

static void test_probe(void **state)
{
	struct block *b;
	struct err e = { 0 };
	struct block_opts o = { .file = path };
	uint8_t head[512] = "QFI\xfb";
	make_file(65536, 0);
	assert_int_equal(block_open(&b, &o, NULL, NULL, &e), 0);
	assert_int_equal(rw(b, BLOCK_WRITE, 0, head, 512), -EPERM); /* it was taken for raw */
	assert_int_equal(rw(b, BLOCK_WRITE, 512, head, 512), 0);
	block_close(b);
	o.format = "raw";
	assert_int_equal(block_open(&b, &o, NULL, NULL, &e), 0);
	assert_int_equal(rw(b, BLOCK_WRITE, 0, head, 512), 0);
	block_close(b);
	o.format = NULL;
	assert_int_equal(block_open(&b, &o, NULL, NULL, &e), -ENOTSUP);
	assert_non_null(strstr(e.msg, "qcow2"));
	const struct { const char *file, *format, *want; } bad[] = {
		{ "/nonexistent/x", "raw", "no such file" }, { "/tmp", "raw", "directory" }, { "/dev/null", "raw", "block device" },
		{ path, "qed", "'qed' is not supported" }, { path, "vmdk", "only reads vmdk" }, { "nbd:localhost:1", "raw", "Failed to connect" }, { "ssh:x", "raw", "protocol 'ssh'" }, { "", "raw", "no file" },
	};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct block_opts p = { .file = bad[i].file, .format = bad[i].format };
		err_clear(&e);
		assert_true(block_open(&b, &p, NULL, NULL, &e) < 0);
		if (!strstr(e.msg, bad[i].want))
			fail_msg("%s", e.msg);
	}
}

static int run(const char *cmd)
{
	char line[256];
	snprintf(line, sizeof line, "%s %s >/dev/null 2>&1", cmd, path);
	int r = system(line);
	return WIFEXITED(r) ? WEXITSTATUS(r) : -1;
}

static void test_locks(void **state)
{
	struct block *b, *c;
	struct err e = { 0 };
	struct block_opts o = { .format = "raw" };
	make_file(65536, 0);
	b = open_ok(&o, NULL);
	assert_int_equal(block_open(&c, &o, NULL, NULL, &e), -EAGAIN);
	assert_non_null(strstr(e.msg, path));
	o.read_only = true;
	assert_int_equal(block_open(&c, &o, NULL, NULL, NULL), -EAGAIN);
	bool qemu = !access("/usr/bin/qemu-io", X_OK);
	if (qemu)
		assert_int_not_equal(run("qemu-io -f raw -c 'write 0 512'"), 0);
	block_close(b);
	b = open_ok(&o, NULL);
	c = open_ok(&o, NULL);          /* readers share */
	if (qemu) {
		assert_int_equal(run("qemu-io -r -f raw -c 'read 0 512'"), 0);
		assert_int_not_equal(run("qemu-io -f raw -c 'write 0 512'"), 0);
	}
	block_close(b);
	block_close(c);
	if (qemu)
		assert_int_equal(run("qemu-io -f raw -c 'write 0 512'"), 0);
}

static void test_kill_after_flush(void **state)
{
	static uint8_t want[SIZE];
	int p[2];
	char c;
	make_file(SIZE, 0);
	assert_int_equal(pipe(p), 0);
	pid_t pid = fork();
	if (!pid) {
		struct block_opts o = { 0 };
		struct workers *w;
		workers_create(&w, NULL, 2, NULL);
		struct block *b;
		o.file = path;
		o.format = "raw";
		if (block_open(&b, &o, NULL, w, NULL))
			_exit(1);
		close(p[0]);
		memset(want, 0xc3, SIZE);
		for (int i = 0; i < SIZE / 65536; i++)
			rw(b, BLOCK_WRITE, (uint64_t)i * 65536, want, 65536);
		if (!request(b, BLOCK_FLUSH, 0, 0, NULL, 0, 0) && write(p[1], "k", 1) == 1)
			pause();
		_exit(1);
	}
	close(p[1]);
	assert_int_equal(read(p[0], &c, 1), 1);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	close(p[0]);
	memset(want, 0xc3, SIZE);
	check_file(want, SIZE);
}

static void note_thread(struct block_req *r)
{
	r->priv[2] = pthread_equal(pthread_self(), (pthread_t)r->priv[1]) ? 1 : 2;
	on_done(r);
}

/* 1: the caller's thread did it, 2: another one. */
static unsigned done_by(struct block *b, enum block_op op, struct iovec *v)
{
	struct block_req r = { .op = op, .flags = BLOCK_REQ_INLINE, .len = v->iov_len, .iov = v, .iovcnt = 1, .done = note_thread };
	r.priv[1] = (uintptr_t)pthread_self();
	submit_and_wait(b, &r);
	assert_int_equal(r.ret, 0);
	return (unsigned)r.priv[2];
}

/* A file system that cannot write without waiting (ext4) may read so, and reads stay on the caller's thread. */
static void test_reads_after_writes(void **state)
{
	static uint8_t buf[4096];
	struct iovec v = { buf, sizeof buf };
	struct block_opts o = { 0 };
	struct workers *w;
	make_file(SIZE, 1);
	int fd = open(path, O_RDONLY);
	assert_true(fd >= 0);
	ssize_t n = preadv2(fd, &v, 1, 0, RWF_NOWAIT);
	close(fd);
	if (n != (ssize_t)sizeof buf) {
		print_message("the file system has no reads that do not wait\n");
		skip();
	}
	assert_int_equal(workers_create(&w, NULL, 2, NULL), 0);
	struct block *b = open_ok(&o, w);
	assert_int_equal(done_by(b, BLOCK_READ, &v), 1);
	for (int i = 0; i < 3; i++) {
		done_by(b, BLOCK_WRITE, &v);
		assert_int_equal(done_by(b, BLOCK_READ, &v), 1);
	}
	block_close(b);
	workers_destroy(w);
}

static uint64_t data_at(struct block *b, uint64_t off)
{
	struct block_extent e;
	assert_int_equal(image_map(b, NULL, off, SIZE - off, &e), 0);
	return e.zero ? 0 : e.len;
}

/* A run of data is looked up once; holes that the node makes in it, or by becoming shorter and longer, are seen. */
static void test_map(void **state)
{
	struct block_opts o = { .discard_unmap = true };
	struct err err = { 0 };
	make_file(SIZE, 1);
	struct block *b = open_ok(&o, NULL);
	int fd = open(path, O_RDWR);
	assert_true(fd >= 0);
	assert_int_equal(data_at(b, 0), SIZE);
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 131072, 65536) || lseek(fd, 0, SEEK_HOLE) != 131072) {
		close(fd);
		block_close(b);
		print_message("the file system has no holes\n");
		skip();
	}
	assert_int_equal(data_at(b, 4096), SIZE - 4096);        /* somebody else's: zeroes are data as well */
	assert_int_equal(request(b, BLOCK_DISCARD, 524288, 65536, NULL, 0, 0), 0);
	assert_int_equal(data_at(b, 4096), 131072 - 4096);
	assert_int_equal(data_at(b, 131072), 0);
	assert_int_equal(data_at(b, 262144), 524288 - 262144);
	assert_int_equal(request(b, BLOCK_ZERO, 327680, 65536, NULL, 0, BLOCK_REQ_MAY_UNMAP), 0);
	assert_int_equal(data_at(b, 262144), 65536);
	assert_int_equal(data_at(b, 786432), SIZE - 786432);
	assert_int_equal(block_resize(b, 851968, &err), 0);
	assert_int_equal(block_resize(b, SIZE, &err), 0);
	assert_int_equal(data_at(b, 786432), 65536);
	close(fd);
	block_close(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_model), cmocka_unit_test(test_snapshot), cmocka_unit_test(test_ragged_and_checks),
		cmocka_unit_test(test_probe), cmocka_unit_test(test_locks), cmocka_unit_test(test_kill_after_flush),
		cmocka_unit_test(test_reads_after_writes), cmocka_unit_test(test_map),
	};
	if (!mkdtemp(dir))
		return 77;
	snprintf(path, sizeof path, "%s/disk", dir);
	int r = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(path);
	rmdir(dir);
	return r;
}
