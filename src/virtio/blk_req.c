/* virtio block requests, taken apart (blk_req.h). */
#include "virtio/blk_req.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <string.h>

#include "base/util.h"

static bool bad_extent(const struct virtio_blk_disk *d, uint64_t sector, uint64_t len)
{
	uint64_t off = sector << 9;

	return sector >> 54 || (off | len) % d->block_size || range_bad(off, len, block_length(d->blk));
}

static int prepare_rw(const struct virtio_blk_disk *d, const struct virtq_chain *c, struct block_req *io, uint64_t sector, bool write)
{
	io->op = write ? BLOCK_WRITE : BLOCK_READ;
	io->off = sector << 9;
	io->iov = write ? c->out : c->in;
	io->iovcnt = (int)(write ? c->n_out : c->n_in);
	io->len = write ? c->out_len : c->in_len;
	io->flags = write && d->writethrough ? BLOCK_REQ_FUA : 0;
	if ((write && !d->writable) || bad_extent(d, sector, io->len))
		return -EIO;
	return io->len ? 0 : 1;
}

static int prepare_get_id(const struct virtio_blk_disk *d, const struct virtq_chain *c)
{
	char id[VIRTIO_BLK_ID_BYTES] = "";

	if (d->id)
		memcpy(id, d->id, strnlen(d->id, sizeof(id)));
	iov_from_buf(c->in, c->n_in, 0, id, sizeof(id));
	return 1;
}

/* 5.2.6.1: one range a request is what the config space allows. */
static int prepare_range(const struct virtio_blk_disk *d, const struct virtq_chain *c, struct block_req *io, bool zero, bool *unsupported)
{
	struct virtio_blk_discard_write_zeroes s;

	if (!d->writable || c->out_len != sizeof(s) || iov_to_buf(c->out, c->n_out, 0, &s, sizeof(s)) != sizeof(s))
		return -EIO;
	*unsupported = s.flags & (zero ? ~1u : ~0u);
	if (*unsupported)
		return 1;
	io->op = zero ? BLOCK_ZERO : BLOCK_DISCARD;
	io->off = s.sector << 9;
	io->len = (uint64_t)s.num_sectors << 9;
	if (zero && s.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
		io->flags |= BLOCK_REQ_MAY_UNMAP;
	if (zero && d->writethrough)
		io->flags |= BLOCK_REQ_FUA;
	if (s.num_sectors > VIRTIO_BLK_RANGE_SECTORS || bad_extent(d, s.sector, io->len))
		return -EIO;
	return s.num_sectors ? 0 : 1;
}

static int prepare(const struct virtio_blk_disk *d, const struct virtq_chain *c, struct block_req *io, const struct virtio_blk_outhdr *h, bool *unsupported)
{
	switch (h->type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		return prepare_rw(d, c, io, h->sector, h->type == VIRTIO_BLK_T_OUT);
	case VIRTIO_BLK_T_FLUSH:
		io->op = BLOCK_FLUSH;
		return 0;
	case VIRTIO_BLK_T_GET_ID:
		return prepare_get_id(d, c);
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		if (h->type == VIRTIO_BLK_T_DISCARD ? d->discard : d->write_zeroes)
			return prepare_range(d, c, io, h->type == VIRTIO_BLK_T_WRITE_ZEROES, unsupported);
		break;
	}
	*unsupported = true;
	return 1;
}

int virtio_blk_request(const struct virtio_blk_disk *d, struct virtq_chain *c, struct block_req *io, uint8_t **status, bool *unsupported)
{
	struct virtio_blk_outhdr h;
	int r;

	*unsupported = false;
	if (!c->n_in || iov_to_buf(c->out, c->n_out, 0, &h, sizeof(h)) != sizeof(h))
		return -EINVAL;
	*status = (uint8_t *)c->in[c->n_in - 1].iov_base + c->in[c->n_in - 1].iov_len - 1;
	iov_trim_front(&c->out, &c->n_out, sizeof(h));
	iov_trim_to(c->in, &c->n_in, --c->in_len);
	c->out_len -= sizeof(h);
	r = prepare(d, c, io, &h, unsupported);
	if (r < 0)
		io->ret = r;
	return r != 0;
}

/* The status byte is the last of the writable part (5.2.6). */
uint8_t virtio_blk_status(const struct block_req *io, bool unsupported)
{
	return unsupported || io->ret == -ENOTSUP ? VIRTIO_BLK_S_UNSUPP : io->ret ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
}
