/*
 * What a virtio block request asks for (virtio 1.2, 5.2.6): header, checks, and the block layer's request made of it. For the
 * device and for the vhost-user back end. The driver that wrote the chain is hostile: nothing of it is read twice.
 */
#ifndef VIRTIO_BLK_REQ_H
#define VIRTIO_BLK_REQ_H

#include <stdbool.h>
#include <stdint.h>

#include "block/block.h"
#include "virtio/queue.h"

enum { VIRTIO_BLK_RANGE_SECTORS = 1 << 22 };    /* most that one discard or write-zeroes may cover */

/* The disk as the driver sees it now. */
struct virtio_blk_disk {
	struct block *blk;
	uint32_t block_size;
	const char *id;                 /* NULL: none */
	bool writable, writethrough, discard, write_zeroes;
};

/*
 * Takes header and status off the chain, whose buffers *io then points to. 0: *io is for the block layer; 1: answered, io->ret
 * says how; -EINVAL: there is no header or no place for a status. *unsupported: answer VIRTIO_BLK_S_UNSUPP. io->done is kept.
 */
int virtio_blk_request(const struct virtio_blk_disk *d, struct virtq_chain *c, struct block_req *io, uint8_t **status, bool *unsupported);
/* What goes into the status byte. */
uint8_t virtio_blk_status(const struct block_req *io, bool unsupported);

#endif
