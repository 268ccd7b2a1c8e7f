/* What block.c and the drivers share. Private to this folder. */
#ifndef BLOCK_DRIVER_H
#define BLOCK_DRIVER_H

#include <pthread.h>

#include "block/block.h"

/*
 * An image format or protocol. Functions other than `fast` may block and run on workers, several at
 * once; they do the whole range or fail. Offsets and lengths are checked and multiples of 512.
 */
struct block_driver {
	const char *name;
	int (*read)(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len);
	int (*write)(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags);
	int (*flush)(struct block *b);
	int (*discard)(struct block *b, uint64_t off, uint64_t len);
	int (*zero)(struct block *b, uint64_t off, uint64_t len, unsigned flags);
	/* Answer now without waiting: true with r->ret set; false: not touched, or only rewritten the same later. */
	bool (*fast)(struct block *b, struct block_req *r);
	void (*close)(struct block *b);
};

struct overlay;

struct block {
	const struct block_driver *drv;
	char *id, *file;
	enum block_cache cache;
	bool read_only, discard_unmap, detect_zeroes;
	bool probed_raw;                /* the guest may not turn sector 0 into another format's header */
	uint64_t length;                /* rounded up to 512 */
	unsigned size;                  /* smallest request */
	struct loop *loop;
	struct workers *workers;

	pthread_mutex_t lock;
	pthread_cond_t idle;
	unsigned in_flight;
	char *owner;

	/* raw */
	int fd;
	bool is_dev;
	unsigned mem_align;             /* O_DIRECT: buffers and offsets; 0: none */
	bool no_nowait, in_memory;      /* atomic: RWF_NOWAIT does not work here; reads never wait (tmpfs) */
	bool no_discard, no_zero_range; /* atomic: the file system cannot */
	int flush_error;                /* atomic: a failed fdatasync lost data that no later one can save */
	pthread_rwlock_t rmw;           /* O_DIRECT: unaligned writes alone, aligned ones together */

	struct overlay *overlay;
};

extern const struct block_driver block_raw;
extern const struct block_driver block_overlay;

int raw_open(struct block *b, const struct block_opts *o, struct err *err);
int overlay_open(struct block *b, struct err *err);

/* QEMU's byte-range locks on an image. -EAGAIN names what holds it. */
int lock_image(int fd, const char *file, bool write, struct err *err);

/* Name of the format whose magic `head` (512 bytes or less) carries, or NULL. */
const char *probe_format(const uint8_t *head, size_t len);

/* A part [skip, skip+len) of a vector; returns the number of entries in `out` (room for `n`). */
int iov_slice(struct iovec *out, const struct iovec *iov, int n, uint64_t skip, uint64_t len);
bool iov_is_zero(const struct iovec *iov, int n);

#endif
