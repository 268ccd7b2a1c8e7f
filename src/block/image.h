/*
 * Images as a tool sees them: what is allocated where, facts, snapshots, checking, resizing, making
 * new ones. Everything here waits for the disk and is for threads that may; several may work on one
 * image at once. The calls that change an image's shape (resize, snapshots, check with repair, amend)
 * wait for requests in flight and hold back new ones.
 */
#ifndef BLOCK_IMAGE_H
#define BLOCK_IMAGE_H

#include "block/block.h"

/* --- plain transfers: any offset and length inside the image --- */
int image_read(struct block *b, uint64_t off, void *buf, uint64_t len);
int image_write(struct block *b, uint64_t off, const void *buf, uint64_t len);
int image_zero(struct block *b, uint64_t off, uint64_t len, bool may_unmap);
/* Of a qcow2 image's own, whatever is below it now or later. `off` and `len` may be ragged as above. */
int image_zero_own(struct block *b, uint64_t off, uint64_t len);
/* -ENOTSUP where zeroes would have to be written. */
int image_zero_quick(struct block *b, uint64_t off, uint64_t len, bool may_unmap);
int image_discard(struct block *b, uint64_t off, uint64_t len);
int image_flush(struct block *b);
/*
 * Let the kernel copy, or share, what both images have in plain files; holes are left out when the target is `blank`.
 * -ENOTSUP and others: nothing is lost, copy it by hand. The target must be raw.
 */
int image_copy_range(struct block *from, uint64_t off, struct block *to, uint64_t to_off, uint64_t len, bool blank);
/* One whole cluster (the last may be short), compressed when that makes it smaller. */
int image_write_compressed(struct block *b, uint64_t off, const void *buf, uint64_t len);

/* --- allocation --- */
struct block_extent {
	uint64_t len;
	bool present;           /* this file says what is here, not its backing file */
	bool whole;             /* not present, but nothing else has to be asked: a disk below, with all its files, gave the answer */
	bool short_backing;     /* not present, and past the end of the backing file that would be next */
	bool data, zero;        /* has data of its own | reads as zeroes */
	bool compressed;
	bool has_offset;        /* the bytes stand at `offset` of `file` as they are */
	uint64_t offset;
	const char *file;
	unsigned depth;         /* 0: the image itself, 1: its backing file... */
};
/* The chain from `b` down to the file whose backing `base` is (NULL: all of it): who holds what is at `off`. */
int image_map(struct block *b, struct block *base, uint64_t off, uint64_t len, struct block_extent *e);

/* A name that the image `file` holds (its backing file), as it is opened: relative to the image. malloc()ed. */
char *block_path_beside(const char *file, const char *name);
struct block *image_backing(struct block *b);
const char *image_format(const struct block *b);
/* What `info` calls it: the format, or of a protocol's node that was asked for by its driver that driver ("nbd", "file"). */
const char *image_driver(const struct block *b);
/* Bytes of disk the image's own files occupy, -errno. */
int64_t image_disk_size(struct block *b);

/* --- breakpoints: blkdebug below or at `b`; -ENOTSUP where there is none --- */
/* The next request that comes by `event` stops until image_resume(). -ENOENT: no such event. */
int image_break(struct block *b, const char *event, const char *tag);
int image_unbreak(struct block *b, const char *tag);    /* and resume who stands there; -ENOENT: no such tag */
int image_resume(struct block *b, const char *tag);     /* one that stands at `tag` (NULL: anywhere) */
unsigned image_stopped(struct block *b, const char *tag); /* how many stand there, and were not told to go on; NULL: anywhere */
char *image_stop_news(struct block *b);                 /* a tag where a request stopped since the last call, for the caller to free; NULL: none */

/* --- resizing --- */
enum block_prealloc { PREALLOC_OFF, PREALLOC_METADATA, PREALLOC_FALLOC, PREALLOC_FULL };
int image_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err);

/* --- qcow2 --- */
struct image_snapshot {
	char *id, *name;
	uint64_t vm_state_size, disk_size, vm_clock_ns, icount;
	uint32_t date_sec, date_nsec;
};
struct image_bitmap { char *name; uint64_t granularity; bool in_use, automatic; };

/* What a VMDK image's descriptor says. */
struct image_vmdk_extent { uint64_t size; uint32_t cluster_size; bool compressed; const char *file, *type; };
struct image_vmdk { uint32_t cid, parent_cid; const char *create_type; const struct image_vmdk_extent *extents; unsigned n; };

struct image_info {
	uint32_t cluster_size;          /* 0: the format has none */
	unsigned version, refcount_bits;
	bool lazy_refcounts, dirty, corrupt, extended_l2, data_raw, compressed_zstd, encrypted, bitmaps_consistent;
	const char *backing, *backing_format, *data_file;
	struct image_snapshot *snapshots;
	unsigned nsnapshots;
	struct image_bitmap *bitmaps;
	unsigned nbitmaps;
	struct image_vmdk vmdk;         /* n is 0 for other formats */
};
/* Strings belong to `b`, the arrays to the caller: image_info_free(). -ENOTSUP: the format has nothing to say (a filter: its image's cluster_size). */
int image_info(struct block *b, struct image_info *i);
void image_info_free(struct image_info *i);

int image_snapshot_create(struct block *b, const char *name, struct err *err);
int image_snapshot_apply(struct block *b, const char *id_or_name, struct err *err);
int image_snapshot_delete(struct block *b, const char *name, struct err *err);
/* NULL names remove the backing file. */
int image_set_backing(struct block *b, const char *file, const char *format, struct err *err);

enum { CHECK_FIX_LEAKS = 1, CHECK_FIX_ERRORS = 2 };
struct image_check {
	uint64_t corruptions, leaks, errors, corruptions_fixed, leaks_fixed;
	uint64_t total, allocated, fragmented, compressed, end_offset;
	void (*say)(void *opaque, const char *line);    /* a finding; may be NULL */
	void *opaque;
};
/*
 * A copy of a persistent bitmap as it is now, of the image or of the first one below it that has it. The caller frees `bits`.
 * `live`: it is enabled in a writable image, whose writes will set more; image_bitmap_extent() follows them.
 */
struct image_bits { uint64_t *bits, nbits; unsigned gran_bits; struct block *live; };
int image_bitmap_read(struct block *b, const char *name, struct image_bits *out, struct err *err);
/* How far from `off` on (at most `len` bytes, not 0) the bitmap says the same: e->len, and e->data where it is set. */
void image_bits_extent(const struct image_bits *bits, uint64_t off, uint64_t len, struct block_extent *e);
/* The same of an enabled bitmap as it is now. -EAGAIN: nothing was written since the image was opened, a copy read before still holds. */
int image_bitmap_extent(struct block *live, const char *name, uint64_t off, uint64_t len, struct block_extent *e);
enum image_bitmap_op { BITMAP_ADD, BITMAP_REMOVE, BITMAP_CLEAR, BITMAP_ENABLE, BITMAP_DISABLE, BITMAP_MERGE };
/* granularity: bytes, 0: by the cluster size (add); source, source_name: what to merge in. */
struct image_bitmap_arg { uint64_t granularity; struct block *source; const char *source_name; };
/* `a` may be NULL where nothing of it is meant. */
int image_bitmap_change(struct block *b, enum image_bitmap_op op, const char *name, const struct image_bitmap_arg *a, struct err *err);

int image_check(struct block *b, unsigned fix, struct image_check *c, struct err *err);

struct image_create {
	const char *file, *format;
	uint64_t size;
	const char *backing, *backing_format, *data_file;
	unsigned version;               /* 2 or 3 */
	uint32_t cluster_size;
	unsigned refcount_bits;
	bool lazy_refcounts, extended_l2, data_raw, zstd;
	enum block_prealloc prealloc;
	const struct tls_store *tls;    /* for an NBD name; may be NULL */
};
/* QEMU's defaults. */
void image_create_init(struct image_create *c);
/* Makes or overwrites `file`. */
int image_create(const struct image_create *c, struct err *err);
/* Only whether the qcow2 options go together; cluster_size is there. */
int image_create_check(const struct image_create *c, struct err *err);

struct image_amend { bool set_version, set_lazy, set_refcount_bits, set_data_raw; unsigned version, refcount_bits; bool lazy, data_raw; };
int image_amend(struct block *b, const struct image_amend *a, struct err *err);
/* Put everything that is in `b` alone into its backing file's place: forget what `b` holds. */
int image_make_empty(struct block *b, struct err *err);

#endif
