/*
 * Disks for other virtual machine monitors: a vhost-user-blk back end on a Unix socket (virtio 1.2, 5.2; QEMU's
 * docs/interop/vhost-user.rst). NBD exports are block/nbd.h's.
 *
 * One front end at a time; others wait in the socket's queue. A thread for the messages, one a queue; the block's workers for
 * what the page cache does not have. The peer is hostile: memory is reached through core/mem.h, rings through virtio/queue.h.
 * What it can do is end the process with SIGBUS, by making its memory's file shorter; files that are sealed against that
 * (memfd, QEMU's default) cannot.
 */
#ifndef EXPORT_EXPORT_H
#define EXPORT_EXPORT_H

#include "block/block.h"

struct vhost_blk;

struct vhost_blk_opts {
	const char *id;                 /* for messages */
	struct block *blk;              /* opened with workers; the caller closes it after vhost_blk_free() */
	bool writable;
	unsigned num_queues;            /* 1 to 64 */
	uint32_t block_size;            /* 0: the image's */
};

int vhost_blk_new(struct vhost_blk **out, const struct vhost_blk_opts *o, struct err *err);
/* Serve a listening socket (connected: the one connection), owned from now on success. Once. */
int vhost_blk_serve(struct vhost_blk *v, int fd, bool connected, struct err *err);
/* Ends the connection, waits for requests in flight, flushes. NULL is allowed. */
void vhost_blk_free(struct vhost_blk *v);

#endif
