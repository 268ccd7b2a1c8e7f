/* The read-only formats' common part: reading by runs, the table cache, the drivers' tables. */
#include "block/foreign.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <zlib.h>

#include "base/log.h"
#include "base/util.h"

int foreign_bad(struct foreign *f, struct err *err, const char *fmt, ...)
{
	char what[256];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	return err_set(err, -EINVAL, "%s: not a good %s image: %s", f->b->file, f->b->drv->name, what);
}

int foreign_corrupt(struct foreign *f, const char *fmt, ...)
{
	char what[256];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	log_guest("%s: image is corrupt or truncated: %s", f->b->file, what);
	return -EIO;
}

/* --- the files --- */

int foreign_pread(struct block *leaf, uint64_t off, void *buf, uint64_t len)
{
	struct iovec v = { buf, len };
	int64_t size = leaf->drv->file_length(leaf);
	if (size < 0)
		return (int)size;
	if (range_bad(off, len, (uint64_t)size))
		return -EIO;
	return leaf->drv->read(leaf, off, &v, 1, len);
}

/* The piece of a file that holds `off`, from the cache or read into the least used place. */
static int get_piece(struct foreign *f, struct block *leaf, uint64_t off, struct foreign_piece **out)
{
	struct foreign_piece *oldest = f->pieces;
	uint64_t start = ALIGN_DOWN(off, (uint64_t)FOREIGN_PIECE);
	for (struct foreign_piece *p = f->pieces; p < f->pieces + FOREIGN_PIECES; p++) {
		if (p->leaf == leaf && p->off == start) {
			p->used = ++f->clock;
			*out = p;
			return 0;
		}
		if (p->used < oldest->used)
			oldest = p;
	}
	if (!oldest->data && !(oldest->data = malloc(FOREIGN_PIECE)))
		return -ENOMEM;
	struct iovec v = { oldest->data, FOREIGN_PIECE };
	oldest->leaf = NULL;
	int r = leaf->drv->read(leaf, start, &v, 1, FOREIGN_PIECE);
	if (r)
		return r;
	*oldest = (struct foreign_piece){ .leaf = leaf, .off = start, .used = ++f->clock, .data = oldest->data };
	*out = oldest;
	return 0;
}

int foreign_entry(struct foreign *f, struct block *leaf, uint64_t off, void *buf, unsigned len)
{
	struct foreign_piece *p;
	uint64_t at = off % FOREIGN_PIECE;
	int64_t size = leaf->drv->file_length(leaf);
	if (size < 0)
		return (int)size;
	if (range_bad(off, len, (uint64_t)size))
		return foreign_corrupt(f, "a table entry at %llu is beyond the file's end", (unsigned long long)off);
	if (at + len > FOREIGN_PIECE) /* a table at an odd offset */
		return foreign_pread(leaf, off, buf, len);
	int r = get_piece(f, leaf, off, &p);
	if (!r)
		memcpy(buf, p->data + at, len);
	return r;
}

int foreign_add_leaf(struct foreign *f, const struct block_opts *o, const char *file, struct block **out, struct err *err)
{
	struct block_opts lo = { .read_only = true, .cache = o->cache, .aio = o->aio, .shared = o->shared };
	if (f->b->child->nbd)
		return err_set(err, -EINVAL, "%s: comes over NBD, so its extent's name '%s' means nothing", f->b->file, file);
	char *path = block_path_beside(f->b->file, file);
	struct block **more = realloc(f->leaves, (f->nleaves + 1) * sizeof *more);
	if (more)
		f->leaves = more;
	lo.file = path;
	struct block *leaf = more && path ? block_new(&lo, f->b->loop, f->b->workers) : NULL;
	int r = leaf ? raw_open(leaf, &lo, err) : err_set(err, -ENOMEM, "%s: out of memory", f->b->file);
	free(path);
	if (r) {
		block_free(leaf);
		return err_prefix(err, "%s: Could not open extent", f->b->file);
	}
	f->leaves[f->nleaves++] = *out = leaf;
	return 0;
}

/* --- reading --- */

/* The grain that `run` lies in, inflated into f->grain. Under f->lock. */
static int inflate_grain(struct foreign *f, const struct foreign_run *run)
{
	if (f->grain && f->grain_leaf == run->leaf && f->grain_pos == run->pos)
		return 0;
	if (!f->grain && !(f->grain = malloc(FOREIGN_MAX_GRAIN)))
		return -ENOMEM;
	uint8_t *packed = malloc(run->packed);
	int r = packed ? foreign_pread(run->leaf, run->pos, packed, run->packed) : -ENOMEM;
	uLongf n = run->grain;
	f->grain_leaf = NULL;
	if (!r && (uncompress(f->grain, &n, packed, run->packed) != Z_OK || n > run->grain))
		r = foreign_corrupt(f, "compressed data at %llu", (unsigned long long)run->pos);
	free(packed);
	if (r)
		return r;
	f->grain_leaf = run->leaf;
	f->grain_pos = run->pos;
	f->grain_len = (uint32_t)n;
	return 0;
}

static int read_deflated(struct foreign *f, const struct foreign_run *run, uint8_t *p)
{
	pthread_mutex_lock(&f->lock);
	int r = inflate_grain(f, run);
	if (!r && range_bad(run->skip, run->len, f->grain_len))
		r = foreign_corrupt(f, "a short grain at %llu", (unsigned long long)run->pos);
	if (!r)
		memcpy(p, f->grain + run->skip, run->len);
	pthread_mutex_unlock(&f->lock);
	return r;
}

/* From the parent; zeroes where there is none or it is shorter. */
static int read_parent(struct block *parent, uint64_t off, uint8_t *p, uint64_t len)
{
	uint64_t part = parent && off < parent->length ? MIN(len, parent->length - off) : 0;
	struct iovec v = { p, part };
	memset(p + part, 0, len - part);
	return part ? parent->drv->read(parent, off, &v, 1, part) : 0;
}

static bool is_inside(const struct foreign_run *run)
{
	int64_t size = run->leaf->drv->file_length(run->leaf);
	return size >= 0 && !range_bad(run->pos, run->len, (uint64_t)size);
}

static int read_data(struct foreign *f, const struct foreign_run *run, uint8_t *p)
{
	struct iovec v = { p, run->len };
	if (!is_inside(run))
		return foreign_corrupt(f, "data at %llu is beyond the file's end", (unsigned long long)run->pos);
	return run->leaf->drv->read(run->leaf, run->pos, &v, 1, run->len);
}

static int read_run(struct foreign *f, const struct foreign_run *run, uint64_t off, uint8_t *p)
{
	switch (run->kind) {
	case FOREIGN_HOLE:
		return read_parent(f->b->backing, off, p, run->len);
	case FOREIGN_ZERO:
		memset(p, 0, run->len);
		return 0;
	case FOREIGN_DATA:
		return read_data(f, run, p);
	case FOREIGN_DEFLATED:
		return read_deflated(f, run, p);
	}
	return -EIO;
}

static int lookup(struct foreign *f, uint64_t off, uint64_t len, struct foreign_run *run)
{
	*run = (struct foreign_run){ .len = len };
	pthread_mutex_lock(&f->lock);
	int r = f->lookup(f, off, len, run);
	pthread_mutex_unlock(&f->lock);
	return r;
}

static int foreign_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct foreign_run run;
	int r = 0;
	for (int i = 0; !r && i < n; i++) {
		uint8_t *p = iov[i].iov_base;
		for (uint64_t done = 0; !r && done < iov[i].iov_len; done += run.len) {
			r = lookup(b->foreign, off + done, iov[i].iov_len - done, &run);
			if (!r)
				r = read_run(b->foreign, &run, off + done, p + done);
		}
		off += iov[i].iov_len;
	}
	(void)len;
	return r;
}

/* True when `next` goes on where `run` ends, as one extent. */
static bool goes_on(const struct foreign_run *run, const struct foreign_run *next)
{
	if (run->kind != next->kind || run->leaf != next->leaf)
		return false;
	return run->kind == FOREIGN_DATA ? next->pos == run->pos + run->len : true;
}

static int foreign_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct foreign_run run, next;
	int r = lookup(b->foreign, off, len, &run);
	if (r)
		return r;
	while (run.len < len && !lookup(b->foreign, off + run.len, len - run.len, &next) && goes_on(&run, &next))
		run.len += next.len;
	*e = (struct block_extent){ .len = run.len, .present = run.kind != FOREIGN_HOLE, .zero = run.kind == FOREIGN_ZERO,
				    .data = run.kind >= FOREIGN_DATA, .compressed = run.kind == FOREIGN_DEFLATED };
	if (run.kind == FOREIGN_DATA) {
		struct block_extent below;
		if (is_inside(&run) && run.leaf->drv->map && !run.leaf->drv->map(run.leaf, run.pos, run.len, &below)) {
			e->len = MIN(e->len, below.len); /* a hole in a flat file reads as zeroes */
			e->zero = below.zero;
		}
		e->has_offset = true;
		e->offset = run.pos;
		e->file = run.leaf->file;
	}
	return 0;
}

/* Everything the tables say is inside its file. 0, or -errno when looking itself failed. */
int foreign_check(struct block *b, struct image_check *c, struct err *err)
{
	struct foreign_run run;
	char line[160];
	if (!strcmp(b->drv->name, "vpc"))
		return err_set(err, -ENOTSUP, "%s: a vpc image has no metadata to check", b->file);
	for (uint64_t off = 0; off < b->length; off += run.len) {
		int r = lookup(b->foreign, off, b->length - off, &run);
		if (r == -ENOMEM)
			return err_set(err, r, "%s: out of memory", b->file);
		if (!r && (run.kind < FOREIGN_DATA || (run.kind == FOREIGN_DATA ? is_inside(&run) : true)))
			continue;
		c->corruptions++;
		snprintf(line, sizeof line, "ERROR: the data at %llu of the disk is not in the file", (unsigned long long)off);
		if (c->say)
			c->say(c->opaque, line);
		run.len = r ? MIN(b->length - off, (uint64_t)65536) : run.len;
	}
	return 0;
}

/* --- the node --- */

static int foreign_flush(struct block *b)
{
	(void)b;
	return 0;
}

static bool foreign_fast(struct block *b, struct block_req *r)
{
	(void)b;
	(void)r;
	return false;
}

static void foreign_close(struct block *b)
{
	struct foreign *f = b->foreign;
	if (!f)
		return;
	if (f->free)
		f->free(f);
	for (unsigned i = 0; i < f->nleaves; i++)
		block_free(f->leaves[i]);
	for (unsigned i = 0; i < FOREIGN_PIECES; i++)
		free(f->pieces[i].data);
	free(f->leaves);
	free(f->parent);
	free(f->grain);
	pthread_mutex_destroy(&f->lock);
	free(f);
	b->foreign = NULL;
}

#define FOREIGN_DRIVER(n) { .name = n, .read = foreign_read, .flush = foreign_flush, .fast = foreign_fast, .map = foreign_map, .close = foreign_close }
static const struct {
	struct block_driver drv;
	int (*open)(struct foreign *f, const struct block_opts *o, unsigned depth, struct err *err);
} formats[] = {
	{ FOREIGN_DRIVER("vdi"), vdi_open }, { FOREIGN_DRIVER("vhdx"), vhdx_open },
	{ FOREIGN_DRIVER("vmdk"), vmdk_open }, { FOREIGN_DRIVER("vpc"), vpc_open },
};

bool foreign_has_format(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
		if (!strcmp(name, formats[i].drv.name))
			return true;
	}
	return false;
}

int foreign_open(struct block *b, const char *format, const struct block_opts *o, unsigned depth, struct err *err)
{
	if (!b->read_only)
		return err_set(err, -ENOTSUP, "%s: Lodge only reads %s images: open it read-only, or convert it ('lodge img convert -O qcow2')",
			       b->file, format);
	size_t i = 0;
	while (strcmp(format, formats[i].drv.name))
		i++;
	struct foreign *f = calloc(1, sizeof *f);
	if (!f)
		return err_set(err, -ENOMEM, "%s: out of memory", b->file);
	f->b = b;
	pthread_mutex_init(&f->lock, NULL);
	b->foreign = f;
	b->drv = &formats[i].drv;
	int r = formats[i].open(f, o, depth, err);
	return r ? r : b->length > INT64_MAX ? foreign_bad(f, err, "the disk is too large") : 0;
}

void foreign_info(const struct block *b, struct image_info *i)
{
	i->cluster_size = b->foreign->cluster_size;
	i->backing = b->foreign->parent;
	if (!strcmp(b->drv->name, "vmdk"))
		vmdk_info(b->foreign, i);
}
