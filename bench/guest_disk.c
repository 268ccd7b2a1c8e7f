/*
 * Runs inside a guest (bench/disk): random and sequential reads of a disk past the page cache, with Linux's own
 * asynchronous I/O. One line a case: name, operations a second, MiB a second.
 * usage: guest_disk DEVICE SECONDS
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
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

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	double s = atof(argv[2]);
	int fd = open(argv[1], O_RDWR | O_DIRECT);
	struct run r = { .fd = fd, .len = 4096, .seed = 88172645463325252ull, .random = 1 };
	if (fd < 0)
		return perror(argv[1]), 1;
	r.size = (uint64_t)lseek(fd, 0, SEEK_END);
	int bad = measure("rand4k-d1", r, 1, s) || measure("rand4k-d8", r, 8, s) || measure("rand4k-d32", r, 32, s);
	r.random = 0;
	r.len = 128 << 10;
	bad = bad || measure("seq128k-d1", r, 1, s) || measure("seq128k-d8", r, 8, s);
	r.len = 1 << 20;
	bad = bad || measure("seq1m-d1", r, 1, s);
	r.write = r.random = 1;
	r.len = 4096;
	bad = bad || measure("randwrite4k-d8", r, 8, s);
	puts(bad ? "BENCH FAILED" : "BENCH DONE");
	return bad;
}
