/*
 * VDI, VirtualBox's disk image: a header, a map with a 32-bit number for each block of the disk, the blocks. Dynamic and
 * fixed images; differencing ones (with a parent) are refused.
 */
#include <errno.h>

#include "base/util.h"
#include "block/foreign.h"

enum {
	H_MAGIC = 64, H_VERSION = 68, H_TYPE = 76, H_MAP = 340, H_DATA = 344, H_SECTOR = 360, H_SIZE = 368, H_BLOCK = 376,
	H_EXTRA = 380, H_BLOCKS = 384, H_LINK = 424, H_PARENT = 440, H_BYTES = 512,
	VDI_FREE = -1, VDI_ZERO = -2,
};

static int vdi_lookup(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run)
{
	uint64_t size = f->vdi.block_size, at = off % size;
	uint8_t entry[4];
	int r = foreign_entry(f, f->b->child, f->vdi.bat + off / size * 4, entry, sizeof entry);
	if (r)
		return r;
	run->len = MIN(len, size - at);
	uint32_t block = ld_le32(entry);
	if (block == (uint32_t)VDI_FREE || block == (uint32_t)VDI_ZERO) {
		run->kind = FOREIGN_ZERO;
		return 0;
	}
	if (block >= f->vdi.blocks)
		return foreign_corrupt(f, "block %llu is said to be the file's %uth", (unsigned long long)(off / size), block);
	run->kind = FOREIGN_DATA;
	run->leaf = f->b->child;
	run->pos = f->vdi.data + block * size + at;
	return 0;
}

static bool is_zero_uuid(const uint8_t *p)
{
	return !ld_le64(p) && !ld_le64(p + 8);
}

static int check_header(struct foreign *f, const uint8_t *h, struct err *err)
{
	uint32_t type = ld_le32(h + H_TYPE), block = ld_le32(h + H_BLOCK), blocks = ld_le32(h + H_BLOCKS);
	uint64_t size = ld_le64(h + H_SIZE);
	if (ld_le32(h + H_MAGIC) != 0xbeda107f)
		return foreign_bad(f, err, "no VDI signature");
	if (ld_le32(h + H_VERSION) != 0x00010001)
		return err_set(err, -ENOTSUP, "%s: VDI version %u.%u is not supported", f->b->file, ld_le32(h + H_VERSION) >> 16,
			       ld_le32(h + H_VERSION) & 0xffff);
	if ((type != 1 && type != 2) || !is_zero_uuid(h + H_LINK) || !is_zero_uuid(h + H_PARENT))
		return err_set(err, -ENOTSUP, "%s: a differencing VDI image (type %u); only dynamic and fixed ones are supported", f->b->file, type);
	if (ld_le32(h + H_SECTOR) != 512 || block < 4096 || block & (block - 1) || block > 256 << 20)
		return foreign_bad(f, err, "sectors of %u and blocks of %u bytes", ld_le32(h + H_SECTOR), block);
	if (ld_le32(h + H_EXTRA))
		return err_set(err, -ENOTSUP, "%s: VDI blocks with extra data are not supported", f->b->file);
	if (size > (uint64_t)blocks * block)
		return foreign_bad(f, err, "%u blocks do not hold the disk", blocks);
	return 0;
}

int vdi_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err)
{
	uint8_t h[H_BYTES];
	(void)o;
	(void)depth;
	if (foreign_pread(f->b->child, 0, h, sizeof h))
		return foreign_bad(f, err, "the header cannot be read");
	int r = check_header(f, h, err);
	if (r)
		return r;
	f->vdi.bat = ld_le32(h + H_MAP);
	f->vdi.data = ld_le32(h + H_DATA);
	f->vdi.blocks = ld_le32(h + H_BLOCKS);
	f->vdi.block_size = f->cluster_size = ld_le32(h + H_BLOCK);
	f->b->length = ALIGN_UP(ld_le64(h + H_SIZE), (uint64_t)512);
	f->lookup = vdi_lookup;
	return 0;
}
