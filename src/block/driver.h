/*
 * What block.c and the drivers share. Private to this folder.
 *
 * A `struct block` is a node: a leaf (raw: a file or device), a format over a leaf in `child` (qcow2),
 * or the snapshot=on overlay over any node. Formats are straight-line code that may block; block.c runs
 * them on workers. They reach their file only through child->drv, so that tests can put a layer there
 * that loses power, tears writes and fails (tests/block/fault.c).
 */
#ifndef BLOCK_DRIVER_H
#define BLOCK_DRIVER_H

#include <pthread.h>

#include "base/keyvals.h"
#include "block/block.h"
#include "block/events.h"
#include "block/image.h"
#include "block/throttle.h"

/*
 * An image format or protocol. Functions other than `fast` may block and run on workers, several at
 * once; they do the whole range or fail. Requests from outside are checked and multiples of 512; a
 * leaf takes any offset and length from the format above it, reads zeroes past its end and grows when
 * written there. NULL: not supported (-ENOTSUP), except that map answers "all data".
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
	/* Start it without waiting: true: block_finish() or block_by_worker() follows; false: not touched. May be NULL. */
	bool (*submit)(struct block *b, struct block_req *r);
	/* block_poll(): end at least one that `submit` took; false: there is none. NULL: `submit` takes nothing that has to be asked for. */
	bool (*poll)(struct block *b);
	/* This node only: an extent that starts at `off`, at most `len` long, of one kind. */
	int (*map)(struct block *b, uint64_t off, uint64_t len, struct block_extent *e);
	int (*resize)(struct block *b, uint64_t size, enum block_prealloc p, struct err *err);
	/* The size of the file itself and its allocation; leaves only. */
	int64_t (*file_length)(struct block *b);
	int (*truncate)(struct block *b, uint64_t len);
	int (*allocate)(struct block *b, uint64_t off, uint64_t len, bool write);
	/* blkdebug and what stands on it: something is about to happen above; NULL: nobody wants to know. */
	void (*event)(struct block *b, enum block_event e);
	bool compressed;                /* of a filter: compressed writes go through, too */
	bool filter;                    /* shows its child's data: what asks for an image's place and kind looks through it */
	void (*close)(struct block *b);
};

struct foreign;
struct overlay;
struct qcow2;
struct nbd;

struct block {
	const struct block_driver *drv;
	char *id, *file;
	enum block_cache cache;
	bool read_only, discard_unmap, detect_zeroes, polled;
	bool probed_raw;                /* the guest may not turn sector 0 into another format's header */
	uint64_t length;                /* rounded up to 512 */
	unsigned size;                  /* smallest request */
	struct loop *loop;
	struct workers *workers;
	struct block *child;            /* a format's file, the overlay's base; owned */
	struct block *backing;          /* what a format does not hold; owned */
	struct block **more;            /* children besides `child` (blkverify, quorum); owned */
	unsigned nmore;
	char *node_name;                /* may be NULL */
	const char *bare;               /* block_opts.bare */

	pthread_mutex_t lock;
	pthread_cond_t idle;
	unsigned in_flight;
	bool held;                      /* new requests wait in `waiting` while the size changes */
	struct block_req *waiting, **waiting_tail;
	char *owner;
	struct block_listener listener;
	pthread_mutex_t listener_lock;
	struct throttle_group *throttle;

	/* raw */
	int fd;
	bool is_dev, ragged;            /* ragged: the size is no multiple of 512 */
	bool abandoned;                 /* its file is going to be removed */
	bool peeks;                     /* locked with IMAGE_PEEK */
	unsigned mem_align;             /* O_DIRECT: buffers and offsets; 0: none */
	bool no_nowait[2], in_memory;   /* atomic: RWF_NOWAIT does not work here, for reads and for writes; reads never wait (tmpfs) */
	bool no_discard, no_zero_range; /* atomic: the file system cannot */
	int flush_error;                /* atomic: a failed fdatasync lost data that no later one can save */
	uint64_t data_from, data_to;    /* no hole in here, when raw_map() looked last; under `lock` */
	unsigned data_turn;             /* counts what may have made holes; under `lock` */
	pthread_rwlock_t rmw;           /* O_DIRECT: unaligned writes alone, aligned ones together */

	struct uring *uring;            /* NULL: threads; else a list, one a loop */
	struct copier *copier;          /* NULL: whoever asks copies alone */

	/* null-co */
	uint64_t latency;               /* ns */
	bool null_zeroes;

	struct overlay *overlay;
	struct qcow2 *qcow2;
	struct nbd *nbd;
	struct foreign *foreign;        /* a format that is only read */
	void *state;                    /* a filter's own */
	uint64_t base;                  /* window: where in the child it begins */
	bool fixed;                     /* window: the size was given */
};

extern const struct block_driver block_raw;
extern const struct block_driver block_overlay;
extern const struct block_driver block_qcow2;

/* A node without a driver; NULL when memory is out. free_block() closes what is there, children too. */
struct block *block_new(const struct block_opts *o, struct loop *l, struct workers *w);
void block_free(struct block *b);

/* Of a plain file past the page cache: this place will be written soon; it reads as zeroes until then. */
void raw_reserve(struct block *b, uint64_t off, uint64_t len);
int raw_open(struct block *b, const struct block_opts *o, struct err *err);
/* o->leaf, or o->file as an NBD name. */
int nbd_open(struct block *b, const struct block_opts *o, struct err *err);
bool nbd_is_near(const struct block *b);        /* block_is_near() of an NBD leaf */
int null_open(struct block *b, const struct block_opts *o, struct err *err);
/* The file, device or server that `o` names. */
int leaf_open(struct block *b, const struct block_opts *o, struct err *err);

/* A "json:{...}" name or options taken apart: `o` is what to open, the rest what its pointers point to. */
struct block_name {
	struct block_opts o;
	struct keyvals all, leaf, backing, data;
	const char *filter;             /* the driver of a node that is neither format nor protocol; its options are `all` */
	bool below;                     /* `leaf` describes a node of another kind than file, nbd, null */
};
/* Also checks names. block_name_free() in any case. */
int block_name_resolve(struct block_name *n, const struct block_opts *o, struct err *err);
void block_name_free(struct block_name *n);

/* Before a format is opened: which of its options it does not know. */
int block_format_check(const struct block_opts *o, const char *what, const char *format, struct err *err);
/* raw with offset= or size=: a part of b->child. */
int window_open(struct block *b, const struct block_opts *o, struct err *err);
/* Put the overlay on `base`, which it owns afterwards. */
int overlay_open(struct block *b, struct block *base, struct err *err);
/* b->child is there; `depth` counts the files above in a backing chain. */
int qcow2_open(struct block *b, const struct block_opts *o, unsigned depth, struct err *err);
/* --- foreign.c: formats that are only read; b->child is there --- */
bool foreign_has_format(const char *name);
int foreign_open(struct block *b, const char *format, const struct block_opts *o, unsigned depth, struct err *err);
void foreign_info(const struct block *b, struct image_info *i);
int foreign_check(struct block *b, struct image_check *c, struct err *err);

/* Any node; see block_name_resolve() for what `o` may say. */
int block_open_node(struct block **out, const struct block_opts *o, struct loop *l, struct workers *w, unsigned depth, struct err *err);
/* A backing file, read-only; `depth` bounds the chain. */
int block_open_backing(struct block **out, const struct block_opts *o, struct block *above, unsigned depth, struct err *err);

/* --- block.c, for drivers and limits --- */
/* A checked request on its way: now, asynchronously, or by a worker. */
void block_dispatch(struct block_req *r);
void block_by_worker(struct block_req *r);
void block_finish(struct block_req *r);
/* From a node above to a leaf, counted as its own; false: not taken. */
bool block_submit_below(struct block *leaf, struct block_req *r);

/* --- throttle.c --- */
/* False: it waits, and block_dispatch() is called later. */
bool throttle_admit(struct throttle_group *g, struct block_req *r);
/* Wait until `bytes` may go, for a node in the middle of a graph; *stop (atomic) and throttle_wake() end the waiting. */
void throttle_wait(struct throttle_group *g, bool write, uint64_t bytes, const unsigned *stop);
void throttle_wake(struct throttle_group *g);
/* Dispatch at once what waits for this node. */
void throttle_release(struct throttle_group *g, struct block *b);

/* --- uring.c --- */
int uring_open(struct block *b);
void uring_close(struct block *b);
int uring_move(struct block *b, struct loop *const *l, unsigned n);
bool uring_submit(struct block *b, struct block_req *r);
/* Send what was prepared and wait for one completion at least; false: none is to come. */
bool uring_wait(struct block *b);
/* Of a polled node: several requests at a time are done when the kernel has taken them, lately: they are copies, by this thread. */
bool uring_copies(const struct block *b);
/* Something is in the kernel (of the first ring). */
bool uring_busy(struct block *b);
void uring_kick(struct block *b);

/* --- copy.c: long reads of a leaf with a ring, from memory --- */
void copy_open(struct block *b);
void copy_close(struct block *b);       /* waits for helpers */
/* False: not taken. With BLOCK_REQ_MORE it begins with copy_kick(). */
bool copy_submit(struct block *b, struct block_req *r);
void copy_kick(struct block *b);
/* It is a long read, and somebody is there to do it meanwhile. */
bool copy_has_helper(struct block *b, const struct block_req *r);
/* All of it from the page cache, or false. */
bool raw_read_cached(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len);

int raw_flush_failed(struct block *b, int error);
int raw_sync_flags(const struct block *b, unsigned flags);

/* QEMU's byte-range locks on an image. -EAGAIN names what holds it. A backing file may have other readers only. */
enum lock_mode {
	IMAGE_PEEK,      /* reads what others may write meanwhile */
	IMAGE_READ,
	IMAGE_WRITE,
};
int lock_image(int fd, const char *file, enum lock_mode mode, struct err *err);

void unlock_image(int fd);

/* Name of the format whose magic `head` (512 bytes or less) carries, or NULL. */
const char *probe_format(const uint8_t *head, size_t len);

/* A part [skip, skip+len) of a vector; returns the number of entries in `out` (room for `n`). */
int iov_slice(struct iovec *out, const struct iovec *iov, int n, uint64_t skip, uint64_t len);
bool iov_is_zero(const struct iovec *iov, int n);
void iov_zero(const struct iovec *iov, int n);
typedef int block_write_fn(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags);
/* Zeroes by writing them with `write`, as long as that returns 0. */
int zero_by_writing(struct block *b, uint64_t off, uint64_t len, unsigned flags, block_write_fn *write);
/* All of it, to `buf` or from it. */
void iov_copy(const struct iovec *iov, int n, uint8_t *buf, bool to_buf);

#endif
