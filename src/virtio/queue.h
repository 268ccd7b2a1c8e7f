/*
 * Virtqueues: split and packed rings (virtio 1.2, 2.7 and 2.8) behind one face.
 *
 * Device code never sees a ring. It pops a chain, which is a copy: host pointers and lengths of the
 * buffers, those the device reads (`out`) apart from those it writes (`in`), all checked. It pushes
 * the chain back with the number of bytes written, and asks whether the driver wants to be told.
 *
 * Security. Everything in a ring is written by a hostile guest, while we read it.
 *  - The three areas of a ring are translated when the queue is enabled, for the size negotiated
 *    then; size, addresses and positions live here, never in guest memory. A position the guest
 *    gives (the available index, `next`, an indirect table) is compared with our own before use.
 *  - A descriptor is loaded once, into a local copy with a compiler barrier behind it; checks and
 *    uses see the same bytes. Data buffers stay shared: a device must copy what it decides on.
 *  - A chain holds at most VIRTQ_MAX_SEGS buffers and at most `size` ring descriptors (2.7.5.3.1);
 *    a table at most VIRTQ_MAX_SEGS; so a loop ends there. Readable buffers come first. Lengths
 *    are non-zero, sums are 64-bit and capped at 4 GiB, each buffer is RAM from end to end.
 *  - At most `size` chains are out at once, whatever the guest publishes.
 *  - A violation breaks the queue: nothing is popped any more until reset, the device shows
 *    DEVICE_NEEDS_RESET (2.1.2) and one rate-limited line is logged.
 *  - Pops are bounded by the caller's budget; the ring itself never loops over guest-sized work.
 * The caller holds the device's lock for every call.
 */
#ifndef VIRTIO_QUEUE_H
#define VIRTIO_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"
#include "core/mem.h"

#define VIRTQ_MAX_SIZE 1024     /* descriptors in a ring */
#define VIRTQ_MAX_SEGS 1024     /* buffers in a chain; also IOV_MAX */

/*
 * A popped chain. Zeroed memory is an empty one; its storage grows when needed and is kept for the
 * next pop until virtq_chain_free(). A device may shorten or move within `out` and `in`: what push
 * marks as written is remembered apart.
 */
struct virtq_chain {
	struct iovec *out, *in;         /* device reads | device writes */
	unsigned n_out, n_in;
	uint64_t out_len, in_len;
	/* The queue's own: */
	uint16_t id, ndesc;             /* head or buffer id; ring descriptors taken */
	unsigned n_segs, cap;
	struct iovec *iov;
	uint64_t *gpa;                  /* of the writable ones, in order */
	uint32_t *len;
	unsigned n_w;
};
void virtq_chain_free(struct virtq_chain *c);
/* Give back the storage of a chain that grew large; call when a chain goes back to a pool. */
void virtq_chain_trim(struct virtq_chain *c);

struct virtq {
	struct guest_mem *mem;
	const char *name;               /* device, for messages */
	uint16_t index;
	/* Set by the transport; fixed while enabled. */
	uint16_t size, max_size;
	uint64_t desc_gpa, driver_gpa, device_gpa;
	bool packed, event_idx, indirect;
	bool enabled, broken;
	/* Host addresses of the three areas. */
	uint8_t *desc, *driver, *device;
	uint16_t next_avail, next_used; /* split: free running; packed: slot */
	bool avail_wrap, used_wrap;     /* packed */
	uint16_t filled;                /* used elements not yet published: chains | slots */
	uint16_t signalled;             /* used position at the last notification */
	bool signalled_valid;
	bool kicks_on;                  /* driver is asked to notify */
	uint32_t in_use;                /* split: chains out; packed: slots out */
	uint16_t first_flags;           /* packed: flags of the first filled slot, written by flush */
	struct virtq_scratch *scratch;
};

int virtq_init(struct virtq *q, struct guest_mem *m, const char *name, unsigned index, unsigned max_size,
	       struct err *err);
void virtq_destroy(struct virtq *q);
/* Back to disabled, positions zero. Chains still out must never be pushed afterwards. */
void virtq_reset(struct virtq *q);
/* Translate the rings and start: 0, or -EINVAL (size, alignment) or -EFAULT (not RAM). */
int virtq_enable(struct virtq *q);

/* 1: popped, 0: nothing there, -EIO: the queue is (now) broken, -ENOMEM. */
int virtq_pop(struct virtq *q, struct virtq_chain *c);
/* Is something there? A broken or disabled queue is empty. */
bool virtq_empty(struct virtq *q);
/* Undo the latest pop (and then the one before, and so on). */
void virtq_unpop(struct virtq *q, struct virtq_chain *c);
/* Hand chains back: fill several, then flush makes all visible at once. `written` counts bytes in `in`. */
void virtq_fill(struct virtq *q, struct virtq_chain *c, uint32_t written);
void virtq_flush(struct virtq *q);
static inline void virtq_push(struct virtq *q, struct virtq_chain *c, uint32_t written)
{
	virtq_fill(q, c, written);
	virtq_flush(q);
}
/* Does the driver want an interrupt for what was flushed since this was last asked? */
bool virtq_should_notify(struct virtq *q);
/*
 * Ask for kicks, or say that none are needed while the queue is being worked on. After switching on,
 * look with virtq_empty() again: what came in between was not announced.
 */
void virtq_want_kicks(struct virtq *q, bool on);

/* iovec helpers. Bytes copied, at most `len`. */
size_t iov_to_buf(const struct iovec *iov, unsigned n, size_t off, void *buf, size_t len);
size_t iov_from_buf(const struct iovec *iov, unsigned n, size_t off, const void *buf, size_t len);
/* Drop `len` bytes at the front, or keep only the first `len`; fewer when there are fewer. */
void iov_trim_front(struct iovec **iov, unsigned *n, size_t len);
void iov_trim_to(struct iovec *iov, unsigned *n, size_t len);

#endif
