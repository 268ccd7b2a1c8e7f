/*
 * Block back ends: a disk image behind a small table of functions. Cannot see a guest.
 *
 * Requests are scatter-gather. block_submit() may complete before it returns (the page cache had
 * it), on a worker, or on the loop's thread; `done` is called exactly once, on whichever thread
 * that is, with no lock of the block layer held. Offsets and lengths are bytes, multiples of
 * block_size(). A flush completes after everything that completed before it was submitted is on
 * stable storage.
 */
#ifndef BLOCK_BLOCK_H
#define BLOCK_BLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"

struct block;
struct keyvals;
struct tls_store;
struct loop;
struct workers;
struct throttle_group;
struct throttle_set;

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_ZERO };
enum { BLOCK_REQ_FUA = 1, BLOCK_REQ_MAY_UNMAP = 2, BLOCK_REQ_INLINE = 4 /* caller can wait for a short copy */,
       BLOCK_REQ_MORE = 8 /* more follows at once, then block_unplug() */,
       BLOCK_REQ_BELOW = 1 << 10 /* the block layer's: a node above holds something until this is done */,
       BLOCK_REQ_NO_FALLBACK = 16, /* ZERO: fail with -ENOTSUP rather than write zeroes */
       BLOCK_REQ_OWN = 32 /* ZERO: of the image's own, even where what is below reads as zero now */ };

struct block_req {
	enum block_op op;
	unsigned flags;
	uint64_t off, len;
	const struct iovec *iov;        /* READ and WRITE; must stay valid until done */
	int iovcnt;
	int ret;                        /* 0 or -errno, set before done */
	unsigned lane;                  /* which of block_set_loops() the completion goes to, modulo their number */
	void (*done)(struct block_req *r);
	struct block *blk;              /* set by block_submit */
	struct block_req *next;         /* the block layer's */
	uint64_t priv[4];               /* the driver's */
};

/* Formats that can be opened; the last four are only read. */
#define BLOCK_FORMATS "raw, qcow2, vdi, vhdx, vmdk, vpc"
/* What may stand above other nodes. */
#define BLOCK_FILTERS "blkdebug, blklogwrites, blkverify, compress, copy-on-read, preallocate, quorum, throttle"
/* 0, or -ENOTSUP and the list. */
int block_check_format(const char *what, const char *format, struct err *err);

enum block_aio { AIO_AUTO, AIO_THREADS, AIO_NATIVE, AIO_IO_URING };
enum block_cache { CACHE_WRITEBACK, CACHE_NONE, CACHE_WRITETHROUGH, CACHE_DIRECTSYNC, CACHE_UNSAFE };

/* What a format takes besides names; 0 is "not given" everywhere. */
enum block_tristate { TRI_DEFAULT, TRI_OFF, TRI_ON };
struct block_format_opts {
	/* qcow2; sizes in bytes */
	uint64_t cache_size, l2_cache, ref_cache, l2_entry, clean_interval /* seconds */;
	enum block_tristate lazy, pass_request, pass_snapshot, pass_other;
	/* raw: the part of the file that is the disk */
	uint64_t offset, size;
	bool has_size;
	const char *qcow2_only, *raw_only; /* a key that was given */
};

struct block_opts {
	const char *id;
	/* A path, nbd:..., nbd://... and the like (block/nbd.h), or json:{"driver": ...} */
	const char *file;
	/* Or, instead of `file`, a node's options, flat: driver=qcow2, file.driver=nbd, file.server.type=unix, ... */
	const struct keyvals *options;
	const struct keyvals *leaf;     /* the same of the leaf alone (driver=nbd, ...), under `format` */
	struct { bool on, zeroes; uint64_t size, latency /* ns */; } null; /* driver=null-co: no file at all; set by block_name_resolve() */
	const struct tls_store *tls;    /* credentials that options may name; may be NULL */
	const char *format;             /* "raw"; NULL probes */
	bool read_only, snapshot;       /* snapshot: writes go to a temporary file that is gone at the end */
	enum block_cache cache;
	enum block_aio aio;
	struct throttle_group *throttle; /* may be NULL; the block takes a reference */
	const struct throttle_set *throttles; /* groups that driver=throttle may name; may be NULL */
	const char *node_name;          /* set by block_name_resolve() */
	bool protocol;                  /* a file below something: its format is not probed */
	const char *bare;               /* a protocol's node that no format stands on: its driver; set by block_name_resolve() */
	bool copy_on_read;              /* what a read finds in a backing file is written to the image */
	struct block_format_opts fmt;
	const struct keyvals *backing_options, *data_options; /* nodes instead of the names in the image */
	bool no_lock;                   /* locking=off */
	bool discard_unmap, detect_zeroes;
	bool auto_read_only;            /* a file or export that may not be written opens read-only */
	/* For the image tools. */
	bool shared;                    /* read whatever others do with the image; take no locks */
	bool peek;                      /* read-only: of a raw image, as it holds nothing but data, others may write meanwhile */
	bool no_backing;                /* do not open the backing file: what is not in this file reads as zeroes */
	bool as_is;                     /* open what is dirty or marked corrupt too, repair nothing (check does) */
	const char *backing;            /* instead of the one the image names */
	const char *backing_format;
	const char *internal;           /* read this internal snapshot (id or name) */
	bool polled;                    /* one thread makes all requests and calls block_poll(); neither loop nor workers */
};

/* Take what a node of any kind may carry (read-only, cache.*, discard, ...) from `l`. */
int block_node_keys(struct keyvals *l, const char *what, struct block_opts *o, struct err *err);
/* Take what qcow2 and raw know as options (l2-cache-size=, offset=, ...) from `l`. */
int block_format_keys(struct keyvals *l, const char *what, struct block_opts *o, struct err *err);
/* aio= with its value (NULL: not given), once the cache mode is known; native wants one that bypasses the page cache. */
int block_aio_key(const char *what, const char *v, struct block_opts *b, struct err *err);
/* Is this a protocol's name (nbd:..., json:{...}: a colon before any slash) rather than a path, so that no directory can stand before it? */
bool block_name_is_protocol(const char *file);
/* The path in a name of a file: without file: or host_device:. */
const char *block_plain_path(const char *file);
int block_open(struct block **out, const struct block_opts *o, struct loop *l, struct workers *w, struct err *err);
/* Drains, flushes (unless CACHE_UNSAFE), closes. */
void block_close(struct block *b);
/* The same for who wants to know whether all of it is on the disk: 0 or -errno. */
int block_close_checked(struct block *b);
/* Its file is going to be removed: closing writes nothing more to it and complains about nothing. */
void block_abandon(struct block *b);
/* The same after CACHE_UNSAFE: now it is worth waiting for the disk. */
int block_sync_close(struct block *b);
/* Stop keeping writers out of this read-only image (commit writes to its own backing file). */
void block_unlock(struct block *b);

void block_submit(struct block *b, struct block_req *r);
/* After requests with BLOCK_REQ_MORE: nothing more follows. */
void block_unplug(struct block *b);
/*
 * Of a node opened with `polled`: wait until something that was submitted is done, and end it, in this thread. False: nothing is under
 * way. What cannot be started without waiting is done by block_submit() itself, after all that was under way.
 */
bool block_poll(struct block *b);
/* Can reads, or writes, be under way together, so that block_poll() is worth while? */
bool block_can_poll(const struct block *b, bool write);
/*
 * What block_poll() waited for lately was no waiting: each time all requests, several, were copies that the thread made itself. More threads would make them
 * at once (image_read(), image_write(); nothing is under way then).
 */
bool block_copies(const struct block *b);
/*
 * Complete requests on these loops' threads from now on, each on the one that its `lane` names (or on a worker). No request is in
 * flight. On an error completions stay, or go to fewer of them.
 */
enum { BLOCK_LOOPS_MAX = 16 };
int block_set_loops(struct block *b, struct loop *const *l, unsigned n, struct err *err);
static inline int block_set_loop(struct block *b, struct loop *l, struct err *err) { return block_set_loops(b, &l, 1, err); }
/* Wait until no request is in flight. What limits held back goes at once. */
void block_drain(struct block *b);

uint64_t block_length(const struct block *b);           /* bytes, rounded up to 512 */
unsigned block_size(const struct block *b);             /* smallest request, 512 or 4096 */
bool block_read_only(const struct block *b);
bool block_write_cache(const struct block *b);          /* false: every write is stable when it completes */
const char *block_id(const struct block *b);
bool block_is_remote(const struct block *b);            /* a server answers: waiting is not computing */
bool block_is_near(const struct block *b);              /* it does, and its end is on this machine: what takes time is copying */
const char *block_name(const struct block *b);          /* file name, for messages */
/* At most one device owns a back end: -EBUSY names the owner. */
int block_attach(struct block *b, const char *owner, struct err *err);
/* What the owner wants to know; any thread, no lock of the block layer held. */
struct block_listener { void (*resized)(void *opaque); void *opaque; };
void block_listen(struct block *b, const struct block_listener *l);     /* NULL: no more; waits for a call under way */
/* While a guest uses it: waits for requests in flight, holds back new ones, tells the owner. Bytes, a multiple of block_size(). */
int block_resize(struct block *b, uint64_t size, struct err *err);
/* Limits at run time; NULL when there never were any. */
struct throttle_group *block_throttle(const struct block *b);
void block_detach(struct block *b);

#endif
