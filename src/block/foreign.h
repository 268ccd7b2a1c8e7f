/*
 * What the read-only formats of other hypervisors share: VMDK, VDI, VHD (QEMU's "vpc") and VHDX.
 *
 * A format says, for an offset of the disk, where its bytes are (`lookup`); reading, mapping and the cache of table
 * pieces are here. Tables are never loaded whole, so an image that claims a huge one costs nothing. Every offset that
 * an image holds is checked where it is used: beyond the file's end is an error, not zeroes, since a truncated image
 * must not convert into a disk with silent holes.
 */
#ifndef BLOCK_FOREIGN_H
#define BLOCK_FOREIGN_H

#include "base/util.h"
#include "block/driver.h"

enum { FOREIGN_PIECE = 65536, FOREIGN_PIECES = 16, FOREIGN_MAX_GRAIN = 2 << 20 };

enum foreign_kind { FOREIGN_HOLE /* the parent's, where the format has parents */, FOREIGN_ZERO, FOREIGN_DATA, FOREIGN_DEFLATED };

/* What the format knows about [off, off+len): one kind, contiguous in the file when it is data. */
struct foreign_run {
	uint64_t len;
	enum foreign_kind kind;
	struct block *leaf;             /* DATA, DEFLATED */
	uint64_t pos;                   /* DATA: of these bytes; DEFLATED: of the whole grain's zlib stream */
	uint32_t packed;                /* DEFLATED: bytes of the stream */
	uint32_t skip, grain;           /* DEFLATED: where `off` is in the grain, and its size */
};

struct foreign_piece { struct block *leaf; uint64_t off, used; uint8_t *data; };

struct foreign {
	struct block *b;
	/* `len` is at least 1 and inside the disk; run->len may be cut to any prefix. Called with `lock` held. 0 or -errno. */
	int (*lookup)(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run);
	uint32_t cluster_size;          /* for `info` */
	char *parent;                   /* the backing file's name in the image; NULL: none. Owned */
	pthread_mutex_t lock;
	struct foreign_piece pieces[FOREIGN_PIECES];
	uint64_t clock;                 /* of the pieces' use */
	struct block **leaves;          /* extents in files of their own; owned */
	unsigned nleaves;
	uint8_t *grain;                 /* the last inflated one, at grain_pos of grain_leaf */
	struct block *grain_leaf;
	uint64_t grain_pos;
	uint32_t grain_len;
	union {
		struct { uint64_t bat, blocks, data, block_size; } vdi;
		struct { uint64_t bat, entries, block_size, bitmap; bool fixed; } vpc;
		struct { uint64_t bat, block_size, ratio; } vhdx;
		struct vmdk *vmdk;
	};
	void (*free)(struct foreign *f); /* the union's, may be NULL */
};

/* b->child is there; `depth` counts the files above. Each fills b->length and f->lookup. */
int vdi_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err);
int vpc_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err);
int vhdx_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err);
int vmdk_open(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err);

void vmdk_info(const struct foreign *f, struct image_info *i);

/* All of [off, off+len) of a file, or -errno; -EIO past its end. */
int foreign_pread(struct block *leaf, uint64_t off, void *buf, uint64_t len);
/* The same for 4 or 8 bytes of a table, through the cache. Under f->lock. */
int foreign_entry(struct foreign *f, struct block *leaf, uint64_t off, void *buf, unsigned len);
/* Another file of the same image, read-only, as a leaf; freed with `f`. */
int foreign_add_leaf(struct foreign *f, const struct block_opts *o, const char *file, struct block **out, struct err *err);
/* "FILE: this is not a good NAME image: ...", -EINVAL. */
int foreign_bad(struct foreign *f, struct err *err, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same once it is in use: logged, -EIO. */
int foreign_corrupt(struct foreign *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static inline uint32_t foreign_be32(const void *p) { return __builtin_bswap32(ld_le32(p)); }
static inline uint64_t foreign_be64(const void *p) { return __builtin_bswap64(ld_le64(p)); }

#endif
