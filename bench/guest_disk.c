/*
 * Runs inside a guest (bench/disk): random and sequential reads of a disk past the guest's page cache, with Linux's own
 * asynchronous I/O, and through it. One line a case: name, operations a second, MiB a second.
 * usage: guest_disk DEVICE SECONDS [CASE,CASE...]
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 64 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t random_next(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	return *s ^= *s << 17;
}

struct run { int fd; uint64_t size, len, at, seed; int random, write; };

static uint64_t place(struct run *r)
{
	uint64_t n = r->size / r->len, at = r->random ? random_next(&r->seed) % n * r->len : r->at;
	r->at = (at + r->len) % (n * r->len);
	return at;
}

static void fill(struct run *r, struct iocb *c, void *buf)
{
	*c = (struct iocb){ .aio_lio_opcode = r->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD, .aio_fildes = (unsigned)r->fd, .aio_buf = (uintptr_t)buf,
			    .aio_nbytes = r->len, .aio_offset = (int64_t)place(r), .aio_data = (uintptr_t)c };
}

static int measure(const char *name, struct run r, unsigned depth, double seconds)
{
	static struct iocb cb[DEPTH_MAX];
	struct io_event ev[DEPTH_MAX];
	struct iocb *list[DEPTH_MAX];
	aio_context_t ctx = 0;
	uint64_t ops = 0;
	uint8_t *buf;
	if (posix_memalign((void **)&buf, 4096, r.len * depth) || syscall(SYS_io_setup, depth, &ctx))
		return perror("io_setup"), 1;
	memset(buf, 1, r.len * depth);
	for (unsigned i = 0; i < depth; i++) {
		fill(&r, list[i] = &cb[i], buf + i * r.len);
	}
	double begin = now(), end;
	long n = depth;
	do {
		if (syscall(SYS_io_submit, ctx, n, list) != n)
			return perror("io_submit"), 1;
		n = syscall(SYS_io_getevents, ctx, 1, (long)depth, ev, NULL);
		for (long i = 0; i < n; i++) {
			list[i] = (struct iocb *)(uintptr_t)ev[i].data;
			if (ev[i].res != (int64_t)r.len)
				return printf("%s: result %lld\n", name, (long long)ev[i].res), 1;
			fill(&r, list[i], (void *)(uintptr_t)list[i]->aio_buf);
		}
		ops += (uint64_t)n;
		end = now();
	} while (end - begin < seconds);
	printf("RESULT %s %.0f %.1f\n", name, (double)ops / (end - begin), (double)(ops * r.len) / (end - begin) / 1048576);
	syscall(SYS_io_destroy, ctx);
	free(buf);
	return 0;
}

/* As cat or dd read a disk: through the page cache, which is emptied before each pass. */
static int buffered(const char *name, const char *path, struct run r, double seconds)
{
	int fd = open(path, O_RDONLY);
	void *buf = malloc(r.len);
	uint64_t ops = 0;
	double spent = 0;
	if (fd < 0 || !buf)
		return perror(path), 1;
	while (spent < seconds) {
		if (ioctl(fd, BLKFLSBUF, 0) || lseek(fd, 0, SEEK_SET))
			return perror("BLKFLSBUF"), 1;
		double begin = now();
		for (uint64_t i = 0; i < r.size / r.len; i++, ops++)
			if (read(fd, buf, r.len) != (ssize_t)r.len)
				return perror("read"), 1;
		spent += now() - begin;
	}
	printf("RESULT %s %.0f %.1f\n", name, (double)ops / spent, (double)(ops * r.len) / spent / 1048576);
	close(fd);
	free(buf);
	return 0;
}

static const struct test { const char *name; uint64_t len; unsigned depth; int random, write, cached; } tests[] = {
	{ "rand4k-d1", 4096, 1, .random = 1 }, { "rand4k-d8", 4096, 8, .random = 1 }, { "rand4k-d32", 4096, 32, .random = 1 },
	{ "seq4k-d8", 4096, 8 }, { "seq64k-d8", 65536, 8 }, { "seq128k-d1", 131072, 1 }, { "seq128k-d8", 131072, 8 }, { "seq128k-d32", 131072, 32 },
	{ "seq1m-d1", 1 << 20, 1 }, { "seq1m-d8", 1 << 20, 8 }, { "cached4k", 4096, .cached = 1 }, { "cached128k", 131072, .cached = 1 }, { "cached1m", 1 << 20, .cached = 1 },
	{ "randwrite4k-d8", 4096, 8, .random = 1, .write = 1 },
};

static int wanted(const char *list, const char *name)
{
	size_t n = strlen(name);
	for (const char *p = list; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
		if (!strncmp(p, name, n) && (!p[n] || p[n] == ','))
			return 1;
	return !list;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	double s = atof(argv[2]);
	int fd = open(argv[1], O_RDWR | O_DIRECT), bad = 0;
	struct run r = { .fd = fd, .seed = 88172645463325252ull };
	if (fd < 0)
		return perror(argv[1]), 1;
	r.size = (uint64_t)lseek(fd, 0, SEEK_END);
	for (const struct test *t = tests; t < tests + sizeof(tests) / sizeof(*tests) && !bad; t++) {
		r.len = t->len;
		r.random = t->random;
		r.write = t->write;
		if (wanted(argc > 3 ? argv[3] : NULL, t->name))
			bad = t->cached ? buffered(t->name, argv[1], r, s) : measure(t->name, r, t->depth, s);
	}
	puts(bad ? "BENCH FAILED" : "BENCH DONE");
	return bad;
}
