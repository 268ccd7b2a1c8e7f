/*
 * driver=throttle: limits anywhere in a graph. Requests come here on threads that may wait, and wait; a disk that is limited as a
 * whole (the topmost node of a machine's drive) has its limits in block.c instead, where no thread waits.
 */
#include <errno.h>
#include <stdlib.h>

#include "block/graph.h"

struct throttle_node { struct throttle_group *group; unsigned draining; /* atomic */ };

static void admit(struct block *b, bool write, uint64_t bytes)
{
	struct throttle_node *t = b->state;
	throttle_wait(t->group, write, bytes, &t->draining);
}

static int throttle_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	admit(b, false, len);
	return pass_read(b, off, iov, n, len);
}

static int throttle_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	admit(b, true, len);
	return pass_write(b, off, iov, n, len, flags);
}

static int throttle_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	admit(b, true, len);
	return pass_zero(b, off, len, flags);
}

static int throttle_discard(struct block *b, uint64_t off, uint64_t len)
{
	admit(b, true, len);
	return pass_discard(b, off, len);
}

static void throttle_close(struct block *b)
{
	struct throttle_node *t = b->state;
	if (t)
		throttle_group_unref(t->group);
	free(t);
	b->state = NULL;
}

static const struct block_driver block_throttle_node = {
	PASS_PLACE, .name = "throttle", .read = throttle_read, .write = throttle_write, .zero = throttle_zero, .discard = throttle_discard,
	.flush = pass_flush, .filter = true, .compressed = true, .close = throttle_close,
};

void throttle_node_release(struct block *b, void *on)
{
	struct throttle_node *t = b->state;
	if (b->drv != &block_throttle_node || !t)
		return;
	__atomic_fetch_add(&t->draining, on ? 1u : -1u, __ATOMIC_RELEASE);
	if (on)
		throttle_wake(t->group);
}

int throttle_node_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	const char *name = keyvals_get(&n->all, "throttle-group");
	if (!name)
		return err_set(err, -EINVAL, "throttle: Please specify a throttle group (throttle-group=)");
	struct throttle_group *g = n->o.throttles ? throttle_set_find(n->o.throttles, name) : NULL;
	if (!g)
		return err_set(err, -ENOENT, "Throttle group '%s' does not exist", name);
	struct throttle_node *t = calloc(1, sizeof *t);
	if (!t)
		return err_set(err, -ENOMEM, "out of memory");
	t->group = throttle_group_ref(g);
	b->state = t;
	b->drv = &block_throttle_node;
	return filter_open_file(b, n, "file", depth, err);
}
