/*
 * The NBD client, inside: the link to a server (nbd_link.c), what comes back over it (nbd_reply.c), the driver on top (nbd.c).
 * Private to this folder.
 *
 * Callers are threads that may wait. Each sends its request (one at a time) and then needs its reply. There is no thread for
 * replies: of those that wait, one reads, fills whatever request a reply belongs to, wakes its owner, and passes the role
 * on when its own is answered. So a single request costs no switch of threads, and many are in flight together. A request
 * that comes from a queue (submit) has no thread of its own; the first of those starts one, which reads until the end. Of a polled
 * node the thread that submits also reads: what the socket does not take at once stays in `out`, so that it never waits for a server
 * that waits for it, and requests that come together are sent together.
 *
 * A connection that is lost fails what was in flight, or, with reconnect-delay, everything is sent again on a new one; the
 * requests are idempotent, and a flush that was not answered is sent again too. The server is hostile: a reply must belong
 * to a request, its data must lie inside of it, and every length is checked before it is used. What breaks the protocol
 * ends the connection for good.
 *
 * Locks: send (one sender), then lock (everything else). A request's buffers are written only by the reader, so what is in
 * flight is given up only by the reader, or when there is none.
 */
#ifndef BLOCK_NBD_LINK_H
#define BLOCK_NBD_LINK_H

#include <pthread.h>

#include "block/driver.h"
#include "block/nbd_hello.h"
#include "block/nbd_proto.h"

enum { NBD_SLOTS = 256, NBD_LOST = -100000 };

struct nbd_op {
	uint64_t cookie, off, len;
	uint16_t cmd, flags;
	const struct iovec *iov;        /* read: where to; write: what */
	int iovcnt;
	/* Under `lock`, but for the reader's own. */
	bool done, async;
	int ret;                        /* 0, -errno, NBD_LOST */
	int error;                      /* from an error chunk */
	uint64_t got;                   /* bytes of a read that came */
	uint32_t ext_len, ext_flags;    /* of a block status */
	pthread_cond_t *cond;           /* whose owner waits */
	struct block_req *req;          /* async */
	struct nbd_op *next;            /* in `out` */
	bool unsent;                    /* none or only a part was sent: there can be no answer */
	struct nbd_request head;
};

struct nbd {
	struct block *b;
	struct nbd_config cfg;
	const struct tls_creds *creds;
	struct nbd_hello hello;
	pthread_mutex_t send, lock;
	pthread_cond_t room;            /* a slot is free, the link changed, the reader left */
	struct nbd_chan chan;
	bool up, dead, connecting, reading, thread, stop;
	bool near;                      /* the server's end is on this machine */
	pthread_t reader;
	uint64_t down_since, last_try;  /* ms */
	uint64_t seq;
	unsigned waiting, used;
	struct nbd_op *slot[NBD_SLOTS];
	struct nbd_op *out, **out_tail; /* polled: to be sent, in this order */
	size_t out_sent;                /* bytes of the first */
	struct block_req *lost;         /* to be done again, by whoever holds no lock */
};

/* --- nbd_reply.c --- */

/* One reply, or one chunk of one, of *out. 0: go on, 1: *out is answered, else the link is lost. For the reader. */
int nbd_read_reply(struct nbd *n, struct nbd_op **out);

/* --- nbd_link.c --- */

/* The link of `b` as its `cfg` and `creds` say, with the first connection: 0 or -errno. The caller calls nbd_link_free() in both cases. */
int nbd_link_open(struct nbd *n, struct err *err);
void nbd_link_init(struct nbd *n, struct block *b);
void nbd_link_free(struct nbd *n);
/* A request, waiting for its answer and, with reconnect-delay, for a link: 0 or -errno. */
int nbd_transact(struct nbd *n, struct nbd_op *op);
/* Send `now` (async) without waiting for anything; the reader thread ends it with block_finish(). False: not touched. */
bool nbd_link_submit(struct nbd *n, const struct nbd_op *now);
/* The same of a polled node: the requests that were queued since the last nbd_link_poll() leave together. */
bool nbd_link_queue(struct nbd *n, const struct nbd_op *now);
/* Send what is queued, and end one request at least; false: none is under way. */
bool nbd_link_poll(struct nbd *n);

#endif
