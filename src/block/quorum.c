/*
 * quorum: several disks that shall hold the same. A write goes to all, a read asks all (or, with read-pattern=fifo, one after the other
 * until one answers) and what at least vote-threshold of them say is true.
 *
 * A read beside a write of the same place may find some children before and others after it. So a vote that is not unanimous is
 * taken again with no write in flight, and it is then that losers are rewritten: a write of the guest's is never undone by it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/parse.h"
#include "base/util.h"
#include "block/graph.h"

enum { CHILDREN_MAX = 64 };

struct quorum { unsigned threshold; bool fifo, pair, rewrite; };

static unsigned count(const struct block *b)
{
	return 1 + b->nmore;
}

static struct block *child(struct block *b, unsigned i)
{
	return i ? b->more[i - 1] : b->child;
}

/* --- failures: enough must succeed, and the error that most met is told --- */

struct tally { int error[CHILDREN_MAX]; unsigned n, good; };

static void tell(struct tally *t, int r)
{
	t->good += !r;
	if (r)
		t->error[t->n++] = r;
}

static int verdict(const struct block *b, const struct tally *t)
{
	const struct quorum *q = b->state;
	int best = -EIO;
	unsigned most = 0;
	if (t->good >= q->threshold)
		return 0;
	for (unsigned i = 0; i < t->n; i++) {
		unsigned same = 0;
		for (unsigned k = 0; k < t->n; k++)
			same += t->error[k] == t->error[i];
		if (same > most) {
			most = same;
			best = t->error[i];
		}
	}
	return best;
}

/* --- reading --- */

struct answers { uint8_t *buf[CHILDREN_MAX]; int ret[CHILDREN_MAX]; struct tally t; };

static void answers_free(struct answers *a)
{
	for (unsigned i = 0; i < CHILDREN_MAX; i++)
		free(a->buf[i]);
}

static int ask_all(struct block *b, struct answers *a, uint64_t off, uint64_t len)
{
	*a = (struct answers){ 0 };
	for (unsigned i = 0; i < count(b); i++) {
		struct block *c = child(b, i);
		if (!(a->buf[i] = malloc(len)))
			return -ENOMEM;
		struct iovec v = { a->buf[i], len };
		a->ret[i] = c->drv->read(c, off, &v, 1, len);
		tell(&a->t, a->ret[i]);
	}
	return verdict(b, &a->t);
}

/* The answer that most gave; *votes of them. */
static unsigned winner(const struct block *b, const struct answers *a, uint64_t len, unsigned *votes)
{
	unsigned best = 0;
	*votes = 0;
	for (unsigned i = 0; i < count(b); i++) {
		unsigned same = 0;
		for (unsigned k = 0; !a->ret[i] && k < count(b); k++)
			same += k == i || (!a->ret[k] && !memcmp(a->buf[i], a->buf[k], len));
		if (same > *votes) {
			*votes = same;
			best = i;
		}
	}
	return best;
}

static void rewrite(struct block *b, const struct answers *a, unsigned best, uint64_t off, uint64_t len)
{
	struct iovec v = { a->buf[best], len };
	for (unsigned i = 0; i < count(b); i++) {
		struct block *c = child(b, i);
		if (a->ret[i] || !memcmp(a->buf[i], a->buf[best], len))
			continue;
		int r = c->read_only ? -EPERM : c->drv->write(c, off, &v, 1, len, 0);
		log_warn("%s: differs from the majority at %llu, %llu bytes; %s", c->file, (unsigned long long)off, (unsigned long long)len,
			 r ? "it could not be rewritten" : "rewritten");
	}
}

/* Nothing is being written. */
static int vote(struct block *b, struct answers *a, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	const struct quorum *q = b->state;
	unsigned votes = 0;
	int r = ask_all(b, a, off, len);
	if (r)
		return r;
	unsigned best = winner(b, a, len, &votes);
	if (votes < q->threshold || (q->pair && votes < 2)) {
		log_warn("%s: the disks of a quorum differ at %llu, %llu bytes, and %u of them agree", b->file, (unsigned long long)off,
			 (unsigned long long)len, votes);
		return -EIO;
	}
	if (q->rewrite && votes < a->t.good)
		rewrite(b, a, best, off, len);
	iov_copy(iov, n, a->buf[best], false);
	return 0;
}

static int read_fifo(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	int r = -EIO;
	for (unsigned i = 0; r && i < count(b); i++)
		r = child(b, i)->drv->read(child(b, i), off, iov, n, len);
	return r;
}

static int quorum_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	const struct quorum *q = b->state;
	struct answers a;
	unsigned votes = 0;
	if (q->fifo)
		return read_fifo(b, off, iov, n, len);
	int r = ask_all(b, &a, off, len);
	unsigned best = r ? 0 : winner(b, &a, len, &votes);
	if (!r && votes < a.t.good) {
		answers_free(&a);
		pthread_rwlock_wrlock(&b->rmw);
		r = vote(b, &a, off, iov, n, len);
		pthread_rwlock_unlock(&b->rmw);
	} else if (!r) {
		iov_copy(iov, n, a.buf[best], false);
	}
	answers_free(&a);
	return r;
}

/* --- writing --- */

static int quorum_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	struct tally t = { 0 };
	pthread_rwlock_rdlock(&b->rmw);
	for (unsigned i = 0; i < count(b); i++)
		tell(&t, child(b, i)->drv->write(child(b, i), off, iov, n, len, flags));
	pthread_rwlock_unlock(&b->rmw);
	return verdict(b, &t);
}

static int quorum_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	struct tally t = { 0 };
	pthread_rwlock_rdlock(&b->rmw);
	for (unsigned i = 0; i < count(b); i++) {
		struct block *c = child(b, i);
		tell(&t, c->drv->zero ? c->drv->zero(c, off, len, flags) : -ENOTSUP);
	}
	pthread_rwlock_unlock(&b->rmw);
	return verdict(b, &t);
}

/* As in QEMU they are not handed on: discarded sectors of different disks need not read alike. */
static int quorum_discard(struct block *b, uint64_t off, uint64_t len)
{
	return 0;
}

static int quorum_flush(struct block *b)
{
	struct tally t = { 0 };
	for (unsigned i = 0; i < count(b); i++)
		tell(&t, child(b, i)->read_only ? 0 : child(b, i)->drv->flush(child(b, i)));
	return verdict(b, &t);
}

/* Zeroes where all say so. */
static int quorum_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	struct block_extent one;
	*e = (struct block_extent){ .len = len, .present = true, .zero = true };
	for (unsigned i = 0; i < count(b); i++) {
		int r = image_map(child(b, i), NULL, off, e->len, &one);
		if (r || !one.zero) {
			*e = (struct block_extent){ .len = r ? len : one.len, .present = true, .data = true };
			return 0;
		}
		e->len = one.len;
	}
	return 0;
}

static int64_t quorum_length(struct block *b)
{
	return (int64_t)b->length;
}

static int quorum_truncate(struct block *b, uint64_t len)
{
	return len <= b->length ? 0 : -ENOSPC;
}

static void quorum_close(struct block *b)
{
	free(b->state);
	b->state = NULL;
}

static const struct block_driver block_quorum = {
	.name = "quorum", .read = quorum_read, .write = quorum_write, .zero = quorum_zero, .discard = quorum_discard, .flush = quorum_flush,
	.fast = pass_fast, .map = quorum_map, .file_length = quorum_length, .truncate = quorum_truncate, .close = quorum_close,
};

/* --- opening --- */

static int open_children(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	for (unsigned i = 0; i < CHILDREN_MAX; i++) {
		char key[32];
		struct block *c;
		snprintf(key, sizeof key, "children.%u", i);
		int r = filter_open_child(&c, b, n, &(struct filter_child){ .key = key, .disk = true, .optional = true }, depth, err);
		if (!r && !c)
			return i ? 0 : err_set(err, -EINVAL, "quorum: Number of provided children must be 1 or more");
		if (!r && !i)
			b->child = c;
		else if (!r && filter_add_child(b, c))
			r = err_set(err, -ENOMEM, "out of memory");
		if (r)
			return r;
		b->size = MAX(b->size, c->size);
		b->read_only |= c->read_only;
		if (c->length != b->child->length)
			return err_set(err, -EIO, "quorum: children.0 has %llu bytes, %s %llu", (unsigned long long)b->child->length, key,
				       (unsigned long long)c->length);
	}
	return err_set(err, -E2BIG, "quorum: at most %d children", CHILDREN_MAX - 1);
}

static int read_options(struct block *b, struct quorum *q, struct keyvals *l, struct err *err)
{
	const char *pattern = keyvals_get(l, "read-pattern");
	uint64_t threshold = 0;
	int r = keyvals_u64(l, "quorum", "vote-threshold", 0, INT32_MAX, &threshold, err);
	if (!r)
		r = keyvals_bool(l, "quorum", "blkverify", &q->pair, err);
	if (!r)
		r = keyvals_bool(l, "quorum", "rewrite-corrupted", &q->rewrite, err);
	if (r)
		return r;
	q->threshold = (unsigned)threshold;
	if (!threshold)
		return err_set(err, -EINVAL, "quorum: Parameter 'vote-threshold' expects a value >= 1");
	if (threshold > count(b))
		return err_set(err, -ERANGE, "quorum: threshold may not exceed children count");
	q->fifo = pattern && !strcmp(pattern, "fifo");
	if (pattern && !q->fifo && strcmp(pattern, "quorum"))
		return err_set(err, -EINVAL, "quorum: Please set read-pattern as fifo or quorum");
	if (q->pair && (count(b) != 2 || threshold != 2))
		return err_set(err, -EINVAL, "quorum: blkverify=on can only be set if there are exactly two files and vote-threshold is 2");
	if (q->pair && q->rewrite)
		return err_set(err, -EINVAL, "quorum: rewrite-corrupted=on cannot be used with blkverify=on");
	return 0;
}

int quorum_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	struct quorum *q = calloc(1, sizeof *q);
	if (!q)
		return err_set(err, -ENOMEM, "out of memory");
	b->state = q;
	b->drv = &block_quorum;
	b->read_only = n->o.read_only || n->o.snapshot;
	int r = open_children(b, n, depth, err);
	if (r)
		return r;
	b->length = b->child->length;
	return read_options(b, q, &n->all, err);
}
