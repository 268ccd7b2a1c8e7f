/*
 * VHD, which QEMU calls vpc: Virtual PC's and Hyper-V's first disk format. Fixed disks are their bytes and a footer; dynamic
 * ones have a copy of the footer in front, a header, a table of 32-bit sector numbers, and blocks with a sector bitmap
 * before each. All numbers are big-endian. Differencing images are refused.
 */
#include <errno.h>

#include "base/util.h"
#include "block/foreign.h"

enum {
	F_BYTES = 512, F_DATA = 16, F_CREATOR = 28, F_SIZE = 48, F_CYLS = 56, F_HEADS = 58, F_SECS = 59, F_TYPE = 60, F_SUM = 64,
	H_BYTES = 1024, H_TABLE = 16, H_ENTRIES = 28, H_BLOCK = 32, H_SUM = 36,
	TYPE_FIXED = 2, TYPE_DYNAMIC = 3, TYPE_DIFF = 4,
};

static int vpc_lookup(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run)
{
	uint64_t size = f->vpc.block_size;
	uint8_t entry[4];
	run->leaf = f->b->child;
	run->kind = FOREIGN_DATA;
	run->pos = off;
	if (f->vpc.fixed)
		return 0;
	int r = foreign_entry(f, f->b->child, f->vpc.bat + off / size * 4, entry, sizeof entry);
	if (r)
		return r;
	run->len = MIN(len, size - off % size);
	run->pos = foreign_be32(entry) * 512ull + f->vpc.bitmap + off % size;
	if (foreign_be32(entry) == UINT32_MAX)
		run->kind = FOREIGN_ZERO;
	return 0;
}

/* One's complement of the sum of the bytes, itself left out. */
static bool sum_is_good(const uint8_t *p, size_t len, size_t at)
{
	uint32_t sum = 0;
	for (size_t i = 0; i < len; i++)
		sum += i >= at && i < at + 4 ? 0 : p[i];
	return foreign_be32(p + at) == (uint32_t)~sum;
}

/*
 * Writers differ in what they mean by a disk's size. QEMU's rule, whose images and whose conversions are to be equal: the
 * geometry, except for creators that are known to mean the size field, and for the largest geometry.
 */
static uint64_t disk_size(const uint8_t *h)
{
	static const char exact[][4] = { "win ", "qem2", "d2v ", "tap", "CTXS", "wa\0" };
	uint64_t geometry = ((uint64_t)h[F_CYLS] << 8 | h[F_CYLS + 1]) * h[F_HEADS] * h[F_SECS];
	bool by_size = geometry == 65535ull * 16 * 255;
	for (size_t i = 0; i < ARRAY_SIZE(exact); i++)
		by_size |= !memcmp(h + F_CREATOR, exact[i], 4);
	return by_size ? foreign_be64(h + F_SIZE) : geometry * 512;
}

/* The footer: in front of a dynamic disk, at the end of a fixed one (and of a dynamic one whose front is damaged). */
static int read_footer(struct foreign *f, uint8_t *h, struct err *err)
{
	int64_t size = f->b->child->drv->file_length(f->b->child);
	for (int i = 0; i < 2 && size >= F_BYTES; i++) {
		if (foreign_pread(f->b->child, i ? (uint64_t)size - F_BYTES : 0, h, F_BYTES))
			return foreign_bad(f, err, "the footer cannot be read");
		if (!memcmp(h, "conectix", 8) && sum_is_good(h, F_BYTES, F_SUM))
			return 0;
	}
	return foreign_bad(f, err, "no VHD footer with a good checksum");
}

static int open_dynamic(struct foreign *f, uint64_t at, struct err *err)
{
	uint8_t h[H_BYTES];
	if (foreign_pread(f->b->child, at, h, sizeof h))
		return foreign_bad(f, err, "its header is beyond the file's end");
	if (memcmp(h, "cxsparse", 8) || !sum_is_good(h, H_BYTES, H_SUM))
		return foreign_bad(f, err, "the dynamic disk's header is damaged");
	uint32_t block = foreign_be32(h + H_BLOCK);
	if (block < 512 || block & (block - 1) || block > 256 << 20)
		return foreign_bad(f, err, "blocks of %u bytes", block);
	f->vpc.bat = foreign_be64(h + H_TABLE);
	f->vpc.entries = foreign_be32(h + H_ENTRIES);
	f->vpc.block_size = f->cluster_size = block;
	f->vpc.bitmap = ALIGN_UP((block / 512 + 7) / 8, 512);
	if (f->b->length > f->vpc.entries * block)
		return foreign_bad(f, err, "%llu blocks do not hold the disk", (unsigned long long)f->vpc.entries);
	return f->vpc.bat > INT64_MAX ? foreign_bad(f, err, "its table is nowhere") : 0;
}

int vpc_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err)
{
	uint8_t h[F_BYTES];
	int r = read_footer(f, h, err);
	(void)o;
	(void)depth;
	if (r)
		return r;
	uint32_t type = foreign_be32(h + F_TYPE);
	f->b->length = ALIGN_DOWN(disk_size(h), (uint64_t)512);
	f->lookup = vpc_lookup;
	f->vpc.fixed = type == TYPE_FIXED;
	if (f->vpc.fixed)
		return 0;
	if (type != TYPE_DYNAMIC)
		return err_set(err, -ENOTSUP, "%s: a %s VHD image (type %u); only fixed and dynamic ones are supported", f->b->file,
			       type == TYPE_DIFF ? "differencing" : "strange", type);
	return open_dynamic(f, foreign_be64(h + F_DATA), err);
}
