/*
 * VMDK, VMware's disk format: a text descriptor (in a file of its own or in the extent) that lists extents, each flat, all
 * zeroes, or sparse with a directory of tables of 32-bit sector numbers of grains, which may be compressed (streamOptimized).
 * Old ESX sparse extents (COWD) are read too. A parent is opened as a backing file.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>

#include "base/util.h"
#include "block/foreign.h"

enum {
	SECTOR = 512, MAX_DESCRIPTOR = 1 << 20, MAX_EXTENTS = 4096,
	H_FLAGS = 8, H_CAPACITY = 12, H_GRAIN = 20, H_DESC = 28, H_DESC_LEN = 36, H_GTES = 44, H_GD = 56, H_NEWLINES = 73, H_COMPRESS = 77,
	C_CAPACITY = 12, C_GRAIN = 16, C_GD = 20, C_GTES = 4096,
	FLAG_ZERO_GRAINS = 4, FLAG_COMPRESSED = 1 << 16, FLAG_MARKERS = 1 << 17,
};

struct vmdk_extent {
	uint64_t start, len;            /* of the disk, bytes */
	struct block *leaf;             /* NULL: zeroes */
	bool sparse, compressed, zero_grains;
	uint64_t at;                    /* flat: where its bytes start; sparse: the grain directory */
	uint64_t grain;                 /* bytes */
	uint32_t gtes;                  /* entries of a grain table */
	const char *type;               /* in the descriptor's words; NULL: the extent that holds the descriptor */
};

struct vmdk {
	struct vmdk_extent *extents;
	struct image_vmdk_extent *names; /* for `info`: as many */
	unsigned n;
	bool has_parent;
	uint32_t cid, parent_cid;
	char create_type[64];
};

static struct vmdk_extent *find_extent(struct vmdk *v, uint64_t off)
{
	unsigned lo = 0, hi = v->n;
	while (hi - lo > 1) {
		unsigned mid = (lo + hi) / 2;
		if (v->extents[mid].start <= off)
			lo = mid;
		else
			hi = mid;
	}
	return v->extents + lo;
}

/* The grain's marker: 64-bit sector of the disk, 32-bit length, then a zlib stream. */
static int lookup_packed(struct foreign *f, const struct vmdk_extent *x, uint64_t pos, uint64_t skip, struct foreign_run *run)
{
	uint8_t marker[12];
	int r = foreign_pread(x->leaf, pos, marker, sizeof marker);
	if (r)
		return foreign_corrupt(f, "a compressed grain at %llu", (unsigned long long)pos);
	run->kind = FOREIGN_DEFLATED;
	run->packed = ld_le32(marker + 8);
	run->pos = pos + sizeof marker;
	run->skip = (uint32_t)skip;
	run->grain = (uint32_t)x->grain;
	if (!run->packed || run->packed > 2 * FOREIGN_MAX_GRAIN)
		return foreign_corrupt(f, "a compressed grain of %u bytes at %llu", run->packed, (unsigned long long)pos);
	return 0;
}

static int lookup_sparse(struct foreign *f, const struct vmdk_extent *x, uint64_t off, struct foreign_run *run)
{
	uint64_t number = off / x->grain, skip = off % x->grain;
	uint8_t entry[4];
	uint64_t left = (x->gtes - number % x->gtes) * x->grain - skip;
	uint64_t all = MIN(run->len, left);
	run->len = MIN(run->len, x->grain - skip);
	run->leaf = x->leaf;
	int r = foreign_entry(f, x->leaf, x->at + number / x->gtes * 4, entry, 4);
	if (r)
		return r;
	uint64_t table = ld_le32(entry);
	if (!table) { /* nothing in the whole table's part */
		run->kind = FOREIGN_HOLE;
		run->len = all;
		return 0;
	}
	r = foreign_entry(f, x->leaf, table * SECTOR + number % x->gtes * 4, entry, 4);
	if (r)
		return r;
	uint64_t sector = ld_le32(entry);
	if (!sector || (sector == 1 && x->zero_grains)) {
		run->kind = sector ? FOREIGN_ZERO : FOREIGN_HOLE;
		return 0;
	}
	if (x->compressed)
		return lookup_packed(f, x, sector * SECTOR, skip, run);
	run->kind = FOREIGN_DATA;
	run->pos = sector * SECTOR + skip;
	return 0;
}

static int vmdk_lookup(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run)
{
	const struct vmdk_extent *x = find_extent(f->vmdk, off);
	off -= x->start;
	run->len = MIN(len, x->len - off);
	if (x->sparse)
		return lookup_sparse(f, x, off, run);
	run->kind = x->leaf ? FOREIGN_DATA : FOREIGN_ZERO;
	run->leaf = x->leaf;
	run->pos = x->at + off;
	return 0;
}

/* --- extents --- */

/* Next in the disk; its length is there already. */
static int add_extent(struct foreign *f, const struct vmdk_extent *x, struct err *err)
{
	struct vmdk *v = f->vmdk;
	if (v->n >= MAX_EXTENTS || !x->len || f->b->length + x->len < x->len || f->b->length + x->len > INT64_MAX)
		return foreign_bad(f, err, "extent %u of %llu bytes", v->n, (unsigned long long)x->len);
	struct vmdk_extent *more = realloc(v->extents, (v->n + 1) * sizeof *more);
	if (!more)
		return err_set(err, -ENOMEM, "%s: out of memory", f->b->file);
	v->extents = more;
	struct image_vmdk_extent *names = realloc(v->names, (v->n + 1) * sizeof *names);
	if (!names)
		return err_set(err, -ENOMEM, "%s: out of memory", f->b->file);
	v->names = names;
	names[v->n] = (struct image_vmdk_extent){ .size = x->len, .cluster_size = x->sparse ? (uint32_t)x->grain : 0, .compressed = x->compressed,
						  .file = x->leaf ? x->leaf->file : NULL, .type = x->type };
	more[v->n] = *x;
	more[v->n++].start = f->b->length;
	f->b->length += x->len;
	return 0;
}

static int add_sparse(struct foreign *f, struct vmdk_extent *x, uint64_t sectors, uint64_t grain, uint64_t directory, struct err *err)
{
	if (!grain || grain & (grain - 1) || grain > FOREIGN_MAX_GRAIN / SECTOR || !x->gtes || x->gtes > 1 << 16)
		return foreign_bad(f, err, "grains of %llu sectors, tables of %u entries", (unsigned long long)grain, x->gtes);
	if (sectors > INT64_MAX / SECTOR || directory > INT64_MAX / SECTOR || sectors / grain / x->gtes > 1ull << 32)
		return foreign_bad(f, err, "an extent of %llu sectors", (unsigned long long)sectors);
	x->sparse = true;
	x->grain = grain * SECTOR;
	x->at = directory * SECTOR;
	if (!x->len)
		x->len = sectors * SECTOR;
	if (x->len > ALIGN_UP(sectors * SECTOR, x->grain))
		return foreign_bad(f, err, "an extent that is smaller than the descriptor says");
	if (!f->cluster_size)
		f->cluster_size = (uint32_t)x->grain;
	return add_extent(f, x, err);
}

/* Old ESX: x->leaf is it. */
static int add_cowd(struct foreign *f, struct vmdk_extent *x, const uint8_t *h, struct err *err)
{
	x->gtes = C_GTES;
	return add_sparse(f, x, ld_le32(h + C_CAPACITY), ld_le32(h + C_GRAIN), ld_le32(h + C_GD), err);
}

/* A stream's directory is at its end: the header in front says so, a copy before the end marker knows. */
static int read_footer(struct foreign *f, struct block *leaf, uint8_t *h, struct err *err)
{
	int64_t size = leaf->drv->file_length(leaf);
	if (size < 2 * SECTOR || foreign_pread(leaf, (uint64_t)size - 2 * SECTOR, h, SECTOR) || memcmp(h, "KDMV", 4))
		return foreign_bad(f, err, "a stream without its footer (truncated?)");
	return 0;
}

static int add_vmdk4(struct foreign *f, struct vmdk_extent *x, uint8_t *h, struct err *err)
{
	static const uint8_t newlines[] = { '\n', ' ', '\r', '\n' };
	int r = ld_le64(h + H_GD) == UINT64_MAX ? read_footer(f, x->leaf, h, err) : 0;
	if (r)
		return r;
	uint32_t version = ld_le32(h + 4), flags = ld_le32(h + H_FLAGS);
	if (!version || version > 3)
		return err_set(err, -ENOTSUP, "%s: VMDK version %u is not supported", f->b->file, version);
	if (flags & 1 && memcmp(h + H_NEWLINES, newlines, sizeof newlines))
		return foreign_bad(f, err, "its line ends were changed: a transfer as text damaged it");
	x->compressed = flags & FLAG_COMPRESSED;
	if (x->compressed && (ld_le16(h + H_COMPRESS) != 1 || !(flags & FLAG_MARKERS)))
		return err_set(err, -ENOTSUP, "%s: VMDK compression %u is not supported", f->b->file, ld_le16(h + H_COMPRESS));
	x->zero_grains = flags & FLAG_ZERO_GRAINS;
	x->gtes = ld_le32(h + H_GTES);
	return add_sparse(f, x, ld_le64(h + H_CAPACITY), ld_le64(h + H_GRAIN), ld_le64(h + H_GD), err);
}

static int add_sparse_file(struct foreign *f, struct vmdk_extent *x, struct err *err)
{
	uint8_t h[SECTOR];
	if (foreign_pread(x->leaf, 0, h, sizeof h))
		return foreign_bad(f, err, "the header of extent %s cannot be read", x->leaf->file);
	if (!memcmp(h, "COWD", 4))
		return add_cowd(f, x, h, err);
	return memcmp(h, "KDMV", 4) ? foreign_bad(f, err, "%s is no sparse extent", x->leaf->file) : add_vmdk4(f, x, h, err);
}

/* --- the descriptor --- */

/* ACCESS SECTORS TYPE "FILE" [OFFSET] */
static int extent_line(struct foreign *f, const struct block_opts *o, const char *line, struct err *err)
{
	char access[16], type[16], file[512] = "";
	unsigned long long sectors, offset = 0;
	int n = sscanf(line, "%15s %llu %15s \"%511[^\"]\" %llu", access, &sectors, type, file, &offset);
	struct vmdk_extent x = { 0 };
	if (n < 3 || sectors > INT64_MAX / SECTOR || offset > INT64_MAX / SECTOR)
		return foreign_bad(f, err, "extent line '%.60s'", line);
	x.len = sectors * SECTOR;
	if (!strcmp(access, "NOACCESS"))
		return err_set(err, -EACCES, "%s: an extent is marked as not to be accessed", f->b->file);
	if (!strcmp(type, "ZERO"))
		return add_extent(f, &x, err);
	bool flat = !strcmp(type, "FLAT") || !strcmp(type, "VMFS"), sparse = !strcmp(type, "SPARSE") || !strcmp(type, "VMFSSPARSE");
	if (!flat && !sparse)
		return err_set(err, -ENOTSUP, "%s: VMDK extents of type %s are not supported", f->b->file, type);
	if (n < 4)
		return foreign_bad(f, err, "extent line '%.60s' names no file", line);
	int r = foreign_add_leaf(f, o, file, &x.leaf, err);
	if (r)
		return r;
	x.at = offset * SECTOR;
	x.type = !strcmp(type, "FLAT") ? "FLAT" : !strcmp(type, "VMFS") ? "VMFS" : !strcmp(type, "SPARSE") ? "SPARSE" : "VMFSSPARSE";
	return flat ? add_extent(f, &x, err) : add_sparse_file(f, &x, err);
}

static bool is_extent(const char *line)
{
	return !strncmp(line, "RW ", 3) || !strncmp(line, "RDONLY ", 7) || !strncmp(line, "NOACCESS ", 9);
}

/* NAME = VALUE or NAME="VALUE"; the value within the line, its end cut off. NULL: another name. */
static char *value_of(char *line, const char *name)
{
	size_t n = strlen(name);
	if (strncasecmp(line, name, n))
		return NULL;
	char *p = line + n + strspn(line + n, " \t");
	if (*p++ != '=')
		return NULL;
	p += strspn(p, " \t\"");
	p[strcspn(p, "\"")] = 0;
	return p;
}

/* What the extent is, when the descriptor stands inside of it, is known already: `embedded`. */
static int parse_descriptor(struct foreign *f, const struct block_opts *o, char *text, bool embedded, struct err *err)
{
	struct vmdk *v = f->vmdk;
	char *save = NULL, *value;
	int r = 0;
	for (char *line = strtok_r(text, "\r\n", &save); line && !r; line = strtok_r(NULL, "\r\n", &save)) {
		line += strspn(line, " \t");
		if ((value = value_of(line, "parentCID")))
			v->has_parent = (v->parent_cid = (uint32_t)strtoul(value, NULL, 16)) != UINT32_MAX;
		else if ((value = value_of(line, "CID")))
			v->cid = (uint32_t)strtoul(value, NULL, 16);
		else if ((value = value_of(line, "createType")))
			snprintf(v->create_type, sizeof v->create_type, "%s", value);
		else if ((value = value_of(line, "parentFileNameHint")) && !f->parent)
			f->parent = strdup(value);
		else if (!embedded && is_extent(line))
			r = extent_line(f, o, line, err);
	}
	if (!r && !v->n)
		r = foreign_bad(f, err, "its descriptor lists no extents");
	return r;
}

static int read_descriptor(struct foreign *f, const struct block_opts *o, uint64_t off, uint64_t len, bool embedded, struct err *err)
{
	len = MIN(len, (uint64_t)MAX_DESCRIPTOR);
	char *text = malloc(len + 1);
	int r = text ? foreign_pread(f->b->child, off, text, len) : -ENOMEM;
	if (r) {
		free(text);
		return foreign_bad(f, err, "its descriptor cannot be read");
	}
	text[len] = 0;
	r = parse_descriptor(f, o, text, embedded, err);
	free(text);
	return r;
}

static int open_embedded(struct foreign *f, const struct block_opts *o, uint8_t *h, struct err *err)
{
	struct vmdk_extent x = { .leaf = f->b->child };
	uint64_t off = ld_le64(h + H_DESC), len = ld_le64(h + H_DESC_LEN);
	if (!memcmp(h, "COWD", 4))
		return add_cowd(f, &x, h, err);
	int r = add_vmdk4(f, &x, h, err);
	if (r || !off || !len)
		return r;
	if (off > INT64_MAX / SECTOR || len > INT64_MAX / SECTOR)
		return foreign_bad(f, err, "its descriptor is nowhere");
	return read_descriptor(f, o, off * SECTOR, len * SECTOR, true, err);
}

static int open_parent(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err)
{
	if (!f->vmdk->has_parent || o->no_backing)
		return 0;
	if (!f->parent || !*f->parent)
		return err_set(err, -EINVAL, "%s: its descriptor does not name the parent it needs", f->b->file);
	if (f->b->child->nbd)
		return err_set(err, -EINVAL, "%s: comes over NBD, so its parent's name '%s' means nothing", f->b->file, f->parent);
	struct block_opts p = { .file = block_path_beside(f->b->file, f->parent), .format = "vmdk", .read_only = true, .cache = o->cache,
				.shared = o->shared };
	int r = p.file ? block_open_backing(&f->b->backing, &p, f->b, depth + 1, err) : -ENOMEM;
	free((char *)(uintptr_t)p.file);
	return r ? err_prefix(err, "%s: Could not open backing file", f->b->file) : 0;
}

static void vmdk_free(struct foreign *f)
{
	if (!f->vmdk)
		return;
	free(f->vmdk->extents);
	free(f->vmdk->names);
	free(f->vmdk);
}

void vmdk_info(const struct foreign *f, struct image_info *i)
{
	const struct vmdk *v = f->vmdk;
	i->vmdk = (struct image_vmdk){ v->cid, v->parent_cid, v->create_type, v->names, v->n };
}

int vmdk_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err)
{
	uint8_t h[SECTOR] = { 0 };
	int64_t size = f->b->child->drv->file_length(f->b->child);
	f->free = vmdk_free;
	f->vmdk = calloc(1, sizeof *f->vmdk);
	if (!f->vmdk)
		return err_set(err, -ENOMEM, "%s: out of memory", f->b->file);
	f->vmdk->parent_cid = UINT32_MAX;
	f->b->length = 0;
	f->lookup = vmdk_lookup;
	if (size < 4 || foreign_pread(f->b->child, 0, h, MIN((uint64_t)size, sizeof h)))
		return foreign_bad(f, err, "the header cannot be read");
	bool sparse = !memcmp(h, "KDMV", 4) || !memcmp(h, "COWD", 4);
	int r = sparse ? open_embedded(f, o, h, err) : read_descriptor(f, o, 0, (uint64_t)size, false, err);
	return r ? r : open_parent(f, o, depth, err);
}
