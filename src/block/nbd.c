/* The NBD client: a leaf whose file is on the other end of a socket (nbd_link.h). */
#include <errno.h>
#include <stdlib.h>

#include "base/util.h"
#include "block/nbd_link.h"

enum { ZERO_MAX = 1 << 30 };

static uint64_t max_payload(const struct nbd *n)
{
	uint32_t m = n->hello.max_block;
	return m && m < NBD_PAYLOAD_MAX ? m : NBD_PAYLOAD_MAX;
}

bool nbd_is_near(const struct block *b)
{
	return b->nbd->near;
}

static bool wants_fua(const struct block *b, unsigned flags)
{
	if (b->cache == CACHE_UNSAFE)
		return false;
	return flags & BLOCK_REQ_FUA || b->cache == CACHE_WRITETHROUGH || b->cache == CACHE_DIRECTSYNC;
}

static int nbd_flush(struct block *b)
{
	struct nbd *n = b->nbd;
	struct nbd_op op = { .cmd = NBD_FLUSH };
	if (!(n->hello.flags & NBD_SEND_FLUSH) || b->read_only || b->cache == CACHE_UNSAFE)
		return 0;
	return nbd_transact(n, &op);
}

/*
 * Aligned to the server's smallest block and inside of the export. As few requests as may be: smaller ones that are sent together do not travel
 * faster, and a server that takes its time for each, or does only some at once, takes it for all of them.
 */
static int rw_aligned(struct block *b, uint16_t cmd, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t piece = max_payload(n);
	bool fua = cmd == NBD_WRITE && wants_fua(b, flags), can = n->hello.flags & NBD_SEND_FUA;
	struct nbd_op op = { .cmd = cmd, .flags = fua && can ? NBD_FUA : 0, .off = off, .len = len, .iov = iov, .iovcnt = cnt };
	int r = 0;
	if (!len)
		return 0; /* the protocol leaves open what an empty request means */
	struct iovec *v = len > piece ? calloc((size_t)cnt, sizeof *v) : NULL;
	if (len > piece && !v)
		return -ENOMEM;
	for (uint64_t done = 0; !r && done < len; done += op.len) {
		op.off = off + done;
		op.len = MIN(len - done, piece);
		if (v) {
			op.iovcnt = iov_slice(v, iov, cnt, done, op.len);
			op.iov = v;
		}
		r = nbd_transact(n, &op);
	}
	free(v);
	return !r && fua && !can ? nbd_flush(b) : r;
}

/* The aligned hull of a request through a buffer; alone among writers. */
static int rw_ragged(struct block *b, bool write, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t a = n->hello.min_block ? n->hello.min_block : 512, size = n->hello.size;
	uint64_t start = ALIGN_DOWN(off, a), end = MIN(ALIGN_UP(off + len, a), size);
	uint64_t real = off >= size ? 0 : MIN(len, size - off);
	uint8_t *hull = real ? calloc(1, end - start) : NULL;
	struct iovec v = { hull, end - start };
	int r = !real || hull ? 0 : -ENOMEM;
	if (write)
		pthread_rwlock_wrlock(&b->rmw);
	if (!r && real)
		r = rw_aligned(b, NBD_READ, start, &v, 1, end - start, 0);
	uint64_t at = off - start, left = real;
	for (int i = 0; !r && i < cnt; i++) {
		uint64_t k = MIN(left, (uint64_t)iov[i].iov_len);
		uint8_t *p = iov[i].iov_base;
		if (write && k)
			memcpy(hull + at, p, k);
		else if (k)
			memcpy(p, hull + at, k);
		if (write && k < iov[i].iov_len) { /* past the end there is nothing to write to */
			struct iovec rest = { p + k, iov[i].iov_len - k };
			r = iov_is_zero(&rest, 1) ? 0 : -ENOSPC;
		} else if (!write) {
			memset(p + k, 0, iov[i].iov_len - k);
		}
		at += k;
		left -= k;
	}
	if (!r && write && real)
		r = rw_aligned(b, NBD_WRITE, start, &v, 1, end - start, flags);
	if (write)
		pthread_rwlock_unlock(&b->rmw);
	free(hull);
	return r;
}

static bool is_ragged(const struct nbd *n, uint64_t off, uint64_t len)
{
	uint64_t a = n->hello.min_block ? n->hello.min_block : 512;
	if (range_bad(off, len, n->hello.size) || off % a)
		return true;
	return len % a && !(n->hello.min_block == 0 && off + len == n->hello.size);
}

static int nbd_read(struct block *b, uint64_t off, const struct iovec *iov, int cnt, uint64_t len)
{
	if (is_ragged(b->nbd, off, len))
		return rw_ragged(b, false, off, iov, cnt, len, 0);
	return rw_aligned(b, NBD_READ, off, iov, cnt, len, 0);
}

static int nbd_write(struct block *b, uint64_t off, const struct iovec *iov, int cnt, uint64_t len, unsigned flags)
{
	if (is_ragged(b->nbd, off, len))
		return rw_ragged(b, true, off, iov, cnt, len, flags);
	pthread_rwlock_rdlock(&b->rmw);
	int r = rw_aligned(b, NBD_WRITE, off, iov, cnt, len, flags);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* [off, off+len) without what the server cannot take: outside of the export, or part of a block. */
static bool shrink(const struct nbd *n, uint64_t *off, uint64_t *len)
{
	uint64_t a = n->hello.min_block ? n->hello.min_block : 1, end = MIN(*off + *len, n->hello.size);
	uint64_t start = ALIGN_UP(*off, a);
	end = ALIGN_DOWN(end, a);
	*off = start;
	*len = end > start ? end - start : 0;
	return *len;
}

static int nbd_discard(struct block *b, uint64_t off, uint64_t len)
{
	struct nbd *n = b->nbd;
	int r = 0;
	if (!b->discard_unmap || !(n->hello.flags & NBD_SEND_TRIM) || !shrink(n, &off, &len))
		return 0;
	for (uint64_t part; !r && len; off += part, len -= part) {
		struct nbd_op op = { .cmd = NBD_TRIM, .off = off, .len = part = MIN(len, (uint64_t)ZERO_MAX) };
		r = nbd_transact(n, &op);
	}
	return r == -ENOTSUP ? 0 : r;
}

static int nbd_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	struct nbd *n = b->nbd;
	uint64_t start = off, size = len, end = off + len;
	bool fua = wants_fua(b, flags), can = n->hello.flags & NBD_SEND_FUA;
	int r = 0;
	bool quick = flags & BLOCK_REQ_NO_FALLBACK;
	if (quick && (!(n->hello.flags & NBD_SEND_FAST_ZERO) || !(n->hello.flags & NBD_SEND_WRITE_ZEROES)))
		return -ENOTSUP;
	if (!(n->hello.flags & NBD_SEND_WRITE_ZEROES))
		return zero_by_writing(b, off, len, flags, nbd_write);
	if (!shrink(n, &start, &size))
		return zero_by_writing(b, off, len, flags, nbd_write);
	if (start > off)
		r = zero_by_writing(b, off, start - off, flags, nbd_write);
	uint64_t at = start;
	for (uint64_t part, left = size; !r && left; at += part, left -= part) {
		struct nbd_op op = { .cmd = NBD_WRITE_ZEROES, .off = at, .len = part = MIN(left, (uint64_t)ZERO_MAX),
				 .flags = (flags & BLOCK_REQ_MAY_UNMAP ? 0 : NBD_NO_HOLE) | (fua && can ? NBD_FUA : 0) | (quick ? NBD_FAST_ZERO : 0) };
		r = nbd_transact(n, &op);
		if (r == -ENOTSUP && !quick)
			return zero_by_writing(b, at, end - at, flags, nbd_write);
	}
	if (!r && at < MIN(end, n->hello.size))
		r = zero_by_writing(b, at, end - at, flags, nbd_write);
	return !r && fua && !can ? nbd_flush(b) : r;
}

static int nbd_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct nbd *n = b->nbd;
	uint64_t a = n->hello.min_block ? n->hello.min_block : 1, start = ALIGN_DOWN(off, a);
	*e = (struct block_extent){ .len = len, .present = true, .data = true, .has_offset = true, .offset = off, .file = b->file };
	if (off >= n->hello.size) {
		e->data = false;
		e->zero = true;
		return 0;
	}
	if (!n->hello.has_context || start + a > ALIGN_DOWN(n->hello.size, a))
		return 0;
	uint64_t want = MIN(MIN(ALIGN_UP(off + len, a), ALIGN_DOWN(n->hello.size, a)) - start, (uint64_t)ZERO_MAX);
	struct nbd_op op = { .cmd = NBD_BLOCK_STATUS, .flags = NBD_REQ_ONE, .off = start, .len = want };
	int r = nbd_transact(n, &op);
	if (r)
		return r;
	uint64_t end = start + op.ext_len;
	if (end <= off)
		return 0; /* less than a block: call it data */
	e->len = MIN(len, end - off);
	if (n->cfg.bitmap) { /* QEMU's rule: what is dirty shows as no data */
		e->data = e->has_offset = !(op.ext_flags & 1);
		return 0;
	}
	e->data = !(op.ext_flags & NBD_STATE_HOLE);
	e->zero = op.ext_flags & NBD_STATE_ZERO;
	return 0;
}

static int nbd_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	return size <= b->nbd->hello.size ? 0 : err_set(err, -ENOTSUP, "%s: an NBD export cannot be resized from here", b->file);
}

static int64_t nbd_file_length(struct block *b)
{
	return (int64_t)b->nbd->hello.size;
}

static int nbd_truncate(struct block *b, uint64_t len)
{
	return len <= b->nbd->hello.size ? 0 : -ENOSPC;
}

static int nbd_allocate(struct block *b, uint64_t off, uint64_t len, bool write)
{
	if (range_bad(off, len, b->nbd->hello.size))
		return -ENOSPC;
	return write ? nbd_zero(b, off, len, 0) : 0;
}

/* --- requests from a queue --- */

static bool as_op(struct block *b, struct block_req *r, struct nbd_op *op)
{
	static const uint16_t cmds[] = { [BLOCK_READ] = NBD_READ, [BLOCK_WRITE] = NBD_WRITE, [BLOCK_FLUSH] = NBD_FLUSH };
	struct nbd *n = b->nbd;
	/* Who sends may have to wait for the server while that takes the data, unless it polls. */
	if (r->op > BLOCK_FLUSH || r->len > (r->op == BLOCK_WRITE && !b->polled ? 65536u : max_payload(n)) || r->iovcnt > 16)
		return false;
	if (r->op == BLOCK_FLUSH ? !(n->hello.flags & NBD_SEND_FLUSH) || b->read_only || b->cache == CACHE_UNSAFE : is_ragged(n, r->off, r->len))
		return false;
	bool fua = r->op == BLOCK_WRITE && wants_fua(b, r->flags);
	if (fua && !(n->hello.flags & NBD_SEND_FUA))
		return false;
	*op = (struct nbd_op){ .cmd = cmds[r->op], .flags = fua ? NBD_FUA : 0, .off = r->op == BLOCK_FLUSH ? 0 : r->off,
			   .len = r->op == BLOCK_FLUSH ? 0 : r->len, .iov = r->iov, .iovcnt = r->iovcnt, .async = true, .req = r };
	return true;
}

/* Send it without waiting for anything; the reader thread ends it. False: not touched. */
static bool nbd_submit(struct block *b, struct block_req *r)
{
	struct nbd *n = b->nbd;
	struct nbd_op now;
	if ((!b->workers && !b->polled) || !as_op(b, r, &now))
		return false;
	/* A ragged write reads, changes and writes: nothing may come between. */
	if (now.cmd == NBD_WRITE && pthread_rwlock_tryrdlock(&b->rmw))
		return false;
	bool sent = b->polled ? nbd_link_queue(n, &now) : nbd_link_submit(n, &now);
	if (now.cmd == NBD_WRITE)
		pthread_rwlock_unlock(&b->rmw);
	return sent;
}

static bool nbd_poll(struct block *b)
{
	return nbd_link_poll(b->nbd);
}

static bool nbd_fast(struct block *b, struct block_req *r)
{
	return false; /* never at once */
}

static void nbd_close(struct block *b)
{
	struct nbd *n = b->nbd;
	if (!n)
		return;
	nbd_link_free(n);
	nbd_config_free(&n->cfg);
	free(n);
	b->nbd = NULL;
}

#define NBD_DRIVER(n)                                                                                                    \
	{ .name = n, .read = nbd_read, .write = nbd_write, .flush = nbd_flush, .discard = nbd_discard, .zero = nbd_zero,  \
	  .fast = nbd_fast, .submit = nbd_submit, .poll = nbd_poll, .map = nbd_map, .resize = nbd_resize, .file_length = nbd_file_length,   \
	  .truncate = nbd_truncate, .allocate = nbd_allocate, .close = nbd_close }
/* The same as an image of its own, and as what a raw image stands on, which it is shown as. */
static const struct block_driver block_nbd = NBD_DRIVER("nbd"), block_nbd_raw = NBD_DRIVER("raw");

/* --- opening --- */

static int take_hello(struct block *b, const struct block_opts *o, struct err *err)
{
	const struct nbd_hello *h = &b->nbd->hello;
	bool write = !o->read_only && !o->snapshot;
	if (write && h->flags & NBD_READ_ONLY && o->auto_read_only)
		b->read_only = true;
	else if (write && h->flags & NBD_READ_ONLY)
		return err_set(err, -EACCES, "%s: the export is read-only; use readonly=on", b->file);
	if (h->min_block > 4096)
		return err_set(err, -ENOTSUP, "%s: the server wants blocks of %u bytes; 4096 is supported", b->file, h->min_block);
	if (h->min_block > 512)
		b->size = 4096;
	b->length = h->size > INT64_MAX - 4096 ? 0 : ALIGN_UP(h->size, (uint64_t)b->size);
	if (h->size > INT64_MAX - 4096)
		return err_set(err, -EFBIG, "%s: too big", b->file);
	if (b->nbd->cfg.bitmap && !h->has_context)
		return err_set(err, -EINVAL, "%s: requested x-dirty-bitmap %s not found", b->file, b->nbd->cfg.bitmap);
	return 0;
}


static int read_config(struct nbd_config *c, const struct block_opts *o, struct err *err)
{
	if (!o->leaf)
		return nbd_config_name(c, o->file, err);
	struct keyvals l = { 0 };
	for (unsigned i = 0; i < o->leaf->n; i++)
		keyvals_add(&l, o->leaf->o[i].key, o->leaf->o[i].val);
	keyvals_get(&l, "driver");
	int r = nbd_config_keys(c, &l, "driver=nbd", err);
	if (!r && keyvals_end(&l, "driver=nbd", err)) {
		nbd_config_free(c);
		r = -EINVAL;
	}
	keyvals_free(&l);
	return r;
}

int nbd_open(struct block *b, const struct block_opts *o, struct err *err)
{
	struct nbd *n = calloc(1, sizeof *n);
	if (!n)
		return err_set(err, -ENOMEM, "NBD: out of memory");
	int r = read_config(&n->cfg, o, err);
	if (r) {
		free(n);
		return r;
	}
	nbd_link_init(n, b);
	b->nbd = n;
	b->drv = o->format || !o->leaf ? &block_nbd_raw : &block_nbd;
	b->is_dev = true; /* it has the size it has */
	free(b->file);
	b->file = nbd_config_text(&n->cfg);
	if (!b->file)
		return err_set(err, -ENOMEM, "NBD: out of memory");
	if (n->cfg.tls_creds)
		r = tls_find_creds(o->tls, n->cfg.tls_creds, false, &n->creds, err);
	else if (n->cfg.tls_uri)
		r = err_set(err, -EINVAL, "%s: TLS needs credentials: driver=nbd,...,tls-creds=ID of an -object", b->file);
	if (!r)
		r = nbd_link_open(n, err);
	return r ? r : take_hello(b, o, err);
}
