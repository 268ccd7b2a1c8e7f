/*
 * NBD peers that lie: a server's bytes for the client, a client's for the server. Nothing may crash, hang, or take memory without
 * bound. LLVMFuzzerTestOneInput() takes what the peer sends, the first byte says which peer; main() mutates good streams.
 *
 * usage: fuzz-nbd [RUNS [SEED]]
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/driver.h"
#include "block/nbd.h"
#include "block/nbd_proto.h"
#include "loop/loop.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { EXPORT = 1 << 20, STREAM_MAX = 1 << 17 };

struct stream { uint8_t b[STREAM_MAX]; size_t n; };

static void put(struct stream *s, const void *p, size_t n)
{
	if (s->n + n <= sizeof s->b) {
		memcpy(s->b + s->n, p, n);
		s->n += n;
	}
}

static void put16(struct stream *s, uint16_t v) { uint8_t b[2]; nbd_put16(b, v); put(s, b, 2); }
static void put32(struct stream *s, uint32_t v) { uint8_t b[4]; nbd_put32(b, v); put(s, b, 4); }
static void put64(struct stream *s, uint64_t v) { uint8_t b[8]; nbd_put64(b, v); put(s, b, 8); }
static void zeroes(struct stream *s, size_t n) { while (n--) put(s, "", 1); }

/* --- a server's stream, and the client under test --- */

static void opt_reply(struct stream *s, uint32_t opt, uint32_t type, uint32_t len)
{
	put64(s, NBD_OPT_REPLY_MAGIC);
	put32(s, opt);
	put32(s, type);
	put32(s, len);
}

static void chunk(struct stream *s, uint16_t flags, uint16_t type, unsigned nth, uint32_t len)
{
	put32(s, NBD_CHUNK_MAGIC);
	put16(s, flags);
	put16(s, type);
	put64(s, (uint64_t)nth * 256 + (nth - 1) % 256); /* as the client numbers them */
	put32(s, len);
}

static void server_hello(struct stream *s, bool sr)
{
	put64(s, NBD_INIT_MAGIC);
	put64(s, NBD_OPT_MAGIC);
	put16(s, 3);
	opt_reply(s, NBD_OPT_STRUCTURED_REPLY, sr ? NBD_REP_ACK : NBD_REP_UNSUP, 0);
	if (sr) {
		opt_reply(s, NBD_OPT_SET_META, NBD_REP_META, 19);
		put32(s, 7);
		put(s, "base:allocation", 15);
		opt_reply(s, NBD_OPT_SET_META, NBD_REP_ACK, 0);
	}
	opt_reply(s, NBD_OPT_GO, NBD_REP_INFO, 14);
	put16(s, NBD_INFO_BLOCK_SIZE);
	put32(s, 1);
	put32(s, 4096);
	put32(s, 65536);
	opt_reply(s, NBD_OPT_GO, NBD_REP_INFO, 12);
	put16(s, NBD_INFO_EXPORT);
	put64(s, EXPORT);
	put16(s, NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_TRIM | NBD_SEND_WRITE_ZEROES | NBD_SEND_FAST_ZERO | NBD_SEND_DF);
	opt_reply(s, NBD_OPT_GO, NBD_REP_ACK, 0);
}

/* Answers to what use_client() asks, in its order. */
static void server_answers(struct stream *s)
{
	chunk(s, 0, NBD_CHUNK_DATA, 1, 2048 + 8);
	put64(s, 0);
	zeroes(s, 2048);
	chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_HOLE, 1, 12);
	put64(s, 2048);
	put32(s, 2048);
	chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_STATUS, 2, 12);
	put32(s, 7);
	put32(s, 8192);
	put32(s, 3);
	chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_NONE, 3, 0);
	chunk(s, 0, NBD_CHUNK_ERROR_OFFSET, 4, 17);
	put32(s, ENOSPC);
	put16(s, 3);
	put(s, "abc", 3);
	put64(s, 512);
	chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_NONE, 4, 0);
	chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_NONE, 5, 0);
	for (unsigned i = 6; i < 9; i++) {
		chunk(s, NBD_CHUNK_DONE, NBD_CHUNK_DATA, i, 16384 + 8);
		put64(s, (i - 6) * 16384);
		zeroes(s, 16384);
	}
}

static void server_stream(struct stream *s, unsigned kind)
{
	s->n = 0;
	server_hello(s, kind % 4);
	if (kind % 4) {
		server_answers(s);
		return;
	}
	for (unsigned i = 1; i < 9; i++) {
		put32(s, NBD_SIMPLE_MAGIC);
		put32(s, i == 4 ? ENOSPC : 0);
		put64(s, i * 256 + i - 1);
		if (i == 1 || i > 5)
			zeroes(s, i == 1 ? 4096 : 16384);
	}
}

static void use_client(struct block *b)
{
	static uint8_t buf[49152];
	struct block_extent e;
	uint64_t len = MIN(block_length(b), (uint64_t)EXPORT);
	if (len < EXPORT)
		return;
	image_read(b, 0, buf, 4096);
	image_map(b, NULL, 0, len, &e);
	image_write(b, 4096, buf, 512);
	image_zero(b, 0, 65536, true);
	image_flush(b);
	for (unsigned i = 0; i < 3; i++)
		image_read(b, i * 16384ull, buf, 16384);
	image_discard(b, 0, 4096);
}

/* Everything at once, then the end: nothing can wait. */
static int fed(const uint8_t *data, size_t size)
{
	int sv[2], big = 1 << 20;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		exit(1);
	for (int i = 0; i < 2; i++)
		setsockopt(sv[i], SOL_SOCKET, SO_SNDBUF, &big, sizeof big);
	for (size_t at = 0; at < size;) {
		ssize_t n = send(sv[0], data + at, size - at, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n <= 0)
			break;
		at += (size_t)n;
	}
	shutdown(sv[0], SHUT_WR);
	fcntl(sv[0], F_SETFL, O_NONBLOCK);
	/* The other end is kept by the caller's next descriptor. */
	return dup2(sv[0], 900) < 0 ? exit(1), -1 : (close(sv[0]), sv[1]);
}

static void try_client(const uint8_t *data, size_t size)
{
	int fd = fed(data, size);
	char num[16];
	struct keyvals l = { 0 };
	struct block_opts o = { .options = &l, .discard_unmap = true };
	struct block *b;
	snprintf(num, sizeof num, "%d", fd);
	keyvals_add(&l, "driver", "nbd");
	keyvals_add(&l, "server.type", "fd");
	keyvals_add(&l, "server.str", num);
	if (!block_open(&b, &o, NULL, NULL, NULL)) {
		use_client(b);
		block_close(b);
	}
	keyvals_free(&l);
	close(fd);
	close(900);
}

/* --- a client's stream, and the server under test --- */

static void option(struct stream *s, uint32_t opt, uint32_t len)
{
	put64(s, NBD_OPT_MAGIC);
	put32(s, opt);
	put32(s, len);
}

static void request(struct stream *s, uint16_t cmd, uint16_t flags, uint64_t off, uint32_t len)
{
	put32(s, NBD_REQUEST_MAGIC);
	put16(s, flags);
	put16(s, cmd);
	put64(s, off ^ cmd);
	put64(s, off);
	put32(s, len);
}

static void client_stream(struct stream *s, unsigned kind)
{
	s->n = 0;
	put32(s, 3);
	option(s, NBD_OPT_LIST, 0);
	if (kind % 4)
		option(s, NBD_OPT_STRUCTURED_REPLY, 0);
	option(s, kind & 1 ? NBD_OPT_SET_META : NBD_OPT_LIST_META, 4 + 4 + 19 + 26);
	put32(s, 0);
	put32(s, 2);
	put32(s, 15);
	put(s, "base:allocation", 15);
	put32(s, 22);
	put(s, "qemu:allocation-depth\0", 22);
	option(s, NBD_OPT_INFO, 8);
	put32(s, 0);
	put16(s, 1);
	put16(s, NBD_INFO_BLOCK_SIZE);
	if (kind % 5) {
		option(s, NBD_OPT_GO, 6);
		put32(s, 0);
		put16(s, 0);
	} else {
		option(s, NBD_OPT_EXPORT_NAME, 0);
	}
	request(s, NBD_READ, 0, 0, 4096);
	request(s, NBD_READ, NBD_DF, 1000, 70000);
	request(s, NBD_WRITE, NBD_FUA, 4096, 512);
	zeroes(s, 512);
	request(s, NBD_WRITE, 0, 4097, 700);
	zeroes(s, 700);
	request(s, NBD_WRITE_ZEROES, NBD_NO_HOLE, 10000, 100000);
	request(s, NBD_TRIM, NBD_FUA, 65536, 65536);
	request(s, NBD_BLOCK_STATUS, kind & 2 ? NBD_REQ_ONE : 0, 0, EXPORT);
	request(s, NBD_CACHE, 0, 0, 65536);
	request(s, NBD_FLUSH, 0, 0, 0);
	for (unsigned i = 0; i < 8; i++)
		request(s, NBD_READ, 0, i * 65536ull, 65536);
	request(s, NBD_DISC, 0, 0, 0);
}

static struct { char path[64]; struct block *b; struct workers *w; } disk;

static void drain(int fd)
{
	uint8_t sink[65536];
	struct pollfd p = { fd, POLLIN, 0 };
	while (poll(&p, 1, 100000) > 0) {
		ssize_t n = read(fd, sink, sizeof sink);
		if (n == 0 || (n < 0 && errno != EAGAIN))
			return;
	}
	fputs("fuzz-nbd: the server hangs\n", stderr);
	abort();
}

static void try_server(const uint8_t *data, size_t size)
{
	struct nbd_server_opts o = { 0 };
	struct nbd_export e = { .name = "", .desc = "fuzz", .blk = disk.b, .len = EXPORT, .writable = true, .multi_conn = true, .depth = true };
	struct nbd_server *s;
	int fd = fed(data, size);
	if (nbd_server_new(&s, &o, NULL) || nbd_server_add(s, &e, NULL) || nbd_server_client(s, fd, false, NULL))
		exit(1);
	drain(900);
	nbd_server_free(s);
	close(900);
}

static void open_disk(void)
{
	struct block_opts o = { .file = disk.path, .format = "raw", .discard_unmap = true };
	strcpy(disk.path, "/var/tmp/nbd-fuzz-XXXXXX");
	int fd = mkstemp(disk.path);
	if (fd < 0 || ftruncate(fd, EXPORT) || workers_create(&disk.w, NULL, 2, NULL) || block_open(&disk.b, &o, NULL, disk.w, NULL))
		exit(1);
	close(fd);
	unlink(disk.path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!disk.b)
		open_disk();
	if (!size || size > STREAM_MAX)
		return 0;
	if (data[0] & 1)
		try_client(data + 1, size - 1);
	else
		try_server(data + 1, size - 1);
	return 0;
}

#ifndef LIBFUZZER
static void mutate(struct stream *s, unsigned *seed)
{
	static const uint32_t values[] = { 0, 1, 2, 3, 5, 8, 0x7fffffff, 0x80000000, 0xffffffff, 0x80000001, 65536, 1 << 25, 0x02000001, 0x01000000, 0xfffffff0, 32769 };
	for (unsigned n = rand_r(seed) % 4; n; n--) {
		/* Data is mostly zeroes: look for something else. */
		size_t at = 0;
		for (int k = 0; k < 50; k++) {
			at = (size_t)rand_r(seed) % s->n;
			if (s->b[at] || k > 45)
				break;
		}
		uint8_t be[4];
		nbd_put32(be, values[(size_t)rand_r(seed) % ARRAY_SIZE(values)]);
		switch (rand_r(seed) % 4) {
		case 0:
			s->b[at] ^= (uint8_t)(1u << rand_r(seed) % 8);
			break;
		case 1:
			memcpy(s->b + at, be, MIN((size_t)4, s->n - at));
			break;
		case 2:
			s->n = at + 1; /* cut off */
			break;
		default:
			memmove(s->b + at, s->b + at + 1, s->n - at - 1);
			s->n--;
		}
		if (!s->n)
			s->n = 1;
	}
}

int main(int argc, char **argv)
{
	unsigned runs = argc > 1 ? (unsigned)atoi(argv[1]) : 3000, seed = argc > 2 ? (unsigned)atoi(argv[2]) : 1;
	static struct stream s, in;
	signal(SIGPIPE, SIG_IGN);
	log_set_sink(NULL, NULL, LOG_ERROR);
	for (unsigned i = 0; i < runs; i++) {
		unsigned kind = (unsigned)rand_r(&seed);
		alarm(200);
		if (i & 1)
			server_stream(&s, kind);
		else
			client_stream(&s, kind);
		if (i > 16)
			mutate(&s, &seed);
		in.b[0] = i & 1;
		memcpy(in.b + 1, s.b, s.n = MIN(s.n, sizeof in.b - 1));
		LLVMFuzzerTestOneInput(in.b, s.n + 1);
	}
	block_close(disk.b);
	workers_destroy(disk.w);
	return 0;
}
#endif
