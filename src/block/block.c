/* Opening, checking and dispatching requests: at once when the driver can, else on a worker. */
#include "block/block.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/driver.h"
#include "loop/loop.h"

static int choose_format(struct block *b, const struct block_opts *o, struct err *err)
{
	_Alignas(4096) uint8_t head[4096];
	if (o->format && !strcmp(o->format, "raw"))
		return 0;
	if (o->format)
		return err_set(err, -ENOTSUP, "%s: format '%s' is not supported yet; supported: raw", b->file, o->format);
	ssize_t n = pread(b->fd, head, sizeof head, 0);
	const char *found = n > 0 ? probe_format(head, (size_t)n) : NULL;
	if (found)
		return err_set(err, -ENOTSUP, "%s: this is a %s image, which is not supported yet; convert it with 'qemu-img convert "
			       "-O raw', or say format=raw if the guest shall see it as it is", b->file, found);
	b->probed_raw = !o->read_only;
	if (b->probed_raw)
		log_warn("%s: no format given and it looks raw; sector 0 is protected against headers of other formats. "
			 "Say format=raw to allow them", b->file);
	return 0;
}

static int check_name(const char *file, struct err *err)
{
	static const char *const remote[] = { "nbd:", "nbd+unix:", "http:", "https:", "ftp:", "ssh:", "iscsi:", "rbd:", "nfs:",
					      "gluster:", "json:", "nvme:", "blkdebug:", "fat:" };
	if (!file || !*file)
		return err_set(err, -EINVAL, "drive: no file given (file=PATH)");
	for (size_t i = 0; i < ARRAY_SIZE(remote); i++) {
		if (!strncmp(file, remote[i], strlen(remote[i])))
			return err_set(err, -ENOTSUP, "%s: protocol '%.*s' is not supported yet; supported: files and block devices",
				       file, (int)strlen(remote[i]) - 1, remote[i]);
	}
	return 0;
}

static void free_block(struct block *b)
{
	if (b->drv)
		b->drv->close(b);
	pthread_mutex_destroy(&b->lock);
	pthread_cond_destroy(&b->idle);
	free(b->id);
	free(b->file);
	free(b->owner);
	free(b);
}

int block_open(struct block **out, const struct block_opts *o, struct loop *l, struct workers *w, struct err *err)
{
	int r = check_name(o->file, err);
	if (r)
		return r;
	struct block *b = calloc(1, sizeof *b);
	if (!b)
		return err_set(err, -ENOMEM, "%s: out of memory", o->file);
	pthread_mutex_init(&b->lock, NULL);
	pthread_cond_init(&b->idle, NULL);
	b->fd = -1;
	b->loop = l;
	b->workers = w;
	b->cache = o->cache;
	b->read_only = o->read_only;
	b->discard_unmap = o->discard_unmap;
	b->detect_zeroes = o->detect_zeroes;
	b->file = strdup(strncmp(o->file, "file:", 5) ? o->file : o->file + 5);
	b->id = o->id ? strdup(o->id) : NULL;
	if (!b->file || (o->id && !b->id))
		r = err_set(err, -ENOMEM, "%s: out of memory", o->file);
	if (!r)
		r = raw_open(b, o, err);
	if (!r)
		r = choose_format(b, o, err);
	if (!r && o->snapshot)
		r = overlay_open(b, err);
	if (r) {
		free_block(b);
		return r;
	}
	*out = b;
	return 0;
}

void block_close(struct block *b)
{
	if (!b)
		return;
	block_drain(b);
	b->drv->flush(b);
	free_block(b);
}

/* --- requests --- */

/* A raw image that was taken for raw because nobody said so must not become something else. */
static bool changes_format(const struct block *b, const struct block_req *r)
{
	uint8_t head[512];
	size_t n = 0;
	if (!b->probed_raw || r->op != BLOCK_WRITE || r->off)
		return false;
	for (int i = 0; i < r->iovcnt && n < sizeof head; i++) {
		size_t part = MIN(sizeof head - n, r->iov[i].iov_len);
		memcpy(head + n, r->iov[i].iov_base, part);
		n += part;
	}
	return probe_format(head, n);
}

static int check_request(const struct block *b, const struct block_req *r)
{
	if (r->op == BLOCK_FLUSH)
		return 0;
	if (r->op > BLOCK_ZERO || (r->off | r->len) & (b->size - 1))
		return -EINVAL;
	if (range_bad(r->off, r->len, b->length))
		return -EINVAL;
	if (b->read_only && r->op != BLOCK_READ)
		return -EPERM;
	if (r->op == BLOCK_READ || r->op == BLOCK_WRITE) {
		uint64_t sum = 0;
		for (int i = 0; i < r->iovcnt; i++)
			sum += r->iov[i].iov_len;
		if (r->iovcnt < 0 || sum != r->len || sum > INT_MAX)
			return -EINVAL;
	}
	if (changes_format(b, r)) {
		log_guest("%s: the guest wrote another format's header to sector 0; refused (say format=raw to allow it)", b->file);
		return -EPERM;
	}
	return 0;
}

static void perform(struct block_req *r)
{
	struct block *b = r->blk;
	bool write = r->op == BLOCK_WRITE;
	if (write && b->detect_zeroes && iov_is_zero(r->iov, r->iovcnt)) {
		r->ret = b->drv->zero(b, r->off, r->len, r->flags | BLOCK_REQ_MAY_UNMAP);
		return;
	}
	switch (r->op) {
	case BLOCK_READ:
		r->ret = b->drv->read(b, r->off, r->iov, r->iovcnt, r->len);
		break;
	case BLOCK_WRITE:
		r->ret = b->drv->write(b, r->off, r->iov, r->iovcnt, r->len, r->flags);
		break;
	case BLOCK_FLUSH:
		r->ret = b->drv->flush(b);
		break;
	case BLOCK_DISCARD:
		r->ret = b->drv->discard(b, r->off, r->len);
		break;
	case BLOCK_ZERO:
		r->ret = b->drv->zero(b, r->off, r->len, r->flags);
		break;
	}
}

/* `r` may be gone after done(); the count keeps the block alive until then. */
static void finish(struct block_req *r)
{
	struct block *b = r->blk;
	r->done(r);
	pthread_mutex_lock(&b->lock);
	if (!--b->in_flight)
		pthread_cond_broadcast(&b->idle);
	pthread_mutex_unlock(&b->lock);
}

static void on_worker(void *opaque)
{
	struct block_req *r = opaque;
	perform(r);
	finish(r);
}

void block_submit(struct block *b, struct block_req *r)
{
	r->blk = b;
	pthread_mutex_lock(&b->lock);
	b->in_flight++;
	pthread_mutex_unlock(&b->lock);
	r->ret = check_request(b, r);
	if (r->ret || (r->op != BLOCK_FLUSH && !r->len)) {
		finish(r);
		return;
	}
	bool now = r->flags & BLOCK_REQ_INLINE && !(b->detect_zeroes && r->op == BLOCK_WRITE) && b->drv->fast(b, r);
	if (!now && b->workers && !workers_submit(b->workers, on_worker, NULL, r))
		return;
	if (!now)
		perform(r); /* no workers: slower, but it gets done */
	finish(r);
}

void block_drain(struct block *b)
{
	pthread_mutex_lock(&b->lock);
	while (b->in_flight)
		pthread_cond_wait(&b->idle, &b->lock);
	pthread_mutex_unlock(&b->lock);
}

/* --- facts --- */

uint64_t block_length(const struct block *b)
{
	return b->length;
}

unsigned block_size(const struct block *b)
{
	return b->size;
}

bool block_read_only(const struct block *b)
{
	return b->read_only;
}

bool block_write_cache(const struct block *b)
{
	return b->cache != CACHE_WRITETHROUGH && b->cache != CACHE_DIRECTSYNC;
}

const char *block_id(const struct block *b)
{
	return b->id;
}

const char *block_name(const struct block *b)
{
	return b->file;
}

int block_attach(struct block *b, const char *owner, struct err *err)
{
	if (b->owner)
		return err_set(err, -EBUSY, "drive '%s' is already used by %s", b->id ? b->id : b->file, b->owner);
	b->owner = strdup(owner);
	return b->owner ? 0 : err_set(err, -ENOMEM, "out of memory");
}

void block_detach(struct block *b)
{
	free(b->owner);
	b->owner = NULL;
}
