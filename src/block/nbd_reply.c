/* The NBD client: replies. Everything here is what a server says, and checked before it is used. Called by the reader only (nbd_link.h). */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "block/nbd_link.h"

enum { CHUNK_MAX = NBD_PAYLOAD_MAX + 64 };

static int broken(struct nbd *n, const char *what)
{
	log_error("%s: the NBD server breaks the protocol: %s", n->b->file, what);
	return -EPROTO;
}

static struct nbd_op *find(struct nbd *n, uint64_t cookie)
{
	pthread_mutex_lock(&n->lock);
	struct nbd_op *op = n->slot[cookie % NBD_SLOTS];
	pthread_mutex_unlock(&n->lock);
	return op && op->cookie == cookie && !op->unsent ? op : NULL;
}

/* A part of a read's buffers: data from the wire, or zeroes. */
static int fill_part(struct nbd *n, struct nbd_op *op, uint64_t skip, uint64_t len, bool zero)
{
	struct iovec few[16], *v = op->iovcnt <= 16 ? few : calloc((size_t)op->iovcnt, sizeof *v);
	int r = 0;
	if (!v)
		return -ENOMEM;
	int k = iov_slice(v, op->iov, op->iovcnt, skip, len);
	if (zero)
		iov_zero(v, k);
	else
		r = nbd_recv_iov(&n->chan, v, k, len);
	if (v != few)
		free(v);
	return r;
}

static int data_chunk(struct nbd *n, struct nbd_op *op, uint16_t type, uint32_t len)
{
	uint8_t h[12];
	uint32_t head = type == NBD_CHUNK_HOLE ? 12 : 8;
	if (op->cmd != NBD_READ || (type == NBD_CHUNK_HOLE ? len != 12 : len <= 8))
		return broken(n, "data that nobody asked for");
	int r = nbd_recv(&n->chan, h, head);
	if (r)
		return r;
	uint64_t off = nbd_get64(h), size = type == NBD_CHUNK_HOLE ? nbd_get32(h + 8) : len - 8;
	if (!size || off < op->off || range_bad(off - op->off, size, op->len) || size > op->len - op->got)
		return broken(n, "data outside of the request");
	op->got += size;
	return fill_part(n, op, off - op->off, size, type == NBD_CHUNK_HOLE);
}

static int status_chunk(struct nbd *n, struct nbd_op *op, uint32_t len)
{
	uint8_t h[12];
	if (op->cmd != NBD_BLOCK_STATUS || len < 12 || (len - 4) % 8)
		return broken(n, "block status that nobody asked for");
	int r = nbd_recv(&n->chan, h, 12);
	if (r)
		return r;
	if (nbd_get32(h) != n->hello.context || !nbd_get32(h + 4))
		return broken(n, "block status of another context, or of nothing");
	if (!op->ext_len) {
		op->ext_len = nbd_get32(h + 4);
		op->ext_flags = nbd_get32(h + 8);
	}
	return nbd_skip(&n->chan, len - 12);
}

static int error_chunk(struct nbd *n, struct nbd_op *op, uint32_t len)
{
	uint8_t h[6];
	if (len < 6)
		return broken(n, "short error");
	int r = nbd_recv(&n->chan, h, 6);
	if (r)
		return r;
	if (!nbd_get32(h) || nbd_get16(h + 4) > len - 6)
		return broken(n, "malformed error");
	if (!op->error)
		op->error = nbd_error_from_wire(nbd_get32(h));
	return nbd_skip(&n->chan, len - 6);
}

/* 1: the request is answered. */
static int chunk(struct nbd *n, struct nbd_op *op, uint16_t flags, uint16_t type, uint32_t len)
{
	int r;
	if (len > CHUNK_MAX)
		return broken(n, "chunk is too long");
	if (type == NBD_CHUNK_DATA || type == NBD_CHUNK_HOLE)
		r = data_chunk(n, op, type, len);
	else if (type == NBD_CHUNK_STATUS)
		r = status_chunk(n, op, len);
	else if (type & 0x8000)
		r = error_chunk(n, op, len);
	else if (type == NBD_CHUNK_NONE)
		r = len || !(flags & NBD_CHUNK_DONE) ? broken(n, "malformed end") : 0;
	else
		r = broken(n, "unknown kind of chunk");
	if (r || !(flags & NBD_CHUNK_DONE))
		return r;
	if (!op->error && op->cmd == NBD_READ && op->got != op->len)
		return broken(n, "a read was not answered in full");
	if (!op->error && op->cmd == NBD_BLOCK_STATUS && !op->ext_len)
		return broken(n, "a block status was not answered");
	op->ret = op->error;
	return 1;
}

static int simple_reply(struct nbd *n, struct nbd_op *op, uint32_t error)
{
	if (n->hello.structured && (op->cmd == NBD_READ || op->cmd == NBD_BLOCK_STATUS))
		return broken(n, "simple reply where a structured one was agreed on");
	op->ret = nbd_error_from_wire(error);
	int r = !error && op->cmd == NBD_READ ? fill_part(n, op, 0, op->len, false) : 0;
	return r ? r : 1;
}

/* One reply, or one chunk of one. 0: go on, 1: *out is answered, else the link is lost. */
int nbd_read_reply(struct nbd *n, struct nbd_op **out)
{
	uint8_t h[20];
	int r = nbd_recv(&n->chan, h, 16);
	if (r)
		return r;
	uint32_t magic = nbd_get32(h);
	struct nbd_op *op = find(n, nbd_get64(h + 8));
	*out = op;
	if (magic != NBD_SIMPLE_MAGIC && (magic != NBD_CHUNK_MAGIC || !n->hello.structured))
		return broken(n, "bad magic of a reply");
	if (!op)
		return broken(n, "reply to a request that was not made");
	if (magic == NBD_SIMPLE_MAGIC)
		return simple_reply(n, op, nbd_get32(h + 4));
	r = nbd_recv(&n->chan, h + 16, 4);
	return r ? r : chunk(n, op, nbd_get16(h + 4), nbd_get16(h + 6), nbd_get32(h + 16));
}
