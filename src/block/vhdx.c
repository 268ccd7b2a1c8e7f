/*
 * VHDX, Hyper-V's second disk format ([MS-VHDX]): two headers of which the newer good one counts, a region table that says
 * where the block table and the metadata are, metadata items by GUID. An image whose log still has entries was not closed; it
 * is refused, for the log may hold metadata that the file does not. Differencing images are refused.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/util.h"
#include "block/foreign.h"

enum {
	KIB64 = 65536, HEADER_1 = 1 * KIB64, HEADER_2 = 2 * KIB64, REGION_1 = 3 * KIB64, REGION_2 = 4 * KIB64, HEADER_BYTES = 4096,
	MAX_REGIONS = 2047, MAX_ITEMS = 2047,
	STATE_NOT_PRESENT = 0, STATE_UNDEFINED = 1, STATE_ZERO = 2, STATE_UNMAPPED = 3, STATE_PRESENT = 6,
};

struct region { uint64_t off; uint32_t len; };
struct parsed { struct region bat, metadata; uint32_t block_size, sector; uint64_t size; bool has_parent; unsigned seen; };

/* GUIDs as they stand in the file: three little-endian numbers, eight bytes. */
#define GUID(a, b, c, ...) { (uint8_t)(a), (uint8_t)((a) >> 8), (uint8_t)((a) >> 16), (uint8_t)((a) >> 24), (uint8_t)(b), (uint8_t)((b) >> 8), \
			     (uint8_t)(c), (uint8_t)((c) >> 8), __VA_ARGS__ }
static const uint8_t region_bat[16] = GUID(0x2dc27766u, 0xf623, 0x4200, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08);
static const uint8_t region_metadata[16] = GUID(0x8b7ca206u, 0x4790, 0x4b9a, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e);
static const uint8_t item_file[16] = GUID(0xcaa16737u, 0xfa36, 0x4d43, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b);
static const uint8_t item_size[16] = GUID(0x2fa54224u, 0xcd1b, 0x4876, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8);
static const uint8_t item_sector[16] = GUID(0x8141bf1du, 0xa96f, 0x4709, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f);
static const uint8_t item_physical[16] = GUID(0xcda348c7u, 0x445d, 0x4471, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56);
static const uint8_t item_page83[16] = GUID(0xbeca12abu, 0xb2e6, 0x4523, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46);

static bool guid_is(const uint8_t *p, const uint8_t guid[16])
{
	return !memcmp(p, guid, 16);
}

/* CRC-32C of a structure whose checksum field (at 4) counts as zero. */
static bool sum_is_good(const uint8_t *p, size_t len)
{
	uint32_t crc = ~0u;
	for (size_t i = 0; i < len; i++) {
		crc ^= i >= 4 && i < 8 ? 0 : p[i];
		for (int k = 0; k < 8; k++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return ld_le32(p + 4) == ~crc;
}

static int vhdx_lookup(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run)
{
	uint64_t size = f->vhdx.block_size, block = off / size;
	uint8_t entry[8];
	/* After `ratio` payload entries comes one for a sector bitmap, unused here. */
	int r = foreign_entry(f, f->b->child, f->vhdx.bat + (block + block / f->vhdx.ratio) * 8, entry, sizeof entry);
	if (r)
		return r;
	uint64_t e = ld_le64(entry);
	run->len = MIN(len, size - off % size);
	run->leaf = f->b->child;
	run->pos = (e & ~0xfffffull) + off % size;
	switch (e & 7) {
	case STATE_NOT_PRESENT:
	case STATE_UNDEFINED:
	case STATE_ZERO:
	case STATE_UNMAPPED:
		run->kind = FOREIGN_ZERO;
		return 0;
	case STATE_PRESENT:
		run->kind = FOREIGN_DATA;
		return 0;
	}
	return foreign_corrupt(f, "block %llu is in state %u", (unsigned long long)block, (unsigned)(e & 7));
}

/* The newer of the two headers, into `h`. */
static int read_header(struct foreign *f, uint8_t *h, struct err *err)
{
	uint8_t two[2][HEADER_BYTES];
	bool good[2];
	for (int i = 0; i < 2; i++)
		good[i] = !foreign_pread(f->b->child, i ? HEADER_2 : HEADER_1, two[i], HEADER_BYTES) && !memcmp(two[i], "head", 4) &&
			  sum_is_good(two[i], HEADER_BYTES);
	if (!good[0] && !good[1])
		return foreign_bad(f, err, "neither of its headers is good");
	int newer = !good[0] || (good[1] && ld_le64(two[1] + 8) > ld_le64(two[0] + 8));
	memcpy(h, two[newer], HEADER_BYTES);
	if (ld_le16(h + 66) != 1 || ld_le16(h + 64))
		return err_set(err, -ENOTSUP, "%s: VHDX version %u with log version %u is not supported", f->b->file, ld_le16(h + 66), ld_le16(h + 64));
	return 0;
}

/* An entry in the log that belongs to this header: the image was not closed. */
static int check_log(struct foreign *f, const uint8_t *h, struct err *err)
{
	static const uint8_t none[16];
	uint64_t off = ld_le64(h + 72), len = ld_le32(h + 68);
	uint8_t entry[64];
	if (guid_is(h + 48, none))
		return 0;
	if (len > 64 << 20)
		return foreign_bad(f, err, "a log of %llu bytes", (unsigned long long)len);
	for (uint64_t at = 0; at + sizeof entry <= len; at += 4096) {
		if (foreign_pread(f->b->child, off + at, entry, sizeof entry))
			return foreign_bad(f, err, "its log is beyond the file's end");
		if (!memcmp(entry, "loge", 4) && guid_is(entry + 32, h + 48))
			return err_set(err, -EBUSY, "%s: was not closed properly: its log must be replayed first (qemu-img check -r all)", f->b->file);
	}
	return 0;
}

static int read_regions(struct foreign *f, struct parsed *p, struct err *err)
{
	uint8_t *t = malloc(KIB64);
	int r = t ? -EINVAL : -ENOMEM;
	for (int i = 0; t && r && i < 2; i++)
		r = foreign_pread(f->b->child, i ? REGION_2 : REGION_1, t, KIB64) || memcmp(t, "regi", 4) || !sum_is_good(t, KIB64) ||
		    ld_le32(t + 8) > MAX_REGIONS ? -EINVAL : 0;
	if (r) {
		free(t);
		return foreign_bad(f, err, "neither of its region tables is good");
	}
	for (uint32_t i = 0; !r && i < ld_le32(t + 8); i++) {
		const uint8_t *e = t + 16 + 32 * i;
		struct region region = { ld_le64(e + 16), ld_le32(e + 24) };
		if (guid_is(e, region_bat))
			p->bat = region;
		else if (guid_is(e, region_metadata))
			p->metadata = region;
		else if (ld_le32(e + 28) & 1)
			r = err_set(err, -ENOTSUP, "%s: a required VHDX region is unknown", f->b->file);
	}
	free(t);
	if (!r && (!p->bat.len || !p->metadata.len || p->metadata.len < KIB64 || p->bat.off > INT64_MAX || p->metadata.off > INT64_MAX))
		r = foreign_bad(f, err, "it has no block table or no metadata");
	return r;
}

static int read_item(struct foreign *f, struct parsed *p, const uint8_t *e, struct err *err)
{
	uint32_t off = ld_le32(e + 16), len = ld_le32(e + 20);
	bool size = guid_is(e, item_size), file = guid_is(e, item_file), sector = guid_is(e, item_sector);
	uint8_t v[8] = { 0 };
	if (!size && !file && !sector) {
		if (ld_le32(e + 24) & 4 && !guid_is(e, item_physical) && !guid_is(e, item_page83))
			return err_set(err, -ENOTSUP, "%s: %s", f->b->file, "a required VHDX metadata item is unknown (a differencing image's parent?); "
				       "only fixed and dynamic images are supported");
		return 0;
	}
	unsigned want = sector ? 4 : 8;
	if (len < want || range_bad(off, want, p->metadata.len) || foreign_pread(f->b->child, p->metadata.off + off, v, want))
		return foreign_bad(f, err, "a metadata item is out of its region");
	p->seen |= size ? 1 : file ? 2 : 4;
	if (size)
		p->size = ld_le64(v);
	if (sector)
		p->sector = ld_le32(v);
	if (file) {
		p->block_size = ld_le32(v);
		p->has_parent = ld_le32(v + 4) & 2;
	}
	return 0;
}

static int read_metadata(struct foreign *f, struct parsed *p, struct err *err)
{
	uint8_t *t = malloc(KIB64);
	int r = t ? foreign_pread(f->b->child, p->metadata.off, t, KIB64) : -ENOMEM;
	if (r || memcmp(t, "metadata", 8) || ld_le16(t + 10) > MAX_ITEMS)
		r = foreign_bad(f, err, "its metadata table is damaged");
	for (unsigned i = 0; !r && i < ld_le16(t + 10); i++)
		r = read_item(f, p, t + 32 + 32 * i, err);
	free(t);
	if (!r && p->seen != 7)
		r = foreign_bad(f, err, "the size of the disk, its blocks or its sectors is missing");
	return r;
}

static int check_geometry(struct foreign *f, const struct parsed *p, struct err *err)
{
	uint32_t block = p->block_size;
	if (p->has_parent)
		return err_set(err, -ENOTSUP, "%s: a differencing VHDX image; only fixed and dynamic ones are supported", f->b->file);
	if (block < 1 << 20 || block > 256 << 20 || block & (block - 1) || (p->sector != 512 && p->sector != 4096))
		return foreign_bad(f, err, "blocks of %u and sectors of %u bytes", block, p->sector);
	if (p->size > 64ull << 40 || p->size % 512)
		return foreign_bad(f, err, "a disk of %llu bytes", (unsigned long long)p->size);
	uint64_t blocks = (p->size + block - 1) / block, ratio = ((uint64_t)p->sector << 23) / block;
	if (blocks && (blocks + (blocks - 1) / ratio) * 8 > p->bat.len)
		return foreign_bad(f, err, "its block table is too short for the disk");
	return 0;
}

int vhdx_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err)
{
	uint8_t h[HEADER_BYTES];
	struct parsed p = { 0 };
	(void)o;
	(void)depth;
	int r = foreign_pread(f->b->child, 0, h, 8);
	if (r || memcmp(h, "vhdxfile", 8))
		return foreign_bad(f, err, "no VHDX signature");
	r = read_header(f, h, err);
	if (!r)
		r = check_log(f, h, err);
	if (!r)
		r = read_regions(f, &p, err);
	if (!r)
		r = read_metadata(f, &p, err);
	if (!r)
		r = check_geometry(f, &p, err);
	if (r)
		return r;
	f->vhdx.bat = p.bat.off;
	f->vhdx.block_size = f->cluster_size = p.block_size;
	f->vhdx.ratio = ((uint64_t)p.sector << 23) / p.block_size;
	f->b->length = p.size;
	f->lookup = vhdx_lookup;
	return 0;
}
