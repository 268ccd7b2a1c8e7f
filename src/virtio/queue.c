/* What both ring formats share: gathering a chain, checking it, and the dispatch between them. */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "virtio/queue_priv.h"

#define CHAIN_KEEP 64           /* buffers whose storage an idle chain keeps */

int virtq_init(struct virtq *q, struct guest_mem *m, const char *name, unsigned index, unsigned max_size,
	       struct err *err)
{
	memset(q, 0, sizeof(*q));
	q->mem = m;
	q->name = name;
	q->index = index;
	q->max_size = q->size = max_size;
	return 0;
}

void virtq_destroy(struct virtq *q)
{
	free(q->scratch);
	q->scratch = NULL;
	q->enabled = false;
}

void virtq_reset(struct virtq *q)
{
	free(q->scratch);
	*q = (struct virtq){ .mem = q->mem, .name = q->name, .index = q->index, .max_size = q->max_size,
			     .size = q->max_size };
}

int virtq_break(struct virtq *q, const char *why)
{
	q->broken = true;
	log_guest("%s: queue %u: %s; the device needs a reset", q->name, q->index, why);
	return -EIO;
}

/* A ring area: aligned, and RAM from end to end. */
static uint8_t *area(struct virtq *q, uint64_t gpa, size_t len, unsigned align, enum mem_dir dir)
{
	uint8_t *p = gpa % align ? NULL : gm_ptr(q->mem, gpa, len, dir);

	return (uintptr_t)p % align ? NULL : p;
}

/* Sizes and alignments: virtio 1.2, 2.7 (split) and 2.8.10 (packed). */
int virtq_enable(struct virtq *q)
{
	size_t n = q->size;

	if (!n || n > q->max_size || (!q->packed && (n & (n - 1))))
		return -EINVAL;
	q->desc = area(q, q->desc_gpa, n * 16, 16, q->packed ? MEM_WRITE : MEM_READ);
	q->driver = area(q, q->driver_gpa, q->packed ? 4 : 6 + n * 2, q->packed ? 4 : 2, MEM_READ);
	q->device = area(q, q->device_gpa, q->packed ? 4 : 6 + n * 8, 4, MEM_WRITE);
	if (!q->desc || !q->driver || !q->device)
		return -EFAULT;
	if (!q->scratch)
		q->scratch = malloc(sizeof(*q->scratch));
	if (!q->scratch)
		return -ENOMEM;
	q->next_avail = q->next_used = q->filled = 0;
	q->avail_wrap = q->used_wrap = true;
	q->in_use = 0;
	q->signalled_valid = false;
	q->enabled = true;
	virtq_want_kicks(q, true);
	return 0;
}

void virtq_scratch_start(struct virtq *q)
{
	struct virtq_scratch *s = q->scratch;

	s->n = s->n_out = 0;
	s->out_len = s->in_len = 0;
}

/* How much of [gpa, gpa+len) lies in the slot that holds gpa; a buffer may span neighbouring slots. */
static uint32_t slot_part(struct guest_mem *m, uint64_t gpa, uint32_t len)
{
	struct mem_range r;

	for (unsigned i = 0; guest_mem_range(m, i, &r); i++)
		if (gpa >= r.gpa && gpa - r.gpa < r.size)
			return MIN((uint64_t)len, r.size - (gpa - r.gpa));
	return 0;
}

static int add_part(struct virtq *q, uint64_t gpa, uint32_t len, bool write)
{
	struct virtq_scratch *s = q->scratch;
	void *p;

	if (s->n == VIRTQ_MAX_SEGS)
		return virtq_break(q, "chain with too many buffers");
	p = gm_ptr(q->mem, gpa, len, write ? MEM_WRITE : MEM_READ);
	if (!p)
		return virtq_break(q, "buffer outside of RAM");
	s->seg[s->n].gpa = gpa;
	s->seg[s->n].host = p;
	s->seg[s->n++].len = len;
	if (!write)
		s->n_out = s->n;
	*(write ? &s->in_len : &s->out_len) += len;
	if (s->in_len + s->out_len > UINT32_MAX)
		return virtq_break(q, "chain longer than 4 GiB");
	return 0;
}

int virtq_scratch_add(struct virtq *q, uint64_t gpa, uint32_t len, bool write)
{
	if (!len)
		return virtq_break(q, "buffer of zero length");
	if (gpa + (len - 1) < gpa)
		return virtq_break(q, "buffer wraps around");
	if (!write && q->scratch->n != q->scratch->n_out)
		return virtq_break(q, "readable buffer behind a writable one");
	if (gm_ptr(q->mem, gpa, len, write ? MEM_WRITE : MEM_READ))
		return add_part(q, gpa, len, write);
	while (len) {
		uint32_t part = slot_part(q->mem, gpa, len);
		int r = part ? add_part(q, gpa, part, write) : virtq_break(q, "buffer outside of RAM");

		if (r)
			return r;
		gpa += part;
		len -= part;
	}
	return 0;
}

/*
 * Tables: 2.7.5.3 (entries linked by `next`) and 2.8.8 (entries in order, NEXT means nothing). The
 * number of entries visited is bounded by the table's length, which is bounded by VIRTQ_MAX_SEGS.
 */
int virtq_scratch_table(struct virtq *q, uint64_t gpa, uint32_t len, bool chained)
{
	unsigned n = len / 16, i = 0;

	if (!q->indirect)
		return virtq_break(q, "indirect table, but the feature was not negotiated");
	if (!len || len % 16 || n > VIRTQ_MAX_SEGS)
		return virtq_break(q, "indirect table with a bad length");
	for (unsigned seen = 0; seen < n; seen++) {
		uint8_t raw[16];
		struct vdesc d;
		int r;

		if (gpa + i * 16ull < gpa || gm_read(q->mem, gpa + i * 16ull, raw, 16))
			return virtq_break(q, "indirect table outside of RAM");
		d = virtq_load_desc(raw);
		uint16_t flags = chained ? d.a : d.b;

		if (flags & DESC_INDIRECT)
			return virtq_break(q, "indirect table inside an indirect table");
		r = virtq_scratch_add(q, d.addr, d.len, flags & DESC_WRITE);
		if (r)
			return r;
		if (chained && !(flags & DESC_NEXT))
			return 0;
		i = chained ? d.b : i + 1;
		if (chained && i >= n)
			return virtq_break(q, "`next` outside of the indirect table");
	}
	return chained ? virtq_break(q, "loop in an indirect table") : 0;
}

static int chain_reserve(struct virtq_chain *c, unsigned n)
{
	size_t each = sizeof(struct iovec) + sizeof(uint64_t) + sizeof(uint32_t);
	char *p;

	if (n <= c->cap)
		return 0;
	n = MAX(n, 8u);
	p = malloc(n * each);
	if (!p)
		return -ENOMEM;
	free(c->iov);
	c->iov = (struct iovec *)p;
	c->gpa = (uint64_t *)(p + n * sizeof(struct iovec));
	c->len = (uint32_t *)(p + n * (sizeof(struct iovec) + sizeof(uint64_t)));
	c->cap = n;
	return 0;
}

int virtq_scratch_finish(struct virtq *q, struct virtq_chain *c, uint16_t id, uint16_t ndesc)
{
	struct virtq_scratch *s = q->scratch;

	if (chain_reserve(c, s->n))
		return -ENOMEM;
	for (unsigned i = 0; i < s->n; i++)
		c->iov[i] = (struct iovec){ s->seg[i].host, s->seg[i].len };
	c->n_w = s->n - s->n_out;
	for (unsigned i = 0; i < c->n_w; i++) {
		c->gpa[i] = s->seg[s->n_out + i].gpa;
		c->len[i] = s->seg[s->n_out + i].len;
	}
	c->out = c->iov;
	c->in = c->iov + s->n_out;
	c->n_out = s->n_out;
	c->n_in = c->n_w;
	c->out_len = s->out_len;
	c->in_len = s->in_len;
	c->n_segs = s->n;
	c->id = id;
	c->ndesc = ndesc;
	return 1;
}

void virtq_chain_free(struct virtq_chain *c)
{
	free(c->iov);
	memset(c, 0, sizeof(*c));
}

void virtq_chain_trim(struct virtq_chain *c)
{
	if (c->cap > CHAIN_KEEP)
		virtq_chain_free(c);
}

static bool usable(const struct virtq *q)
{
	return q->enabled && !q->broken;
}

int virtq_pop(struct virtq *q, struct virtq_chain *c)
{
	if (q->broken)
		return -EIO;
	if (!q->enabled)
		return 0;
	return q->packed ? packed_pop(q, c) : split_pop(q, c);
}

bool virtq_empty(struct virtq *q)
{
	return !usable(q) || (q->packed ? packed_empty(q) : split_empty(q));
}

void virtq_unpop(struct virtq *q, struct virtq_chain *c)
{
	if (!q->enabled)
		return;
	if (q->packed)
		packed_unpop(q, c);
	else
		split_unpop(q, c);
}

/* The device wrote the first `written` bytes of the writable buffers. */
static void mark_written(struct virtq *q, const struct virtq_chain *c, uint32_t written)
{
	for (unsigned i = 0; i < c->n_w && written; i++) {
		uint32_t n = MIN(written, c->len[i]);

		gm_written(q->mem, c->gpa[i], n);
		written -= n;
	}
}

void virtq_fill(struct virtq *q, struct virtq_chain *c, uint32_t written)
{
	mark_written(q, c, written);
	if (!q->enabled)
		return;
	if (q->packed)
		packed_fill(q, c, written);
	else
		split_fill(q, c, written);
}

void virtq_flush(struct virtq *q)
{
	if (!q->enabled || !q->filled)
		return;
	if (q->packed)
		packed_flush(q);
	else
		split_flush(q);
}

bool virtq_should_notify(struct virtq *q)
{
	if (!usable(q))
		return false;
	virtq_fence();          /* our used entries before the driver's wish */
	return q->packed ? packed_should_notify(q) : split_should_notify(q);
}

void virtq_want_kicks(struct virtq *q, bool on)
{
	if (!usable(q))
		return;
	q->kicks_on = on;
	if (q->packed)
		packed_want_kicks(q, on);
	else
		split_want_kicks(q, on);
	virtq_fence();          /* our wish before the caller's next look at the ring */
}

size_t iov_to_buf(const struct iovec *iov, unsigned n, size_t off, void *buf, size_t len)
{
	size_t done = 0;

	for (; n && done < len; iov++, n--) {
		if (off >= iov->iov_len) {
			off -= iov->iov_len;
			continue;
		}
		size_t part = MIN(iov->iov_len - off, len - done);

		memcpy((char *)buf + done, (char *)iov->iov_base + off, part);
		done += part;
		off = 0;
	}
	return done;
}

size_t iov_from_buf(const struct iovec *iov, unsigned n, size_t off, const void *buf, size_t len)
{
	size_t done = 0;

	for (; n && done < len; iov++, n--) {
		if (off >= iov->iov_len) {
			off -= iov->iov_len;
			continue;
		}
		size_t part = MIN(iov->iov_len - off, len - done);

		memcpy((char *)iov->iov_base + off, (const char *)buf + done, part);
		done += part;
		off = 0;
	}
	return done;
}

void iov_trim_front(struct iovec **iov, unsigned *n, size_t len)
{
	while (*n && len) {
		size_t part = MIN(len, (*iov)->iov_len);

		(*iov)->iov_base = (char *)(*iov)->iov_base + part;
		(*iov)->iov_len -= part;
		len -= part;
		if ((*iov)->iov_len)
			break;
		(*iov)++;
		(*n)--;
	}
}

void iov_trim_to(struct iovec *iov, unsigned *n, size_t len)
{
	unsigned i;

	for (i = 0; i < *n && len; i++) {
		iov[i].iov_len = MIN(len, iov[i].iov_len);
		len -= iov[i].iov_len;
	}
	*n = i;
}
