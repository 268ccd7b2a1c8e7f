/*
 * blkdebug: a filter that fails requests, or stops them, at points that rules name.
 *
 * An event (events.h) looks through the rules for it whose state is the current one: injecting rules become the active ones, in place
 * of those that were; set-state rules change the state for the next event; suspend rules (breakpoints) stop the thread that
 * came by. A request on this node fails when an active rule fits it. Requests are cut and widened to the limits first, as
 * QEMU's block layer would do for a device that has them.
 */
#include "block/blkdebug.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

struct blkdebug_stop { char *tag; bool go, told; struct blkdebug_stop *next; };

/* --- rules --- */

static int check(struct block *b, enum blkdebug_io io, uint64_t off, uint64_t len)
{
	struct blkdebug *d = b->state;
	int error = 0;
	pthread_mutex_lock(&d->lock);
	for (struct blkdebug_rule **p = &d->rules, *r; (r = *p); p = &r->next) {
		bool here = r->offset < 0 || ((uint64_t)r->offset >= off && (uint64_t)r->offset - off < len);
		if (!r->active || !here || !(r->io & 1u << io))
			continue;
		error = r->error;
		if (error && r->once) {
			*p = r->next;
			d->nrules--;
			free(r);
		}
		break;
	}
	pthread_mutex_unlock(&d->lock);
	return -error;
}

/* `tag` becomes its own. Lock held, and let go while waiting. */
static void stop_here(struct blkdebug *d, char *tag)
{
	struct blkdebug_stop s = { .tag = tag }, **p;
	for (p = &d->stopped; *p; p = &(*p)->next)
		;
	*p = &s;
	while (!s.go)
		pthread_cond_wait(&d->resumed, &d->lock);
	for (p = &d->stopped; *p != &s; p = &(*p)->next)
		;
	*p = s.next;
	free(tag);
}

/* The breakpoints of one event, which are gone with that; each is left by one resume. Lock held. */
static void suspend(struct blkdebug *d, enum block_event e, unsigned state)
{
	for (struct blkdebug_rule **p = &d->rules, *r; (r = *p);) {
		if (r->action != BLKDEBUG_SUSPEND || r->event != e || (r->state && r->state != state)) {
			p = &r->next;
			continue;
		}
		char *tag = r->tag;
		*p = r->next;
		d->nrules--;
		free(r);
		stop_here(d, tag);
		p = &d->rules; /* others were here meanwhile */
	}
}

static void blkdebug_event(struct block *b, enum block_event e)
{
	struct blkdebug *d = b->state;
	bool injects = false;
	pthread_mutex_lock(&d->lock);
	unsigned state = d->state, next = state;
	for (struct blkdebug_rule *r = d->rules; r; r = r->next)
		injects |= r->action == BLKDEBUG_INJECT && r->event == e && (!r->state || r->state == state);
	for (struct blkdebug_rule *r = d->rules; r; r = r->next) {
		bool mine = r->event == e && (!r->state || r->state == state);
		if (injects && r->action == BLKDEBUG_INJECT)
			r->active = mine;
		if (mine && r->action == BLKDEBUG_SET_STATE)
			next = r->new_state;
	}
	d->state = next;
	suspend(d, e, state);
	pthread_mutex_unlock(&d->lock);
}

/* --- moving data: widened to `align`, cut at max-transfer --- */

struct span { uint64_t off, end; };

/* What is beyond the file's end is nobody's, unless the request itself goes there. */
static struct span widen(struct block *b, uint64_t off, uint64_t len)
{
	struct blkdebug *d = b->state;
	uint64_t a = MAX(d->align, 1u);
	struct span s = { off, off + len };
	int64_t size = pass_file_length(b);
	if (a == 1 || off > INT64_MAX - a - len)
		return s;
	s.off = ALIGN_DOWN(off, a);
	s.end = MAX(s.end, MIN(ALIGN_UP(s.end, a), size < 0 ? 0 : (uint64_t)size));
	return s;
}

static int move(struct block *b, bool write, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	struct blkdebug *d = b->state;
	struct iovec *part = calloc((size_t)n + 1, sizeof *part);
	int r = part ? 0 : -ENOMEM;
	for (uint64_t done = 0, now; !r && done < len; done += now) {
		now = d->max_transfer ? MIN(len - done, d->max_transfer) : len - done;
		int k = iov_slice(part, iov, n, done, now);
		r = check(b, write ? BLKDEBUG_WRITE : BLKDEBUG_READ, off + done, now);
		if (!r)
			r = write ? pass_write(b, off + done, part, k, now, flags) : pass_read(b, off + done, part, k, now);
	}
	free(part);
	return r;
}

static int read_wide(struct block *b, struct span s, uint64_t off, const struct iovec *iov, int n)
{
	uint8_t *buf = malloc(s.end - s.off);
	struct iovec v = { buf, s.end - s.off };
	int r = buf ? move(b, false, s.off, &v, 1, s.end - s.off, 0) : -ENOMEM;
	if (!r)
		iov_copy(iov, n, buf + (off - s.off), false);
	free(buf);
	return r;
}

static int blkdebug_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct span s = widen(b, off, len);
	return s.off == off && s.end == off + len ? move(b, false, off, iov, n, len, 0) : read_wide(b, s, off, iov, n);
}

/* One edge of a widened write: the whole of [off, end) is read. */
static int read_edge(struct block *b, uint64_t off, uint64_t end, uint8_t *buf, enum block_event before, enum block_event after)
{
	struct iovec v = { buf, end - off };
	if (off == end)
		return 0;
	blkdebug_event(b, before);
	int r = move(b, false, off, &v, 1, end - off, 0);
	if (!r)
		blkdebug_event(b, after);
	return r;
}

static int write_wide(struct block *b, struct span s, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	struct blkdebug *d = b->state;
	uint64_t head_end = s.off == off ? s.off : MIN(s.off + d->align, s.end), tail = s.end == off + len ? s.end : ALIGN_DOWN(s.end - 1, d->align);
	uint8_t *buf = malloc(s.end - s.off);
	struct iovec v = { buf, s.end - s.off };
	int r = buf ? read_edge(b, s.off, head_end, buf, EVENT_PWRITEV_RMW_HEAD, EVENT_PWRITEV_RMW_AFTER_HEAD) : -ENOMEM;
	if (!r && tail >= head_end)
		r = read_edge(b, tail, s.end, buf + (tail - s.off), EVENT_PWRITEV_RMW_TAIL, EVENT_PWRITEV_RMW_AFTER_TAIL);
	if (!r) {
		iov_copy(iov, n, buf + (off - s.off), true);
		blkdebug_event(b, EVENT_PWRITEV);
		r = move(b, true, s.off, &v, 1, s.end - s.off, flags);
		blkdebug_event(b, EVENT_PWRITEV_DONE);
	}
	free(buf);
	return r;
}

static int blkdebug_flush(struct block *b);

/* A write that has to be stable when it is done is a write and a flush, so that rules see the flush. */
static int make_stable(struct block *b, int r, unsigned flags)
{
	if (r || b->cache == CACHE_UNSAFE || (block_write_cache(b) && !(flags & BLOCK_REQ_FUA)))
		return r;
	blkdebug_event(b, EVENT_FLUSH_TO_OS);
	blkdebug_event(b, EVENT_FLUSH_TO_DISK);
	return blkdebug_flush(b);
}

static int write_any(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	struct blkdebug *d = b->state;
	struct span s = widen(b, off, len);
	__atomic_store_n(&d->dirty, true, __ATOMIC_RELEASE);
	if (s.off != off || s.end != off + len) { /* alone: it writes what others may be writing */
		pthread_rwlock_wrlock(&b->rmw);
		int r = write_wide(b, s, off, iov, n, len, flags);
		pthread_rwlock_unlock(&b->rmw);
		return r;
	}
	blkdebug_event(b, EVENT_PWRITEV);
	if (d->align)
		pthread_rwlock_rdlock(&b->rmw);
	int r = move(b, true, off, iov, n, len, flags);
	if (d->align)
		pthread_rwlock_unlock(&b->rmw);
	blkdebug_event(b, EVENT_PWRITEV_DONE);
	return r;
}

static int blkdebug_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	return make_stable(b, write_any(b, off, iov, n, len, flags), flags);
}

/* --- ranges without data: edges by writing (zeroes) or not at all (discard), the rest in pieces of at most `max` --- */

static int zero_piece(struct block *b, uint64_t off, uint64_t len, unsigned flags, uint64_t align)
{
	if ((off | len) % align)
		return flags & BLOCK_REQ_NO_FALLBACK ? -ENOTSUP : zero_by_writing(b, off, len, flags, write_any);
	int r = check(b, BLKDEBUG_WRITE_ZEROES, off, len);
	return r ? r : pass_zero(b, off, len, flags);
}

static int blkdebug_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	struct blkdebug *d = b->state;
	uint64_t align = MAX(MAX(d->opt_write_zero, d->align), 1u), max = d->max_write_zero ? d->max_write_zero : INT64_MAX;
	int r = 0;
	__atomic_store_n(&d->dirty, true, __ATOMIC_RELEASE);
	blkdebug_event(b, EVENT_PWRITEV_ZERO);
	for (uint64_t n; !r && len; off += n, len -= n) {
		n = off % align ? MIN(len, align - off % align) : len >= align ? MIN(ALIGN_DOWN(len, align), max) : len;
		r = zero_piece(b, off, n, flags, align);
	}
	blkdebug_event(b, EVENT_PWRITEV_DONE);
	return make_stable(b, r, flags);
}

static int blkdebug_discard(struct block *b, uint64_t off, uint64_t len)
{
	struct blkdebug *d = b->state;
	uint64_t align = MAX(MAX(d->opt_discard, d->align), 1u), max = d->max_discard ? d->max_discard : INT64_MAX;
	uint64_t end = ALIGN_DOWN(off + len, align);
	int r = 0;
	__atomic_store_n(&d->dirty, true, __ATOMIC_RELEASE);
	off = ALIGN_UP(off, align);
	for (uint64_t n; !r && off < end; off += n) {
		n = MIN(end - off, max);
		r = check(b, BLKDEBUG_DISCARD, off, n);
		if (!r)
			r = pass_discard(b, off, n);
	}
	return r;
}

/* As in QEMU a flush with nothing written since the last one does not come here. */
static int blkdebug_flush(struct block *b)
{
	struct blkdebug *d = b->state;
	int r = __atomic_exchange_n(&d->dirty, false, __ATOMIC_ACQ_REL) ? check(b, BLKDEBUG_FLUSH, 0, 0) : 0;
	if (r)
		__atomic_store_n(&d->dirty, true, __ATOMIC_RELEASE);
	return r ? r : pass_flush(b);
}

static int blkdebug_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	int r = check(b, BLKDEBUG_BLOCK_STATUS, off, len);
	return r ? r : pass_map(b, off, len, e);
}

static void blkdebug_close(struct block *b)
{
	struct blkdebug *d = b->state;
	struct blkdebug_rule *next;
	if (!d)
		return;
	for (struct blkdebug_rule *r = d->rules; r; r = next) {
		next = r->next;
		free(r->tag);
		free(r);
	}
	pthread_mutex_destroy(&d->lock);
	pthread_cond_destroy(&d->resumed);
	free(d);
	b->state = NULL;
}

static const struct block_driver block_blkdebug = {
	PASS_PLACE_BUT_MAP, .name = "blkdebug", .read = blkdebug_read, .write = blkdebug_write, .zero = blkdebug_zero, .discard = blkdebug_discard,
	.flush = blkdebug_flush, .map = blkdebug_map, .event = blkdebug_event, .filter = true, .close = blkdebug_close,
};

int blkdebug_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	struct blkdebug *d = calloc(1, sizeof *d);
	if (!d)
		return err_set(err, -ENOMEM, "out of memory");
	pthread_mutex_init(&d->lock, NULL);
	pthread_cond_init(&d->resumed, NULL);
	d->state = 1;
	b->state = d;
	b->drv = &block_blkdebug;
	int r = filter_open_file(b, n, "image", depth, err);
	if (!r)
		r = blkdebug_config(d, &n->all, 1, err);
	if (!r)
		blkdebug_event(b, EVENT_NONE);
	return r;
}

/* --- breakpoints --- */

static struct blkdebug *find(struct block *b)
{
	while (b && b->drv != &block_blkdebug)
		b = b->child;
	return b ? b->state : NULL;
}

int image_break(struct block *b, const char *event, const char *tag)
{
	struct blkdebug *d = find(b);
	int e = blkdebug_event_of(event);
	if (!d)
		return -ENOTSUP;
	if (e < 0)
		return -ENOENT;
	struct blkdebug_rule r = { .action = BLKDEBUG_SUSPEND, .event = (enum block_event)e, .tag = strdup(tag) };
	pthread_mutex_lock(&d->lock);
	int ret = r.tag ? blkdebug_add_rule(d, &r) : -ENOMEM;
	pthread_mutex_unlock(&d->lock);
	if (ret)
		free(r.tag);
	return ret;
}

/* The first request that stands at `tag` (NULL: at any) goes on. Lock held. */
static bool resume_one(struct blkdebug *d, const char *tag)
{
	for (struct blkdebug_stop *s = d->stopped; s; s = s->next) {
		if (s->go || (tag && strcmp(s->tag, tag)))
			continue;
		s->go = true;
		pthread_cond_broadcast(&d->resumed);
		return true;
	}
	return false;
}

int image_unbreak(struct block *b, const char *tag)
{
	struct blkdebug *d = find(b);
	int ret = d ? -ENOENT : -ENOTSUP;
	if (!d)
		return ret;
	pthread_mutex_lock(&d->lock);
	for (struct blkdebug_rule **p = &d->rules, *r; (r = *p);) {
		if (r->action != BLKDEBUG_SUSPEND || strcmp(r->tag, tag)) {
			p = &r->next;
			continue;
		}
		*p = r->next;
		d->nrules--;
		free(r->tag);
		free(r);
		ret = 0;
	}
	while (resume_one(d, tag))
		ret = 0;
	pthread_mutex_unlock(&d->lock);
	return ret;
}

int image_resume(struct block *b, const char *tag)
{
	struct blkdebug *d = find(b);
	if (!d)
		return -ENOTSUP;
	pthread_mutex_lock(&d->lock);
	bool found = resume_one(d, tag);
	pthread_mutex_unlock(&d->lock);
	return found ? 0 : -ENOENT;
}

unsigned image_stopped(struct block *b, const char *tag)
{
	struct blkdebug *d = find(b);
	unsigned n = 0;
	if (!d)
		return 0;
	pthread_mutex_lock(&d->lock);
	for (struct blkdebug_stop *s = d->stopped; s; s = s->next)
		n += !s->go && (!tag || !strcmp(s->tag, tag));
	pthread_mutex_unlock(&d->lock);
	return n;
}

char *image_stop_news(struct block *b)
{
	struct blkdebug *d = find(b);
	char *tag = NULL;
	if (!d)
		return NULL;
	pthread_mutex_lock(&d->lock);
	for (struct blkdebug_stop *s = d->stopped; s && !tag; s = s->next) {
		if (s->told || s->go)
			continue;
		s->told = true;
		tag = strdup(s->tag);
	}
	pthread_mutex_unlock(&d->lock);
	return tag;
}
