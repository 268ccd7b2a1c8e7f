/* Between queue.c and the two ring formats. */
#ifndef VIRTIO_QUEUE_PRIV_H
#define VIRTIO_QUEUE_PRIV_H

#include "base/util.h"
#include "virtio/queue.h"

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, DESC_AVAIL = 1 << 7, DESC_USED = 1 << 15 };

/* Both formats' descriptors are 16 bytes: address, length, and two 16-bit fields. */
struct vdesc {
	uint64_t addr;
	uint32_t len;
	uint16_t a, b;          /* split: flags, next; packed: id, flags */
};

/* Room for the longest chain, so that a chain's own storage is exactly what it needs. */
struct virtq_scratch {
	struct { uint64_t gpa; void *host; uint32_t len; } seg[VIRTQ_MAX_SEGS];
	unsigned n, n_out;
	uint64_t out_len, in_len;
};

int virtq_break(struct virtq *q, const char *why);      /* -EIO */

/* One load of 16 bytes that the guest may be changing; what comes back is private. */
static inline struct vdesc virtq_load_desc(const void *p)
{
	struct vdesc d;

	memcpy(&d, p, sizeof(d));
	__asm__ volatile("" : "+m"(d) : : "memory");
	return d;
}

static inline uint16_t virtq_load16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
static inline void virtq_store16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
/* Store before load, both ways; a locked instruction is the cheapest full barrier on x86, and TSan takes it. */
static inline void virtq_fence(void) { __asm__ volatile("lock; orl $0, (%%rsp)" : : : "memory", "cc"); }

void virtq_scratch_start(struct virtq *q);
/* Add one buffer: 0 or -EIO (broken). */
int virtq_scratch_add(struct virtq *q, uint64_t gpa, uint32_t len, bool write);
/* Add all buffers of an indirect table; `chained` when its entries are linked (split) and not in order. */
int virtq_scratch_table(struct virtq *q, uint64_t gpa, uint32_t len, bool chained);
/* Move what was gathered into the chain: 1, or -ENOMEM. */
int virtq_scratch_finish(struct virtq *q, struct virtq_chain *c, uint16_t id, uint16_t ndesc);

int split_pop(struct virtq *q, struct virtq_chain *c);
bool split_empty(struct virtq *q);
void split_unpop(struct virtq *q, struct virtq_chain *c);
void split_fill(struct virtq *q, struct virtq_chain *c, uint32_t written);
void split_flush(struct virtq *q);
bool split_should_notify(struct virtq *q);
void split_want_kicks(struct virtq *q, bool on);

int packed_pop(struct virtq *q, struct virtq_chain *c);
bool packed_empty(struct virtq *q);
void packed_unpop(struct virtq *q, struct virtq_chain *c);
void packed_fill(struct virtq *q, struct virtq_chain *c, uint32_t written);
void packed_flush(struct virtq *q);
bool packed_should_notify(struct virtq *q);
void packed_want_kicks(struct virtq *q, bool on);

#endif
