/*
 * blklogwrites: what is written to `file` is written down in `log`, too, in the format of Linux's dm-log-writes, so that its tools (or the tests)
 * can replay it up to any point. A sector with the superblock comes first, then for each request a sector with its entry and, but for discards, the data.
 * As in QEMU an entry follows the request it tells of, a write with FUA is a write and a flush, zeroes are written out, and the superblock, which says
 * how many entries count, is written at flushes and every `log-super-update-interval` entries.
 *
 * A flush in the log stands for what is before it. So flushes are alone: b->rmw, which other requests share, also while their entry is written.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/util.h"
#include "block/graph.h"

#define LOG_MAGIC 0x6a736677736872ull
enum { LOG_VERSION = 1, LOG_FLUSH = 1, LOG_DISCARD = 4, LOG_FLAGS = 15, SUPER_LEN = 28, ENTRY_LEN = 32, SECTOR_MAX = 1 << 24 };

struct logger {
	struct block *log;              /* b->more[0] */
	uint64_t sector;                /* size of the log's sectors, bytes */
	uint64_t interval;
	pthread_mutex_t lock;           /* the rest, and the log's end */
	uint64_t next;                  /* sector of the log where the next entry goes */
	uint64_t entries;
	bool unflushed;                 /* something was logged after the last flush */
};

static int log_io(struct logger *l, bool write, uint64_t off, void *buf, uint64_t len)
{
	struct iovec v = { buf, len };
	return write ? l->log->drv->write(l->log, off, &v, 1, len, 0) : l->log->drv->read(l->log, off, &v, 1, len);
}

/* Locked. Entries that are told of here are in the log. */
static int write_super(struct logger *l)
{
	uint8_t *s = calloc(1, l->sector);
	if (!s)
		return -ENOMEM;
	st_le64(s, LOG_MAGIC);
	st_le64(s + 8, LOG_VERSION);
	st_le64(s + 16, l->entries);
	st_le32(s + 24, (uint32_t)l->sector);
	int r = log_io(l, true, 0, s, l->sector);
	free(s);
	return r ? r : l->log->drv->flush(l->log);
}

/* Locked. The data of an entry: `iov`, or `len` bytes of zeroes, at byte `at`. */
static int write_data(struct logger *l, uint64_t at, const struct iovec *iov, int n, uint64_t len)
{
	if (iov)
		return l->log->drv->write(l->log, at, iov, n, len, 0);
	int r = l->log->drv->zero(l->log, at, len, BLOCK_REQ_NO_FALLBACK);
	return r == -ENOTSUP ? zero_by_writing(l->log, at, len, 0, l->log->drv->write) : r;
}

/* A request that was carried out, in whole sectors. iov: its data; NULL: zeroes, or for flushes and discards none. */
static int log_request(struct block *b, uint64_t off, uint64_t len, uint64_t flags, const struct iovec *iov, int n)
{
	struct logger *l = b->state;
	uint64_t data = flags & LOG_DISCARD ? 0 : len;
	uint8_t *e = calloc(1, l->sector);
	if (!e)
		return -ENOMEM;
	st_le64(e, off / l->sector);
	st_le64(e + 8, len / l->sector);
	st_le64(e + 16, flags);
	pthread_mutex_lock(&l->lock);
	uint64_t at = l->next * l->sector, most = INT64_MAX - l->sector;
	int r = at > most || data > most - at ? -EFBIG : log_io(l, true, at, e, l->sector);
	if (!r && data)
		r = write_data(l, at + l->sector, iov, n, data);
	if (!r) {
		l->next += 1 + data / l->sector;
		l->entries++;
		l->unflushed = !(flags & LOG_FLUSH);
		if (flags & LOG_FLUSH || !(l->entries % l->interval))
			r = write_super(l);
	}
	pthread_mutex_unlock(&l->lock);
	free(e);
	return r;
}

/* Nothing happened since the last one: nothing to tell, but the file may know of something. */
static int logged_flush(struct block *b)
{
	struct logger *l = b->state;
	pthread_rwlock_wrlock(&b->rmw);
	int r = pass_flush(b);
	if (!r && l->unflushed)
		r = log_request(b, 0, 0, LOG_FLUSH, NULL, 0);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

/* b->rmw is held. */
static int write_sectors(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	int r = pass_write(b, off, iov, n, len, 0);
	return r ? r : log_request(b, off, len, 0, iov, n);
}

/* A part of a sector: the rest of it is read, alone. */
static int write_part(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct logger *l = b->state;
	uint64_t start = ALIGN_DOWN(off, l->sector), end = ALIGN_UP(off + len, l->sector);
	struct iovec hull = { NULL, end - start };
	if (posix_memalign(&hull.iov_base, 4096, end - start))
		return -ENOMEM;
	int r = pass_read(b, start, &hull, 1, end - start);
	if (!r) {
		iov_copy(iov, n, (uint8_t *)hull.iov_base + (off - start), true);
		r = write_sectors(b, start, &hull, 1, end - start);
	}
	free(hull.iov_base);
	return r;
}

static bool is_whole(const struct block *b, uint64_t off, uint64_t len)
{
	const struct logger *l = b->state;
	return !((off | len) & (l->sector - 1));
}

static int through(struct block *b, unsigned flags)
{
	return !block_write_cache(b) || flags & BLOCK_REQ_FUA ? logged_flush(b) : 0;
}

static int logged_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	bool whole = is_whole(b, off, len);
	if (range_bad(off, len, INT64_MAX - SECTOR_MAX))
		return -EFBIG;
	if (whole)
		pthread_rwlock_rdlock(&b->rmw);
	else
		pthread_rwlock_wrlock(&b->rmw);
	int r = whole ? write_sectors(b, off, iov, n, len) : write_part(b, off, iov, n, len);
	pthread_rwlock_unlock(&b->rmw);
	return r ? r : through(b, flags);
}

static int logged_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	int r = -ENOTSUP;
	if (is_whole(b, off, len)) {
		pthread_rwlock_rdlock(&b->rmw);
		r = pass_zero(b, off, len, flags & ~(unsigned)BLOCK_REQ_FUA);
		if (!r)
			r = log_request(b, off, len, 0, NULL, 0);
		pthread_rwlock_unlock(&b->rmw);
	}
	if (r == -ENOTSUP && !(flags & BLOCK_REQ_NO_FALLBACK))
		return zero_by_writing(b, off, len, flags, logged_write);
	return r ? r : through(b, flags);
}

/* A hint: parts of sectors stay. */
static int logged_discard(struct block *b, uint64_t off, uint64_t len)
{
	struct logger *l = b->state;
	uint64_t start = ALIGN_UP(off, l->sector), end = ALIGN_DOWN(off + len, l->sector);
	if (start >= end)
		return 0;
	pthread_rwlock_rdlock(&b->rmw);
	int r = pass_discard(b, start, end - start);
	if (!r)
		r = log_request(b, start, end - start, LOG_DISCARD, NULL, 0);
	pthread_rwlock_unlock(&b->rmw);
	return r;
}

static void logger_close(struct block *b)
{
	struct logger *l = b->state;
	if (l)
		pthread_mutex_destroy(&l->lock);
	free(l);
	b->state = NULL;
}

static const struct block_driver block_blklogwrites = {
	PASS_PLACE, .name = "blklogwrites", .read = pass_read, .write = logged_write, .zero = logged_zero, .discard = logged_discard, .flush = logged_flush,
	.event = pass_event, .filter = true, .close = logger_close,
};

/* --- opening --- */

static bool sector_size_valid(uint64_t size)
{
	return size >= ENTRY_LEN && size < SECTOR_MAX && !(size & (size - 1));
}

/*
 * log-append: what is a hole is entries of no sectors, one a sector; they are passed at once, up to `end`. Else a log that is nothing but a size
 * would be read for hours.
 */
static bool pass_hole(struct logger *l, uint64_t entries, uint64_t end)
{
	uint64_t at = l->next * l->sector, most = MIN(entries - l->entries, end - l->next);
	struct block_extent e;
	if (!l->log->drv->map || l->log->drv->map(l->log, at, most * l->sector, &e) || !e.zero || e.data)
		return false;
	uint64_t n = MIN(e.len / l->sector, most);
	l->next += n;
	l->entries += n;
	return n;
}

/*
 * No more entries can have been stored than the file below everything takes bytes: an image as a log may show the same cluster at any number of places,
 * and would be read for as long.
 */
static uint64_t entries_stored(const struct logger *l)
{
	struct block *b = l->log;
	struct stat st;
	while (b->child)
		b = b->child;
	if (b->fd >= 0 && !b->is_dev && !fstat(b->fd, &st))
		return (uint64_t)st.st_blocks * 512;
	return UINT64_MAX;
}

/* log-append: past the last of `entries`, each of which has to be inside the log. */
static int find_end(struct logger *l, uint64_t entries, uint64_t size, struct err *err)
{
	uint8_t e[ENTRY_LEN];
	uint64_t end = size / l->sector, most = entries_stored(l);
	while (l->entries < entries) {
		uint64_t left = end - l->next;
		/* Each has a sector at least: said before any is read. */
		if (l->next >= end || entries - l->entries > left)
			return err_set(err, -EINVAL, "%s: the log ends before entry %" PRIu64 " of %" PRIu64, l->log->file, l->next >= end ? l->entries : l->entries + left, entries);
		if (pass_hole(l, entries, end))
			continue;
		if (!most--)
			return err_set(err, -EINVAL, "%s: more log entries than the file has bytes", l->log->file);
		int r = log_io(l, false, l->next * l->sector, e, sizeof e);
		if (r)
			return err_set_errno(err, r, "Failed to read log entry %" PRIu64, l->entries);
		uint64_t n = ld_le64(e + 8), flags = ld_le64(e + 16);
		if (flags & ~(uint64_t)LOG_FLAGS)
			return err_set(err, -EINVAL, "Invalid flags 0x%" PRIx64 " in log entry %" PRIu64, flags, l->entries);
		n = flags & LOG_DISCARD ? 0 : n;
		if (n > left - 1)
			return err_set(err, -EINVAL, "%s: log entry %" PRIu64 " is longer than the log", l->log->file, l->entries);
		l->next += 1 + n;
		l->entries++;
	}
	return 0;
}

static int append(struct logger *l, struct err *err)
{
	uint8_t s[SUPER_LEN];
	int64_t size = l->log->drv->file_length(l->log);
	if (size <= 0)
		return size ? err_set_errno(err, (int)size, "%s", l->log->file) : 0;
	int r = log_io(l, false, 0, s, sizeof s);
	if (r)
		return err_set_errno(err, r, "Could not read log superblock");
	if (ld_le64(s) != LOG_MAGIC)
		return err_set(err, -EINVAL, "Invalid log superblock magic");
	if (ld_le64(s + 8) != LOG_VERSION)
		return err_set(err, -EINVAL, "Unsupported log version %" PRIu64, ld_le64(s + 8));
	l->sector = ld_le32(s + 24);
	return sector_size_valid(l->sector) ? find_end(l, ld_le64(s + 16), (uint64_t)size, err) : 0;
}

static int options(struct logger *l, struct block_name *n, bool *on, struct err *err)
{
	bool given = keyvals_get(&n->all, "log-sector-size");
	int r = keyvals_bool(&n->all, "blklogwrites", "log-append", on, err);
	if (!r)
		r = filter_size(n, "log-sector-size", &l->sector, err);
	if (!r)
		r = keyvals_u64(&n->all, "blklogwrites", "log-super-update-interval", 1, UINT64_MAX, &l->interval, err);
	return !r && *on && given ? err_set(err, -EINVAL, "log-append and log-sector-size are mutually exclusive") : r;
}

/* Whole sectors end where the disk does, or past the end of a file, which grows. */
static int check_sector(struct block *b, const struct logger *l, struct err *err)
{
	if (!sector_size_valid(l->sector))
		return err_set(err, -EINVAL, "Invalid log sector size %" PRIu64, l->sector);
	if (l->sector < b->size)
		return err_set(err, -EINVAL, "log-sector-size=%" PRIu64 " is less than the sectors of %s (%u)", l->sector, b->child->file, b->size);
	if (!graph_skip_filters(b->child)->drv->file_length && b->length % l->sector)
		return err_set(err, -EINVAL, "%s: the size of the disk is no multiple of the log's sectors (%" PRIu64 ")", b->child->file, l->sector);
	return 0;
}

int blklogwrites_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	struct logger *l = calloc(1, sizeof *l);
	bool more = false;
	if (!l)
		return err_set(err, -ENOMEM, "out of memory");
	*l = (struct logger){ .sector = 512, .interval = 4096, .next = 1, .lock = PTHREAD_MUTEX_INITIALIZER };
	b->state = l;
	b->drv = &block_blklogwrites;
	int r = options(l, n, &more, err);
	if (!r)
		r = filter_open_file(b, n, "file", depth, err);
	if (!r)
		r = filter_open_child(&l->log, b, n, &(struct filter_child){ .key = "log" }, depth, err);
	if (!r && (r = fit_open(&l->log, err)))
		block_free(l->log);
	if (!r && filter_add_child(b, l->log))
		r = err_set(err, -ENOMEM, "out of memory");
	if (!r && !b->read_only && l->log->read_only)
		r = err_set(err, -EACCES, "blklogwrites: %s: the log is read-only", l->log->file);
	if (!r && more)
		r = append(l, err);
	return r ? r : check_sector(b, l, err);
}
