/*
 * qcow2: what its files share. docs/block.md has the ordering rules; the comments "R1".. name them:
 *
 *  R1 a refcount is raised and stable before anything stable points to the cluster
 *  R2 data and copied data are stable before the L2 entry that shows them
 *  R3 an L2 table is stable before the L1 entry that points to it
 *  R4 a cluster is given back only after the entry that pointed to it is gone from stable storage
 *  R5 what cannot be done entry by entry (snapshots, amend, repair) builds new tables beside the old
 *     ones and switches over with one write of the header's first sector
 *
 * Locks: `flush_lock` (one flush at a time) before `lock` (tables, caches, allocation). A request holds
 * its guest range in `ranges` for all of its life: reads and in-place writes share, what changes the
 * mapping is alone. Data moves without `lock`.
 */
#ifndef BLOCK_QCOW2_H
#define BLOCK_QCOW2_H

#include "base/util.h"
#include "block/driver.h"

#define QCOW2_MAGIC 0x514649fbu
#define OFLAG_COPIED BIT(63)
#define OFLAG_COMPRESSED BIT(62)
#define OFLAG_ZERO BIT(0)
#define OFFSET_MASK 0x00fffffffffffe00ull

enum { INCOMPAT_DIRTY = 1, INCOMPAT_CORRUPT = 2, INCOMPAT_DATA_FILE = 4, INCOMPAT_COMPRESSION = 8, INCOMPAT_EXT_L2 = 16,
       INCOMPAT_KNOWN = 31, COMPAT_LAZY = 1, AUTOCLEAR_BITMAPS = 1, AUTOCLEAR_DATA_RAW = 2 };
enum { EXT_END = 0, EXT_BACKING_FORMAT = 0xe2792aca, EXT_FEATURES = 0x6803f857, EXT_BITMAPS = 0x23852875,
       EXT_CRYPTO = 0x0537be77, EXT_DATA_FILE = 0x44415441 };
enum { L1_BYTES_MAX = 32 << 20, REFTABLE_BYTES_MAX = 8 << 20, SNAPSHOTS_MAX = 65536, SNAPSHOT_TABLE_MAX = 64 << 20 };

/* The header's fixed part in host order (qcow2 specification, "Header"). */
struct qhead {
	uint32_t version, backing_size, cluster_bits, crypt, l1_size, reftable_clusters, nb_snapshots;
	uint64_t backing_off, size, l1_off, reftable_off, snapshots_off, incompat, compat, autoclear;
	uint32_t refcount_order, header_len;
	uint8_t compression;
};

struct qext { uint32_t type, len; uint8_t *data; };

/* A cached table: an L2 table or a refcount block, one cluster. */
struct qtable {
	uint64_t off;                   /* where it lives in the file */
	uint8_t *data;
	unsigned lo, hi;                /* dirty bytes [lo, hi); clean when hi == 0 */
	uint64_t used;                  /* with `interval`: seconds on the monotonic clock */
	struct qtable *hash_next, *lru_prev, *lru_next;
};
struct qcache {
	struct qtable **hash;
	unsigned nhash, n, max, ndirty;
	unsigned interval;              /* seconds after which what nobody used goes, when another table comes; 0: never */
	struct qtable lru;              /* ring: lru.lru_next is the most recent */
};

/* A guest range in use; lives on its owner's stack. */
struct qrange { uint64_t start, end; bool alone; struct qrange *next; };

struct qsnap { uint64_t l1_off; uint32_t l1_size; struct image_snapshot s; uint8_t *extra; uint32_t extra_len; };

struct qfree { uint64_t off, n; bool request; };        /* clusters; request: the guest discarded them */

struct qcow2 {
	struct block *b, *leaf, *data;  /* data: where guest clusters live; the leaf or the external file */
	struct qhead h;
	struct qext *ext;
	unsigned next;
	char *backing, *backing_format, *data_file;
	uint32_t cs;                    /* cluster size */
	unsigned nsub, sub_size;        /* subclusters in a cluster, 1 without extended L2 */
	unsigned l2_bits, entry_size;   /* log2 of a table's entries; bytes of one */
	unsigned ref_bits, ref_per_block_bits;
	uint64_t ref_max;
	uint64_t *l1, *reftable;        /* host order */
	uint32_t l1_lo, l1_hi;          /* dirty entries [lo, hi) */
	uint32_t reftable_size;         /* entries */
	struct qsnap *snaps;
	unsigned nsnaps;

	pthread_mutex_t lock, flush_lock, range_lock;
	pthread_mutex_t turn_lock;      /* innermost; of these: */
	pthread_cond_t flush_ended;
	bool flushing;
	uint64_t flushes, flushed, unflushed; /* begun | the last of them that made all stable | the last that failed */
	int flush_error;                /* how that one did */
	pthread_cond_t range_free;
	struct qrange *ranges, **ranges_tail;
	struct qcache l2, refs;
	uint64_t free_hint;             /* cluster: nothing free below */
	uint64_t file_clusters;         /* clusters at or beyond this never were written: they read as zeroes */
	bool fresh;                     /* of the last q_alloc(): all of it is such */
	bool as_is;                     /* opened by who looks for damage (block_opts) */
	uint64_t comp_off;              /* next byte for compressed data, 0: start a cluster */
	bool pass_request, pass_snapshot, pass_other; /* whether the file gets holes where a discard, a snapshot or anything else was */
	bool by_request;                /* what is given back now is so because the guest said so; under lock */
	struct qfree *dead;             /* unreferenced in memory, not yet on disk (R4) */
	unsigned ndead, dead_max;
	uint64_t *meta;                 /* hash set of clusters that hold metadata, +1 */
	unsigned nmeta, meta_size;
	bool started_writing;           /* autoclear bits were dealt with */
	bool copy_on_read;              /* -drive copy-on-read=on: a read copies up what it finds below; set before the first request */
	bool needs_flush;               /* tables were written since the last fdatasync of the leaf */
	int broken;                     /* -EIO after corruption was found: no more writing */
	struct qbitmap *bitmaps;        /* qcow2_bitmap.c */
	unsigned nbitmaps;
	bool sparse_known, sparse_filled; /* data clusters may be holes in the file: see driver_map(); under lock */
	bool bitmaps_loaded, tracking;  /* the directory is in memory; atomic: enabled ones follow writes */
	/* the cluster decompressed last */
	pthread_mutex_t comp_lock;
	uint64_t comp_entry;
	uint8_t *comp_buf;
	struct libdeflate_compressor *compressors[16]; /* idle; under comp_lock */
	unsigned ncompressors;
	struct libdeflate_decompressor *decompressor; /* idle; atomic */
};

/* --- big endian --- */
static inline uint16_t be16(const void *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
static inline uint32_t be32(const void *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
static inline uint64_t be64(const void *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
static inline void put16(void *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v, 2); }
static inline void put32(void *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
static inline void put64(void *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }

static inline uint64_t size_to_clusters(const struct qcow2 *q, uint64_t bytes)
{
	return (bytes >> q->h.cluster_bits) + !!(bytes & (q->cs - 1));
}

/* Tell the file what happens, for blkdebug (events.h). */
static inline void q_event(struct qcow2 *q, enum block_event e)
{
	if (q->leaf->drv->event)
		q->leaf->drv->event(q->leaf, e);
}

/* --- qcow2.c: header, opening, requests --- */
int q_pread(struct qcow2 *q, uint64_t off, void *buf, uint64_t len);    /* of the file, not the disk */
int q_pwrite(struct qcow2 *q, uint64_t off, const void *buf, uint64_t len);
int q_sync(struct qcow2 *q);                                            /* the leaf; nothing when cache=unsafe */
/* Log, refuse writes from now on, set the corrupt bit; returns -EIO. */
int q_corrupt(struct qcow2 *q, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bool q_is_aligned(const struct qcow2 *q, uint64_t off);
uint64_t q_l1_entries(const struct qcow2 *q, uint64_t size);

/* --- qcow2_header.c --- */
void qhead_decode(struct qhead *h, const uint8_t *p);
int qhead_check(struct qcow2 *q, uint64_t file_len, struct err *err);
int q_read_header(struct qcow2 *q, struct err *err);
/* The fixed part: one sector, so it is all or nothing (R5). Waits for it to be stable. */
int q_write_head(struct qcow2 *q, const struct qhead *h);
/* Everything up to the backing name, from q->h, q->ext, q->backing...; -ENOSPC when it does not fit a cluster. */
int q_write_header(struct qcow2 *q, const struct qhead *h, bool fresh);
int q_set_string_ext(struct qcow2 *q, uint32_t type, const char *text);
/* NULL removes it. */
int q_set_ext(struct qcow2 *q, uint32_t type, const void *data, uint32_t len);
struct qext *q_find_ext(struct qcow2 *q, uint32_t type);
void q_free_exts(struct qcow2 *q);

/* --- qcow2_cache.c --- */
int qcache_init(struct qcache *c, unsigned max);
void qcache_free(struct qcache *c);
void qcache_drop(struct qcache *c);     /* forget everything, dirty or not */
/* The table at `off`, read when `fresh` is false, else zeroed. NULL with *r set. Lock held; valid until the next get. */
struct qtable *q_table(struct qcow2 *q, struct qcache *c, uint64_t off, bool fresh, int *r);
struct qtable *q_table_peek(struct qcache *c, uint64_t off);
void q_table_dirty(struct qcache *c, struct qtable *t, unsigned lo, unsigned hi);
void q_table_move(struct qcache *c, struct qtable *t, uint64_t off);
void q_table_forget(struct qcache *c, uint64_t off);
int q_write_tables(struct qcow2 *q, struct qcache *c);
/* Make all tables stable in the right order. Lock held. */
int q_flush_tables(struct qcow2 *q);
int q_flush(struct qcow2 *q, bool unlocked_end);
void q_meta_add(struct qcow2 *q, uint64_t off, uint64_t bytes);
bool q_is_meta(const struct qcow2 *q, uint64_t off);
int q_meta_build(struct qcow2 *q);

/* --- qcow2_refs.c --- */
uint64_t ref_get(const struct qcow2 *q, const uint8_t *block, uint64_t i);
void ref_set(const struct qcow2 *q, uint8_t *block, uint64_t i, uint64_t v);
int q_ref(struct qcow2 *q, uint64_t cluster, uint64_t *v);
/* Add to the refcounts of clusters of existing blocks. */
int q_ref_add(struct qcow2 *q, uint64_t off, uint64_t bytes, int d);
/* 1..n clusters in a row, refcount 1. *off and *got; `all`: n or nothing. */
int q_alloc(struct qcow2 *q, uint64_t n, bool all, uint64_t *off, uint64_t *got);
/* Space for compressed data: byte offset. */
int q_alloc_bytes(struct qcow2 *q, unsigned len, uint64_t *off);
/* Nothing stable ever pointed to it: free at once. */
void q_unalloc(struct qcow2 *q, uint64_t off, uint64_t bytes);
/* Free it when the flush that makes its last reference go is done (R4). */
int q_dead(struct qcow2 *q, uint64_t off, uint64_t bytes);
void q_bury(struct qcow2 *q, unsigned n);

/* --- qcow2_map.c --- */
enum qkind { Q_HOLE, Q_ZERO, Q_DATA, Q_COMPRESSED };
struct qentry { uint64_t raw, host; uint32_t alloc, zero; bool copied, compressed; };
void qentry_decode(const struct qcow2 *q, const uint8_t *p, struct qentry *e);
void qentry_encode(const struct qcow2 *q, uint8_t *p, const struct qentry *e);
void q_compressed_place(const struct qcow2 *q, uint64_t raw, uint64_t *off, uint64_t *len);
struct qrun { enum qkind kind; uint64_t len, host, raw; bool copied; };
/* What stands at guest `off`: the longest run of one kind and contiguous place, at most `len`. Lock held. */
int q_lookup(struct qcow2 *q, uint64_t off, uint64_t len, struct qrun *run, bool cached_only);
int q_entry_get(struct qcow2 *q, uint64_t off, struct qentry *e);
/* The L2 table for writing: allocated, not shared. */
/* Give the entry of `off` its table now: before its clusters, so that those of one table stand in a row. */
int q_entry_reserve(struct qcow2 *q, uint64_t off);
int q_entry_set(struct qcow2 *q, uint64_t off, const struct qentry *e);
/* Give back what an entry points to. */
int q_entry_release(struct qcow2 *q, const struct qentry *e);
void qrange_lock(struct qcow2 *q, struct qrange *r, uint64_t off, uint64_t len, bool alone);
bool qrange_trylock(struct qcow2 *q, struct qrange *r, uint64_t off, uint64_t len);
void qrange_unlock(struct qcow2 *q, struct qrange *r);

/* --- qcow2_io.c --- */
int q_read(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len);
int q_write(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len);
/* flags: BLOCK_REQ_MAY_UNMAP, _OWN, _NO_FALLBACK (-ENOTSUP where zeroes would have to be written; something may be zero already then). */
int q_zero(struct qcow2 *q, uint64_t off, uint64_t len, unsigned flags);
int q_discard(struct qcow2 *q, uint64_t off, uint64_t len, bool make_holes);
/* Clusters around the range that this file does not hold: from the backing file into it. What the guest reads stays the same. */
int q_copy_up(struct qcow2 *q, uint64_t off, uint64_t len);
int q_read_locked(struct qcow2 *q, uint64_t off, const struct iovec *iov, int n, uint64_t len);
bool q_fast(struct block *b, struct block_req *r);
bool q_submit(struct block *b, struct block_req *r);
bool q_poll(struct block *b);
/* First change of the guest's data: bitmaps that do not follow must not be believed. */
int q_start_writing(struct qcow2 *q);

/* --- qcow2_compress.c --- */
int q_inflate(struct qcow2 *q, uint64_t raw, uint64_t in_cluster, const struct iovec *iov, int n, uint64_t len);
void q_free_compressors(struct qcow2 *q);
int qcow2_write_compressed(struct block *b, uint64_t off, const void *buf, uint64_t len);

/* --- qcow2_tables.c: new tables beside the old ones (R5) --- */
struct qbuild {
	struct qcow2 *q;
	uint32_t *refs;                 /* per cluster of the file, as it shall be */
	uint8_t *taken;                 /* in use as it is: not to be written before the switch */
	uint64_t n, room, next;         /* clusters known; allocated; first candidate for new tables */
	struct qhead h;                 /* the header to be */
	bool old_uncounted;             /* refs does not hold the old refcount structure */
	bool whole_header;              /* the extensions changed, too */
};
/* Everybody is kept out (q_stop). From the refcounts on disk, or empty (check). */
int qbuild_begin(struct qbuild *w, struct qcow2 *q, bool empty, struct err *err);
void qbuild_end(struct qbuild *w);
int qbuild_add(struct qbuild *w, uint64_t off, uint64_t bytes, int d, struct err *err);
/* `n` clusters in a row that nothing uses, the first that fit; one reference each. */
int qbuild_alloc(struct qbuild *w, uint64_t n, uint64_t *off, struct err *err);
/* An L2 table as it is now. */
int qbuild_read_l2(struct qcow2 *q, uint64_t off, uint8_t *buf, struct err *err);
/* Write `buf` to new clusters. */
int qbuild_put(struct qbuild *w, const void *buf, uint64_t bytes, uint64_t *off, struct err *err);
/* Add d to all clusters an L1 table reaches, and to the L2 tables when `tables`; not to the L1 table. */
int qbuild_add_tree(struct qbuild *w, const uint64_t *l1, uint32_t n, int d, bool tables, struct err *err);
/* A new active L1 table of `size` entries from l1's; `ours`: nobody else has its L2 tables, replace them. */
int qbuild_active(struct qbuild *w, const uint64_t *l1, uint32_t n, uint32_t size, bool ours, struct err *err);
/* New refcount structure, sync, header, sync, read all again. */
int qbuild_commit(struct qbuild *w, struct err *err);
int q_stop(struct qcow2 *q, struct qrange *all, struct err *err);       /* keep everybody out, flush; locks */
void q_go(struct qcow2 *q, struct qrange *all);
int q_load_tables(struct qcow2 *q, struct err *err);                    /* from the header, again */
/* The end of a change that began with q_stop(), `r` its result so far: committed or rolled back, and the requests that were held go on. */
int q_finish(struct qcow2 *q, struct qbuild *w, struct qrange *all, int r, struct err *err);

/* --- qcow2_snap.c --- */
int q_read_snapshots(struct qcow2 *q, struct err *err);
void q_free_snapshots(struct qcow2 *q);
uint64_t q_snapshot_table_bytes(const struct qcow2 *q);
/* The table as q->snaps has it, to new clusters; the old one's, so many bytes, are given back. */
int q_put_snapshots(struct qbuild *w, uint64_t old_bytes, struct err *err);
int q_read_l1(struct qcow2 *q, uint64_t off, uint32_t n, uint64_t **l1, struct err *err);
struct qsnap *q_find_snapshot(struct qcow2 *q, const char *id_or_name);
int qcow2_snapshot_create(struct block *b, const char *name, struct err *err);
int qcow2_snapshot_apply(struct block *b, const char *id_or_name, struct err *err);
int qcow2_snapshot_delete(struct block *b, const char *name, struct err *err);

/* --- qcow2_check.c --- */
int qcow2_check(struct block *b, unsigned fix, struct image_check *c, struct err *err);

/* --- qcow2_change.c: resize, backing name; qcow2_amend.c --- */
int qcow2_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err);
int qcow2_set_backing(struct block *b, const char *file, const char *format, struct err *err);
int qcow2_amend(struct block *b, const struct image_amend *a, struct err *err);
int qcow2_make_empty(struct block *b, struct err *err);
int q_preallocate(struct qcow2 *q, uint64_t from, uint64_t to, enum block_prealloc p);

/* --- qcow2_bitmap.c: persistent dirty bitmaps --- */
/* Before the first write; lock held. 0: they follow (or none is enabled); -errno: they cannot. */
int q_bitmaps_begin(struct qcow2 *q);
void q_bitmaps_mark(struct qcow2 *q, uint64_t off, uint64_t len);
void q_bitmaps_end(struct qcow2 *q);    /* closing: write back what followed */
void q_bitmaps_free(struct qcow2 *q);
int q_bitmaps_before_resize(struct qcow2 *q, uint64_t size, struct err *err);
int q_bitmaps_resized(struct qcow2 *q, uint64_t size);
int qcow2_bitmap_read(struct block *b, const char *name, struct image_bits *out, struct err *err);
int qcow2_bitmap_extent(struct block *b, const char *name, uint64_t off, uint64_t len, struct block_extent *e); /* image_bitmap_extent() */
int qcow2_bitmap(struct block *b, enum image_bitmap_op op, const char *name, const struct image_bitmap_arg *a, struct err *err);

/* --- qcow2_info.c --- */
int qcow2_info(struct block *b, struct image_info *i);

#endif
