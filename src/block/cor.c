/*
 * Copy on read: what a guest reads from a backing file is written to the image, in whole clusters, so that it is there next time.
 * As a node (driver=copy-on-read, with bottom=) or as a property of the disk (-drive copy-on-read=on). The copying itself, and how it
 * stays out of the way of writes, is q_copy_up().
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "block/graph.h"
#include "block/qcow2.h"

/* Does the chain from `b` down to `bottom` hold something at `off`? *len becomes the length of what that is said of. */
static int holds(struct block *b, struct block *bottom, uint64_t off, uint64_t *len, bool *yes)
{
	struct block_extent e;
	*yes = false;
	if (!b || off >= b->length)
		return 0;
	int r = image_map(b, image_backing(bottom), off, MIN(*len, b->length - off), &e);
	*len = r ? *len : e.len;
	*yes = e.present;
	return r;
}

int cor_fill(struct block *b, struct block *bottom, uint64_t off, uint64_t len)
{
	struct block_extent e;
	int r = 0;
	for (uint64_t n; !r && len; off += n, len -= n) {
		bool copy;
		r = b->drv->map(b, off, len, &e);
		n = r ? len : MIN(e.len, len);
		copy = !r && !e.present;
		if (copy && bottom)
			r = bottom == b ? (copy = false, 0) : holds(image_backing(b), bottom, off, &n, &copy);
		if (!r && copy)
			r = q_copy_up(b->qcow2, off, n);
	}
	return r;
}

int cor_enable(struct block *b, struct err *err)
{
	if (b->read_only)
		return err_set(err, -EACCES, "%s: Can't use copy-on-read on read-only device", b->file);
	b = graph_skip_filters(b);
	if (b->qcow2)
		b->qcow2->copy_on_read = true;
	return 0;
}

/* --- the node --- */

struct cor { struct block *image, *bottom; };

static int cor_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	struct cor *c = b->state;
	uint64_t size = block_length(c->image), there = off < size ? MIN(len, size - off) : 0;
	int r = c->image->qcow2 && there ? cor_fill(c->image, c->bottom, off, there) : 0;
	return r ? r : pass_read(b, off, iov, n, len);
}

static void cor_close(struct block *b)
{
	free(b->state);
	b->state = NULL;
}

static const struct block_driver block_cor = {
	PASS_PLACE, .name = "copy-on-read", .read = cor_read, .write = pass_write, .discard = pass_discard, .zero = pass_zero, .flush = pass_flush,
	.filter = true, .compressed = true, .close = cor_close,
};

struct search { const char *name; struct block *found; };

static void look(struct block *b, void *opaque)
{
	struct search *s = opaque;
	if (!s->found && b->node_name && !strcmp(b->node_name, s->name))
		s->found = b;
}

static int find_bottom(struct block *b, struct cor *c, const char *name, struct err *err)
{
	struct search s = { name, NULL };
	graph_walk(b->child, look, &s);
	if (!s.found)
		return err_set(err, -ENOENT, "Bottom node '%s' not found", name);
	if (s.found->drv->filter)
		return err_set(err, -EINVAL, "Bottom node '%s' is a filter", name);
	for (struct block *i = c->image; i; i = graph_skip_filters(image_backing(i)))
		if (i == s.found)
			c->bottom = i;
	return c->bottom ? 0 : err_set(err, -EINVAL, "Bottom node '%s' is not in the chain of backing files", name);
}

int cor_open(struct block *b, struct block_name *n, unsigned depth, struct err *err)
{
	const char *bottom = keyvals_get(&n->all, "bottom");
	struct cor *c = calloc(1, sizeof *c);
	if (!c)
		return err_set(err, -ENOMEM, "out of memory");
	b->state = c;
	b->drv = &block_cor;
	int r = filter_open_file(b, n, "file", depth, err);
	if (!r && b->read_only)
		r = err_set(err, -EPERM, "copy-on-read: %s: Block node is read-only", b->child->file);
	if (r)
		return r;
	c->image = graph_skip_filters(b->child);
	return bottom ? find_bottom(b, c, bottom, err) : 0;
}
