/*
 * snapshot=on: writes go to an unlinked sparse temporary file, sector by sector, and a bitmap with a
 * bit per sector says which sectors live there. The bitmap is mapped lazily: memory is used for what
 * was written only. The image below is never written.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/util.h"
#include "block/driver.h"

struct overlay {
	uint64_t *bits;
	size_t bits_len;
	struct block top;               /* raw driver on the temporary file */
};

static bool is_top(const struct overlay *o, uint64_t sector)
{
	return __atomic_load_n(&o->bits[sector / 64], __ATOMIC_ACQUIRE) & BIT(sector % 64);
}

static void mark_top(struct overlay *o, uint64_t off, uint64_t len)
{
	uint64_t s = off / 512, end = (off + len) / 512;
	while (s < end) {
		uint64_t n = MIN(end - s, 64 - s % 64);
		uint64_t mask = (n == 64 ? ~0ull : BIT(n) - 1) << (s % 64);
		__atomic_fetch_or(&o->bits[s / 64], mask, __ATOMIC_RELEASE);
		s += n;
	}
}

/* Length of the run at `off` that lives in one place. */
static uint64_t run_length(const struct overlay *o, uint64_t off, uint64_t len, bool top)
{
	uint64_t s = off / 512, end = (off + len) / 512, i = s + 1;
	while (i < end && is_top(o, i) == top)
		i++;
	return (i - s) * 512;
}

static int ov_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct overlay *o = b->overlay;
	struct iovec *part = calloc((size_t)n, sizeof *part);
	int r = part ? 0 : -ENOMEM;
	for (uint64_t done = 0; !r && done < len;) {
		bool top = is_top(o, (off + done) / 512);
		uint64_t run = run_length(o, off + done, len - done, top);
		int k = iov_slice(part, iov, n, done, run);
		struct block *from = top ? &o->top : b->child;
		r = from->drv->read(from, off + done, part, k, run);
		done += run;
	}
	free(part);
	return r;
}

static int ov_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	int r = block_raw.write(&b->overlay->top, off, iov, n, len, 0);
	if (!r)
		mark_top(b->overlay, off, len);
	return r;
}

static int ov_flush(struct block *b)
{
	return 0; /* it is gone at the end anyway */
}

static int ov_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	int r = block_raw.zero(&b->overlay->top, off, len, BLOCK_REQ_MAY_UNMAP);
	if (!r)
		mark_top(b->overlay, off, len);
	return r;
}

static int ov_discard(struct block *b, uint64_t off, uint64_t len)
{
	return b->discard_unmap ? ov_zero(b, off, len, 0) : 0;
}

static bool ov_fast(struct block *b, struct block_req *r)
{
	struct overlay *o = b->overlay;
	if (r->op == BLOCK_WRITE) {
		if (!block_raw.fast(&o->top, r))
			return false;
		mark_top(o, r->off, r->len);
		return true;
	}
	if (r->op != BLOCK_READ || r->len > (1 << 20))
		return false;
	bool top = is_top(o, r->off / 512);
	if (run_length(o, r->off, r->len, top) != r->len)
		return false;
	struct block *from = top ? &o->top : b->child;
	return from->drv->fast(from, r);
}

static void ov_free(struct overlay *o)
{
	if (!o)
		return;
	if (o->bits)
		munmap(o->bits, o->bits_len);
	block_raw.close(&o->top);
	pthread_rwlock_destroy(&o->top.rmw);
	free(o);
}

static void ov_close(struct block *b)
{
	ov_free(b->overlay);
}

/* What is not here yet is the base's. */
static int ov_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	bool top = is_top(b->overlay, off / 512);
	uint64_t run = run_length(b->overlay, off, ALIGN_UP(len, (uint64_t)512), top);
	if (!top && b->child->drv->map)
		return b->child->drv->map(b->child, off, MIN(run, len), e);
	*e = (struct block_extent){ .len = MIN(run, len), .present = true, .data = true };
	return 0;
}

const struct block_driver block_overlay = {
	.name = "raw", .read = ov_read, .write = ov_write, .flush = ov_flush, .discard = ov_discard, .zero = ov_zero,
	.fast = ov_fast, .map = ov_map, .close = ov_close,
};

static int temp_file(struct err *err)
{
	const char *dir = getenv("TMPDIR");
	char name[PATH_MAX];
	if (!dir || !*dir)
		dir = "/var/tmp"; /* /tmp is memory on many hosts */
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
	if (fd >= 0)
		return fd;
	snprintf(name, sizeof name, "%s/lodge-snapshot-XXXXXX", dir);
	fd = mkostemp(name, O_CLOEXEC);
	if (fd < 0)
		return err_set_errno(err, -errno, "snapshot=on: temporary file in %s (set TMPDIR)", dir);
	unlink(name);
	return fd;
}

int overlay_open(struct block *b, struct block *base, struct err *err)
{
	struct overlay *o = calloc(1, sizeof *o);
	if (!o)
		return err_set(err, -ENOMEM, "%s: out of memory", b->file);
	pthread_rwlock_init(&o->top.rmw, NULL);
	b->length = base->length;
	b->size = base->size;
	b->probed_raw = base->probed_raw;
	o->top.drv = &block_raw;
	o->top.size = 512;
	o->top.file = b->file;
	o->top.cache = CACHE_UNSAFE;
	o->top.discard_unmap = true;
	o->top.fd = temp_file(err);
	int r = o->top.fd < 0 ? o->top.fd : 0;
	o->bits_len = ALIGN_UP(b->length / 512 / 8 + 8, (uint64_t)4096);
	if (!r && ftruncate(o->top.fd, (off_t)b->length))
		r = err_set_errno(err, -errno, "%s: temporary file of %llu MiB", b->file, (unsigned long long)(b->length >> 20));
	void *p = mmap(NULL, o->bits_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (!r && p == MAP_FAILED)
		r = err_set_errno(err, -errno, "%s: snapshot bitmap", b->file);
	o->bits = p == MAP_FAILED ? NULL : p;
	if (r) {
		ov_free(o);
		return r;
	}
	b->overlay = o;
	b->drv = &block_overlay;
	return 0;
}
