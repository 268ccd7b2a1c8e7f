/*
 * The NBD protocol's numbers (the NBD project's doc/proto.md), and a byte channel for both ends. Private to this folder.
 *
 * Everything on the wire is big endian. The channel buffers what it receives, so that many short messages cost one system
 * call, and data longer than the buffer goes straight to where it belongs.
 */
#ifndef BLOCK_NBD_PROTO_H
#define BLOCK_NBD_PROTO_H

#include <endian.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "base/err.h"
#include "tls/tls.h"

#define NBD_INIT_MAGIC 0x4e42444d41474943ull            /* "NBDMAGIC" */
#define NBD_OPT_MAGIC 0x49484156454f5054ull             /* "IHAVEOPT" */
#define NBD_OLD_MAGIC 0x00420281861253ull
#define NBD_OPT_REPLY_MAGIC 0x3e889045565a9ull
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_MAGIC 0x67446698u
#define NBD_CHUNK_MAGIC 0x668e33efu

/* Handshake flags, the same bits from both sides. */
enum { NBD_FIXED_NEWSTYLE = 1, NBD_NO_ZEROES = 2 };

enum nbd_opt {
	NBD_OPT_EXPORT_NAME = 1, NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_PEEK_EXPORT, NBD_OPT_STARTTLS, NBD_OPT_INFO, NBD_OPT_GO,
	NBD_OPT_STRUCTURED_REPLY, NBD_OPT_LIST_META, NBD_OPT_SET_META,
};

enum {
	NBD_REP_ACK = 1, NBD_REP_SERVER, NBD_REP_INFO, NBD_REP_META,
	NBD_REP_ERROR = 1u << 31,
	NBD_REP_UNSUP = NBD_REP_ERROR + 1, NBD_REP_POLICY, NBD_REP_INVALID, NBD_REP_PLATFORM, NBD_REP_TLS_REQD, NBD_REP_UNKNOWN,
	NBD_REP_SHUTDOWN, NBD_REP_BLOCK_SIZE_REQD, NBD_REP_TOO_BIG,
};

enum { NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE };

enum {
	NBD_HAS_FLAGS = 1 << 0, NBD_READ_ONLY = 1 << 1, NBD_SEND_FLUSH = 1 << 2, NBD_SEND_FUA = 1 << 3, NBD_ROTATIONAL = 1 << 4,
	NBD_SEND_TRIM = 1 << 5, NBD_SEND_WRITE_ZEROES = 1 << 6, NBD_SEND_DF = 1 << 7, NBD_MULTI_CONN = 1 << 8, NBD_SEND_RESIZE = 1 << 9,
	NBD_SEND_CACHE = 1 << 10, NBD_SEND_FAST_ZERO = 1 << 11,
};

enum nbd_cmd { NBD_READ, NBD_WRITE, NBD_DISC, NBD_FLUSH, NBD_TRIM, NBD_CACHE, NBD_WRITE_ZEROES, NBD_BLOCK_STATUS };
enum { NBD_FUA = 1 << 0, NBD_NO_HOLE = 1 << 1, NBD_DF = 1 << 2, NBD_REQ_ONE = 1 << 3, NBD_FAST_ZERO = 1 << 4 };

/* Chunks of a structured reply. */
enum { NBD_CHUNK_DONE = 1 };
enum { NBD_CHUNK_NONE, NBD_CHUNK_DATA, NBD_CHUNK_HOLE, NBD_CHUNK_STATUS = 5, NBD_CHUNK_ERROR = 32769, NBD_CHUNK_ERROR_OFFSET };

/* base:allocation, and qemu's own contexts. */
enum { NBD_STATE_HOLE = 1, NBD_STATE_ZERO = 2 };
enum { NBD_DEPTH_BASE = 1 };

enum { NBD_NAME_MAX = 4096, NBD_PAYLOAD_MAX = 32 << 20, NBD_PORT = 10809 };

/* 28, 16 and 20 bytes. */
struct nbd_request { uint32_t magic; uint16_t flags, type; uint64_t cookie, off; uint32_t len; } __attribute__((packed));
struct nbd_simple { uint32_t magic, error; uint64_t cookie; } __attribute__((packed));
struct nbd_chunk { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t len; } __attribute__((packed));
struct nbd_opt_head { uint64_t magic; uint32_t opt, len; } __attribute__((packed));
struct nbd_opt_reply { uint64_t magic; uint32_t opt, type, len; } __attribute__((packed));

/* The wire's error numbers are Linux's for the few that exist; anything else is EIO. */
uint32_t nbd_error_to_wire(int r);              /* r: -errno */
int nbd_error_from_wire(uint32_t e);            /* -errno */

static inline uint16_t nbd_get16(const void *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static inline uint32_t nbd_get32(const void *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static inline uint64_t nbd_get64(const void *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static inline void nbd_put16(void *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); }
static inline void nbd_put32(void *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
static inline void nbd_put64(void *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }

/* --- the channel: one thread receives, any thread sends (the caller keeps senders apart) --- */
enum { NBD_BUF = 16384 };
struct nbd_chan {
	int fd;
	struct tls_session *tls;
	uint64_t deadline;              /* ms, CLOCK_MONOTONIC; 0: none. For the handshake */
	unsigned head, tail;
	uint8_t buf[NBD_BUF];
};

uint64_t nbd_now_ms(void);
void nbd_chan_init(struct nbd_chan *c, int fd);
/* Ends TLS and closes the descriptor. */
void nbd_chan_close(struct nbd_chan *c);
/* All `len` bytes: 0, -errno; -ECONNRESET when the peer closed in the middle, -EPIPE when it closed before the first. */
int nbd_recv(struct nbd_chan *c, void *buf, size_t len);
int nbd_recv_iov(struct nbd_chan *c, const struct iovec *iov, int n, size_t len);
/* Throw away; in pieces. */
int nbd_skip(struct nbd_chan *c, uint64_t len);
/* Is there something received and not read? */
static inline bool nbd_pending(const struct nbd_chan *c) { return c->head != c->tail; }
int nbd_send(struct nbd_chan *c, const void *buf, size_t len);
/* What the socket takes without waiting (with TLS: a part, and that is waited for): bytes, -EAGAIN, -errno. */
ssize_t nbd_send_now(struct nbd_chan *c, const struct iovec *iov, int n);
/* Changes `iov`. */
int nbd_send_iov(struct nbd_chan *c, struct iovec *iov, int n);

#endif
