/*
 * Graphs: nodes above nodes of any kind. Private to this folder.
 *
 * A filter (throttle, copy-on-read, blkdebug, ...) stands above one child or more and has a function for everything that a
 * leaf has, so that a format may stand on it. Formats are no leaves: where one stands below another node that grows or truncates
 * its file, a fit (fit.c) between them does what a leaf would. Nothing here is passed by requests of plain stacks.
 */
#ifndef BLOCK_GRAPH_H
#define BLOCK_GRAPH_H

#include "block/driver.h"

bool filter_has_driver(const char *name);
/* A name like blkdebug:CONFIG:FILE or blkverify:RAW:IMAGE, and what it says. */
bool filter_is_name(const char *file);
int filter_name(struct block_name *n, const char *file, struct err *err);
/* The node that n->filter names, with its children. */
int filter_open(struct block **out, struct block_name *n, struct loop *l, struct workers *w, unsigned depth, struct err *err);

/* How a child is opened whose options stand under `key` ("file"). */
struct filter_child { const char *key; bool disk; /* an image with a format, not a file */ bool optional; const char *name; /* instead of options */ };
/* Open it as a child of `b`. 0 with *out NULL: optional and not there. */
int filter_open_child(struct block **out, struct block *b, struct block_name *n, const struct filter_child *c, unsigned depth, struct err *err);
/* b->child from `key`; size, length and so on as the child's. */
int filter_open_file(struct block *b, struct block_name *n, const char *key, unsigned depth, struct err *err);
/* An option that is a size in bytes; 0 and *v untouched when it is not there. */
int filter_size(struct block_name *n, const char *key, uint64_t *v, struct err *err);
int filter_add_child(struct block *b, struct block *child); /* to b->more; -ENOMEM closes it */

/* A file for what stands above: `*node` itself when it behaves like one, else a fit on it. */
int fit_open(struct block **node, struct err *err);
/* Cache mode and permissions as a format wants its file to have them, in all nodes down to the files. */
void graph_adopt(struct block *b, enum block_cache cache, bool read_only);
/* What filters show. */
struct block *graph_skip_filters(struct block *b);
/* Call for `b` and everything below. */
void graph_walk(struct block *b, void (*fn)(struct block *b, void *opaque), void *opaque);

/* What filters do that have nothing to do: the child's functions (b->child). */
int pass_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len);
int pass_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags);
int pass_flush(struct block *b);
int pass_discard(struct block *b, uint64_t off, uint64_t len);
int pass_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags);
bool pass_fast(struct block *b, struct block_req *r); /* never at once */
int pass_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e);
int pass_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err);
int64_t pass_file_length(struct block *b);
int pass_truncate(struct block *b, uint64_t len);
int pass_allocate(struct block *b, uint64_t off, uint64_t len, bool write);
void pass_event(struct block *b, enum block_event e);
#define PASS_MOVES .read = pass_read, .write = pass_write, .discard = pass_discard, .zero = pass_zero, .flush = pass_flush
#define PASS_PLACE_BUT_MAP                                                                                             \
	.fast = pass_fast, .resize = pass_resize, .file_length = pass_file_length, .truncate = pass_truncate, .allocate = pass_allocate
#define PASS_PLACE PASS_PLACE_BUT_MAP, .map = pass_map

static inline void block_event(struct block *b, enum block_event e)
{
	if (b->drv->event)
		b->drv->event(b, e);
}

/* --- the drivers; b->drv and b->child are set when they return 0 --- */
int throttle_node_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);

int blkdebug_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int blklogwrites_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int blkverify_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int preallocate_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int quorum_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int compress_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);
int cor_open(struct block *b, struct block_name *n, unsigned depth, struct err *err);

/*
 * Copy on read: what a read of the qcow2 image `b` would find in its backing files is written to the image, down to what `bottom`
 * holds (NULL: all of it, zeroes too).
 */
int cor_fill(struct block *b, struct block *bottom, uint64_t off, uint64_t len);
/* -drive copy-on-read=on, qemu-io -C: an image without backing files has nothing to copy. */
int cor_enable(struct block *b, struct err *err);

/* throttle nodes let everything pass while a drain waits (`on`). */
void throttle_node_release(struct block *b, void *on);

#endif
