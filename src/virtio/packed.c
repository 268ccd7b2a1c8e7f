/*
 * Packed ring (virtio 1.2, 2.8).
 *
 *   desc    size x { le64 addr; le32 len; le16 id; le16 flags }, read and overwritten in place
 *   driver  le16 off_wrap; le16 flags     what the driver wants to be told
 *   device  le16 off_wrap; le16 flags     what we want to be told
 *
 * A slot is available when its AVAIL bit equals our wrap counter and its USED bit does not; used
 * when both equal the used wrap counter. A chain takes consecutive slots and gives back one used
 * element, the others are skipped.
 */
#include <errno.h>

#include "virtio/queue_priv.h"

enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 };

static uint8_t *slot(const struct virtq *q, unsigned i)
{
	return q->desc + i * 16u;
}

static bool flags_avail(uint16_t flags, bool wrap)
{
	return !!(flags & DESC_AVAIL) == wrap && !!(flags & DESC_USED) != wrap;
}

bool packed_empty(struct virtq *q)
{
	return !flags_avail(virtq_load16(slot(q, q->next_avail) + 14), q->avail_wrap);
}

static void event_set(struct virtq *q, uint16_t flags)
{
	virtq_store16(q->device, q->next_avail | q->avail_wrap << 15);
	virtq_store16(q->device + 2, flags);
	gm_written(q->mem, q->device_gpa, 4);
}

static void avail_advance(struct virtq *q, unsigned n)
{
	unsigned pos = q->next_avail + n;

	if (pos >= q->size) {
		pos -= q->size;
		q->avail_wrap = !q->avail_wrap;
	}
	q->next_avail = pos;
}

/*
 * The head's flags were seen with acquire order, so the rest of its chain is there too (2.8.21.1).
 * Flags are read again with the descriptor, and it is that copy which is judged.
 */
static int gather(struct virtq *q, uint16_t *id, uint16_t *ndesc)
{
	unsigned pos = q->next_avail;

	virtq_scratch_start(q);
	for (unsigned seen = 0; seen < q->size; seen++) {
		struct vdesc d = virtq_load_desc(slot(q, pos));
		int r;

		if (d.b & DESC_INDIRECT) {
			if (seen || (d.b & DESC_NEXT))
				return virtq_break(q, "indirect descriptor in a chain");
			r = virtq_scratch_table(q, d.addr, d.len, false);
		} else {
			r = virtq_scratch_add(q, d.addr, d.len, d.b & DESC_WRITE);
		}
		if (r)
			return r;
		if (!(d.b & DESC_NEXT)) {
			*id = d.a;
			*ndesc = seen + 1;
			return 0;
		}
		pos = pos + 1 == q->size ? 0 : pos + 1;
	}
	return virtq_break(q, "chain longer than the ring");
}

int packed_pop(struct virtq *q, struct virtq_chain *c)
{
	uint16_t id = 0, ndesc = 0;
	int r;

	if (packed_empty(q))
		return 0;
	r = gather(q, &id, &ndesc);
	if (r)
		return r;
	if (q->in_use + ndesc > q->size)
		return virtq_break(q, "more descriptors than the ring can hold");
	r = virtq_scratch_finish(q, c, id, ndesc);
	if (r < 0)
		return r;
	avail_advance(q, ndesc);
	q->in_use += ndesc;
	if (q->event_idx && q->kicks_on)
		event_set(q, EVENT_DESC);
	return 1;
}

void packed_unpop(struct virtq *q, struct virtq_chain *c)
{
	int pos = (int)q->next_avail - c->ndesc;

	if (pos < 0) {
		pos += q->size;
		q->avail_wrap = !q->avail_wrap;
	}
	q->next_avail = pos;
	q->in_use -= c->ndesc;
	if (q->event_idx && q->kicks_on)
		event_set(q, EVENT_DESC);
}

/* The first element's flags wait for flush: the driver looks at elements in order. */
void packed_fill(struct virtq *q, struct virtq_chain *c, uint32_t written)
{
	unsigned pos = q->next_used + q->filled;
	bool wrap = q->used_wrap;
	uint16_t flags;

	if (pos >= q->size) {
		pos -= q->size;
		wrap = !wrap;
	}
	flags = (written ? DESC_WRITE : 0) | (wrap ? DESC_AVAIL | DESC_USED : 0);
	memcpy(slot(q, pos) + 8, &written, 4);
	memcpy(slot(q, pos) + 12, &c->id, 2);
	if (q->filled)
		virtq_store16(slot(q, pos) + 14, flags);
	else
		q->first_flags = flags;
	gm_written(q->mem, q->desc_gpa + pos * 16u, 16);
	q->filled += c->ndesc;
	q->in_use -= c->ndesc;
}

void packed_flush(struct virtq *q)
{
	unsigned pos = q->next_used + q->filled;

	virtq_store16(slot(q, q->next_used) + 14, q->first_flags);
	gm_written(q->mem, q->desc_gpa + q->next_used * 16u, 16);
	if (pos >= q->size) {
		pos -= q->size;
		q->used_wrap = !q->used_wrap;
		/* Positions count from the start of the current turn below; keep `signalled` comparable. */
		q->signalled -= q->size;
	}
	q->next_used = pos;
	q->filled = 0;
}

/* 2.8.10.1: the driver's event structure, position compared within the current turn. */
bool packed_should_notify(struct virtq *q)
{
	uint16_t flags = virtq_load16(q->driver + 2), off_wrap, event, old = q->signalled;
	bool valid = q->signalled_valid;

	q->signalled = q->next_used;
	q->signalled_valid = true;
	if (flags == EVENT_DISABLE)
		return false;
	if (flags != EVENT_DESC || !q->event_idx || !valid)
		return true;
	off_wrap = virtq_load16(q->driver);
	event = off_wrap & 0x7fff;
	if ((off_wrap >> 15) != q->used_wrap)
		event -= q->size;
	return (uint16_t)(q->next_used - event - 1) < (uint16_t)(q->next_used - old);
}

void packed_want_kicks(struct virtq *q, bool on)
{
	event_set(q, !on ? EVENT_DISABLE : q->event_idx ? EVENT_DESC : EVENT_ENABLE);
}
