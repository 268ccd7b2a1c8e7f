/*
 * Split ring (virtio 1.2, 2.7).
 *
 *   desc    size x { le64 addr; le32 len; le16 flags; le16 next }
 *   driver  le16 flags; le16 idx; le16 ring[size]; le16 used_event
 *   device  le16 flags; le16 idx; { le32 id; le32 len } ring[size]; le16 avail_event
 *
 * Indices run freely through 65536 and name slot idx % size.
 */
#include <errno.h>

#include "virtio/queue_priv.h"

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };

static uint16_t avail_idx(const struct virtq *q)
{
	return virtq_load16(q->driver + 2);
}

bool split_empty(struct virtq *q)
{
	return avail_idx(q) == q->next_avail;
}

static void avail_event_set(struct virtq *q)
{
	uint32_t off = 4 + 8 * q->size;

	virtq_store16(q->device + off, q->next_avail);
	gm_written(q->mem, q->device_gpa + off, 2);
}

static int gather(struct virtq *q, uint16_t head, uint16_t *ndesc)
{
	uint16_t i = head;

	virtq_scratch_start(q);
	for (unsigned seen = 0; seen < q->size; seen++) {
		struct vdesc d;
		int r;

		if (i >= q->size)
			return virtq_break(q, "descriptor index outside of the ring");
		d = virtq_load_desc(q->desc + i * 16u);
		if (d.a & DESC_INDIRECT) {
			if (d.a & DESC_NEXT)
				return virtq_break(q, "indirect descriptor with a next one");
			r = virtq_scratch_table(q, d.addr, d.len, true);
		} else {
			r = virtq_scratch_add(q, d.addr, d.len, d.a & DESC_WRITE);
		}
		if (r)
			return r;
		if (!(d.a & DESC_NEXT)) {
			*ndesc = seen + 1;
			return 0;
		}
		i = d.b;
	}
	return virtq_break(q, "loop in a chain");
}

int split_pop(struct virtq *q, struct virtq_chain *c)
{
	uint16_t idx = avail_idx(q), head, ndesc = 0, n = idx - q->next_avail;
	int r;

	if (!n)
		return 0;
	if (n > q->size)
		return virtq_break(q, "available index jumped");
	if (q->in_use >= q->size)
		return virtq_break(q, "more chains than the ring can hold");
	head = virtq_load16(q->driver + 4 + 2 * (q->next_avail & (q->size - 1)));
	r = gather(q, head, &ndesc);
	if (r)
		return r;
	r = virtq_scratch_finish(q, c, head, ndesc);
	if (r < 0)
		return r;
	q->next_avail++;
	q->in_use++;
	if (q->event_idx && q->kicks_on)
		avail_event_set(q);
	return 1;
}

void split_unpop(struct virtq *q, struct virtq_chain *c)
{
	q->next_avail--;
	q->in_use--;
	if (q->event_idx && q->kicks_on)
		avail_event_set(q);
}

void split_fill(struct virtq *q, struct virtq_chain *c, uint32_t written)
{
	uint32_t off = 4 + 8 * ((uint16_t)(q->next_used + q->filled) & (q->size - 1));
	uint32_t e[2] = { c->id, written };

	memcpy(q->device + off, e, 8);
	gm_written(q->mem, q->device_gpa + off, 8);
	q->filled++;
	q->in_use--;
}

void split_flush(struct virtq *q)
{
	uint16_t old = q->next_used;

	q->next_used += q->filled;
	virtq_store16(q->device + 2, q->next_used);
	gm_written(q->mem, q->device_gpa + 2, 2);
	/* Once the used index has gone past `signalled` by a whole turn its distance means nothing. */
	if ((uint16_t)(q->next_used - q->signalled) < (uint16_t)(q->next_used - old))
		q->signalled_valid = false;
	q->filled = 0;
}

/* 2.7.10: with event_idx, when the used index moved past used_event since the last time. */
bool split_should_notify(struct virtq *q)
{
	uint16_t old = q->signalled, event;
	bool valid = q->signalled_valid;

	if (!q->event_idx)
		return !(virtq_load16(q->driver) & AVAIL_NO_INTERRUPT);
	q->signalled = q->next_used;
	q->signalled_valid = true;
	event = virtq_load16(q->driver + 4 + 2 * q->size);
	return !valid || (uint16_t)(q->next_used - event - 1) < (uint16_t)(q->next_used - old);
}

void split_want_kicks(struct virtq *q, bool on)
{
	if (q->event_idx) {
		if (on)
			avail_event_set(q);
		return;
	}
	virtq_store16(q->device, on ? 0 : USED_NO_NOTIFY);
	gm_written(q->mem, q->device_gpa, 2);
}
