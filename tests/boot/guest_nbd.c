/*
 * The kernel's NBD client, for a guest (nbd_test.py):
 *
 *   guest_nbd attach DEVICE ADDRESS PORT EXPORT CONNECTIONS   handshake (fixed newstyle, NBD_OPT_GO), then the kernel has the sockets
 *   guest_nbd use DEVICE SEED                                 threads that read, write, flush and discard, each its own part, against an array
 *   guest_nbd detach DEVICE
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/nbd.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { THREADS = 3, ROUNDS = 120, LONGEST = 256 << 10 };

static void fail(const char *what)
{
	printf("guest_nbd: %s: %s\n", what, errno ? strerror(errno) : "not as expected");
	exit(1);
}

/* --- the handshake --- */

static void get(int s, void *buf, size_t len)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = read(s, (char *)buf + done, len - done);
		if (n <= 0)
			fail("receiving");
		done += (size_t)n;
	}
}

static void put(int s, const void *buf, size_t len)
{
	if (write(s, buf, len) != (ssize_t)len)
		fail("sending");
}

static uint64_t get_n(int s, unsigned bytes)
{
	uint8_t b[8];
	uint64_t v = 0;
	get(s, b, bytes);
	for (unsigned i = 0; i < bytes; i++)
		v = v << 8 | b[i];
	return v;
}

static void put32(int s, uint32_t v)
{
	v = htobe32(v);
	put(s, &v, 4);
}

/* The socket with the export chosen. */
static int dial(const char *address, const char *port, const char *export, uint64_t *size, unsigned *flags)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
	int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	if (s < 0 || inet_pton(AF_INET, address, &a.sin_addr) != 1 || connect(s, (struct sockaddr *)&a, sizeof a))
		fail("connecting");
	setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (get_n(s, 8) != 0x4e42444d41474943 || get_n(s, 8) != 0x49484156454f5054 || !(get_n(s, 2) & 1))
		fail("greeting");
	put32(s, 3);
	put(s, "IHAVEOPT", 8);
	put32(s, 7);
	put32(s, (uint32_t)strlen(export) + 6);
	put32(s, (uint32_t)strlen(export));
	put(s, export, strlen(export));
	put(s, "\0\0", 2);
	for (*size = 0;;) {
		if (get_n(s, 8) != 0x3e889045565a9 || get_n(s, 4) != 7)
			fail("option's answer");
		uint32_t type = (uint32_t)get_n(s, 4), len = (uint32_t)get_n(s, 4), skip = len;
		if (type == 1 && *size)
			return s;
		if (type != 3)
			fail("the server's answer");
		if (get_n(s, 2) == 0) {
			*size = get_n(s, 8);
			*flags = (unsigned)get_n(s, 2);
			skip -= 10;
		}
		for (skip -= 2; skip; skip--)
			get_n(s, 1);
	}
}

/* The kernel sets it when it begins. */
static bool await_size(const char *device, uint64_t want)
{
	uint64_t size = 0;
	for (int i = 0; i < 1200 && size != want; i++) {
		int dev = open(device, O_RDONLY);
		if (dev < 0 || ioctl(dev, BLKGETSIZE64, &size))
			fail(device);
		close(dev);
		if (size != want)
			usleep(50000);
	}
	return size == want;
}

static void attach(char **arg)
{
	int n = atoi(arg[4]), dev = open(arg[0], O_RDWR);
	uint64_t size = 0;
	unsigned flags = 0;
	if (dev < 0 || ioctl(dev, NBD_CLEAR_SOCK))
		fail(arg[0]);
	for (int i = 0; i < n; i++) {
		int s = dial(arg[1], arg[2], arg[3], &size, &flags);
		if (i == 0 && (ioctl(dev, NBD_SET_BLKSIZE, 512ul) || ioctl(dev, NBD_SET_SIZE_BLOCKS, (unsigned long)(size / 512)) ||
			       ioctl(dev, NBD_SET_FLAGS, (unsigned long)flags)))
			fail("NBD_SET_...");
		if (ioctl(dev, NBD_SET_SOCK, (unsigned long)s))
			fail("NBD_SET_SOCK");
	}
	printf("attached: %llu bytes, flags 0x%x, %d connections\n", (unsigned long long)size, flags, n);
	fflush(stdout);
	/* The kernel works until somebody disconnects; who called goes on when the disk has its size. */
	pid_t child = fork();
	if (child > 0)
		_exit(!await_size(arg[0], size));
	setsid();
	int r = child < 0 ? -1 : ioctl(dev, NBD_DO_IT);
	ioctl(dev, NBD_CLEAR_QUE);
	ioctl(dev, NBD_CLEAR_SOCK);
	_exit(r ? 1 : 0);
}

/* --- use --- */

struct user { pthread_t thread; int dev; unsigned seed; uint64_t base, len; uint8_t *model, *buf; };

static void check(struct user *u, uint64_t at, uint64_t n)
{
	if (pread(u->dev, u->buf, n, (off_t)(u->base + at)) != (ssize_t)n)
		fail("reading");
	errno = 0;
	if (memcmp(u->buf, u->model + at, n))
		fail("what was read");
}

static void *use_part(void *opaque)
{
	struct user *u = opaque;
	if (pread(u->dev, u->model, u->len, (off_t)u->base) != (ssize_t)u->len)
		fail("reading");
	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t n = 512u * (1 + (unsigned)rand_r(&u->seed) % (rand_r(&u->seed) % 3 ? 16 : LONGEST / 512));
		uint64_t at = (uint64_t)rand_r(&u->seed) % ((u->len - n) / 512 + 1) * 512;
		uint64_t range[2] = { u->base + at, n };
		switch (rand_r(&u->seed) % 8) {
		case 0:
			if (fdatasync(u->dev))
				fail("flushing");
			break;
		case 1: /* how a discarded block reads is the server's choice; the raw file's is a hole */
			if (ioctl(u->dev, BLKDISCARD, range))
				fail("discarding");
			memset(u->model + at, 0, n);
			break;
		case 2:
		case 3:
			check(u, at, n);
			break;
		default:
			for (uint64_t k = 0; k < n; k++)
				u->buf[k] = (uint8_t)(u->seed >> k % 7 * 3);
			if (pwrite(u->dev, u->buf, n, (off_t)(u->base + at)) != (ssize_t)n)
				fail("writing");
			memcpy(u->model + at, u->buf, n);
		}
	}
	for (uint64_t at = 0; at < u->len; at += LONGEST)
		check(u, at, u->len - at < LONGEST ? u->len - at : LONGEST);
	return NULL;
}

static void use(char **arg)
{
	struct user u[THREADS];
	uint64_t size = 0;
	int dev = open(arg[0], O_RDWR | O_DIRECT);
	if (dev < 0 || ioctl(dev, BLKGETSIZE64, &size))
		fail(arg[0]);
	for (unsigned i = 0; i < THREADS; i++) {
		uint64_t len = size / THREADS / 4096 * 4096;
		u[i] = (struct user){ .dev = dev, .seed = (unsigned)atoi(arg[1]) + i, .base = i * len, .len = len };
		if (posix_memalign((void **)&u[i].model, 4096, len) || posix_memalign((void **)&u[i].buf, 4096, LONGEST))
			fail("memory");
		pthread_create(&u[i].thread, NULL, use_part, &u[i]);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(u[i].thread, NULL);
	if (fsync(dev))
		fail("flushing");
	puts("used");
}

static void detach(char **arg)
{
	int dev = open(arg[0], O_RDWR);
	if (dev < 0 || ioctl(dev, NBD_DISCONNECT))
		fail(arg[0]);
}

int main(int argc, char **argv)
{
	if (argc == 7 && !strcmp(argv[1], "attach"))
		attach(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "use"))
		use(argv + 2);
	else if (argc == 3 && !strcmp(argv[1], "detach"))
		detach(argv + 2);
	else
		return 2;
	return 0;
}
