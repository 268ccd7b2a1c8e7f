/* Nodes above nodes: opening filters and their children, walking graphs, and what filters hand down unchanged. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/graph.h"
#include "block/qcow2.h"

static const struct filter_type {
	const char *name;
	int (*open)(struct block *b, struct block_name *n, unsigned depth, struct err *err);
} types[] = {
	{ "blkdebug", blkdebug_open }, { "blklogwrites", blklogwrites_open }, { "blkverify", blkverify_open },
	{ "compress", compress_open }, { "copy-on-read", cor_open }, { "preallocate", preallocate_open }, { "quorum", quorum_open },
	{ "throttle", throttle_node_open },
};

static const struct filter_type *find(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(types); i++)
		if (!strcmp(name, types[i].name))
			return &types[i];
	return NULL;
}

bool filter_has_driver(const char *name)
{
	return find(name);
}

static const char *const prefixes[] = { "blkdebug:", "blkverify:" };

bool filter_is_name(const char *file)
{
	for (size_t i = 0; i < ARRAY_SIZE(prefixes); i++)
		if (!strncmp(file, prefixes[i], strlen(prefixes[i])))
			return true;
	return false;
}

/* blkdebug:CONFIG:FILE, blkverify:RAW:IMAGE; what stands last may be any name, and have colons. */
int filter_name(struct block_name *n, const char *file, struct err *err)
{
	const char *first = strchr(file, ':') + 1, *second = strchr(first, ':');
	bool debug = !strncmp(file, "blkdebug:", strlen("blkdebug:"));
	if (!second)
		return err_set(err, -EINVAL, "%s: %s", file, debug ? "blkdebug requires both config file and image path" :
			       "blkverify requires raw copy and original image path");
	char *name = strndup(first, (size_t)(second - first));
	int r = name ? keyvals_add(&n->all, debug ? "config" : "raw.filename", name) : -ENOMEM;
	if (!r)
		r = keyvals_add(&n->all, debug ? "image.filename" : "x-image", second + 1);
	free(name);
	n->filter = debug ? "blkdebug" : "blkverify";
	return r ? err_set(err, r, "out of memory") : 0;
}

/* --- opening --- */

int filter_open(struct block **out, struct block_name *n, struct loop *l, struct workers *w, unsigned depth, struct err *err)
{
	struct block *b = block_new(&n->o, l, w);
	int r = b ? find(n->filter)->open(b, n, depth, err) : err_set(err, -ENOMEM, "out of memory");
	if (!r)
		r = keyvals_end(&n->all, n->filter, err);
	if (r) {
		block_free(b);
		return r;
	}
	if (!*b->file) { /* messages name the file at the bottom */
		char *name = strdup(b->child->file);
		if (name) {
			free(b->file);
			b->file = name;
		}
	}
	*out = b;
	return 0;
}

/* What a child has of the node above when it says nothing about it. */
static struct block_opts inherited(const struct block_name *n, const struct filter_child *c)
{
	const struct block_opts *o = &n->o;
	return (struct block_opts){ .tls = o->tls, .throttles = o->throttles, .read_only = o->read_only || o->snapshot, .auto_read_only = o->auto_read_only,
				    .cache = o->cache, .aio = o->aio, .discard_unmap = o->discard_unmap, .shared = o->shared,
				    .protocol = !c->disk };
}

int filter_open_child(struct block **out, struct block *b, struct block_name *n, const struct filter_child *c, unsigned depth, struct err *err)
{
	struct block_opts o = inherited(n, c);
	struct keyvals sub = { 0 };
	char prefix[64];
	*out = NULL;
	snprintf(prefix, sizeof prefix, "%s.", c->key);
	const char *name = keyvals_get(&n->all, c->key);
	if (name)
		return err_set(err, -ENOENT, "%s: %s=%s names no node; write out its options (%s.driver=...)", n->filter, c->key, name, c->key);
	if (!keyvals_sub(&sub, &n->all, prefix) && !c->name)
		return c->optional ? 0 : err_set(err, -EINVAL, "%s: %s= is missing", n->filter, c->key);
	int r = 0;
	if (sub.n == 1 && !strcmp(sub.o[0].key, "filename"))
		o.file = sub.o[0].val; /* any name */
	else
		o.options = &sub;
	if (c->name) {
		o.file = c->name;
		o.options = NULL;
	} else if (o.file && c->disk)
		r = err_set(err, -EINVAL, "%s: %s: Must specify either driver or file", n->filter, c->key);
	if (!r)
		r = block_open_node(out, &o, b->loop, b->workers, depth + 1, err);
	keyvals_free(&sub);
	return r;
}

int filter_open_file(struct block *b, struct block_name *n, const char *key, unsigned depth, struct err *err)
{
	int r = filter_open_child(&b->child, b, n, &(struct filter_child){ .key = key }, depth, err);
	if (r)
		return r;
	b->length = b->child->length;
	b->size = b->child->size;
	b->probed_raw = b->child->probed_raw;
	b->read_only = n->o.read_only || n->o.snapshot || b->child->read_only;
	return 0;
}

int filter_size(struct block_name *n, const char *key, uint64_t *v, struct err *err)
{
	const char *text = keyvals_get(&n->all, key);
	if (text && parse_size(text, 1, v))
		return err_set(err, -EINVAL, "%s: Parameter '%s' expects a non-negative number below 2^64 (with k, M, G, T, P or E behind it or not), not '%s'", n->filter, key, text);
	return 0;
}

int filter_add_child(struct block *b, struct block *child)
{
	struct block **more = realloc(b->more, (b->nmore + 1) * sizeof *more);
	if (!more) {
		block_free(child);
		return -ENOMEM;
	}
	b->more = more;
	b->more[b->nmore++] = child;
	return 0;
}

/* --- walking --- */

void graph_walk(struct block *b, void (*fn)(struct block *b, void *opaque), void *opaque)
{
	if (!b)
		return;
	fn(b, opaque);
	graph_walk(b->child, fn, opaque);
	graph_walk(b->backing, fn, opaque);
	for (unsigned i = 0; i < b->nmore; i++)
		graph_walk(b->more[i], fn, opaque);
	if (b->qcow2 && b->qcow2->data != b->child)
		graph_walk(b->qcow2->data, fn, opaque);
}

struct block *graph_skip_filters(struct block *b)
{
	while (b && b->drv && b->drv->filter && b->child)
		b = b->child;
	return b;
}

/* A format below keeps what it was opened with, but for when its own writes become stable. */
void graph_adopt(struct block *b, enum block_cache cache, bool read_only)
{
	b->cache = cache;
	if (b->qcow2 || b->foreign)
		return;
	b->discard_unmap = true;
	b->read_only = read_only;
	if (b->child)
		graph_adopt(b->child, cache, read_only);
	for (unsigned i = 0; i < b->nmore; i++)
		graph_adopt(b->more[i], cache, read_only);
}

/* --- what goes through --- */

int pass_read(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len)
{
	return b->child->drv->read(b->child, off, iov, n, len);
}

int pass_write(struct block *b, uint64_t off, const struct iovec *iov, int n, uint64_t len, unsigned flags)
{
	return b->child->drv->write(b->child, off, iov, n, len, flags);
}

int pass_flush(struct block *b)
{
	block_event(b->child, EVENT_FLUSH_TO_OS);
	block_event(b->child, EVENT_FLUSH_TO_DISK);
	return b->child->drv->flush(b->child);
}

int pass_discard(struct block *b, uint64_t off, uint64_t len)
{
	return b->child->drv->discard ? b->child->drv->discard(b->child, off, len) : -ENOTSUP;
}

int pass_zero(struct block *b, uint64_t off, uint64_t len, unsigned flags)
{
	return b->child->drv->zero ? b->child->drv->zero(b->child, off, len, flags) : -ENOTSUP;
}

bool pass_fast(struct block *b, struct block_req *r)
{
	return false;
}

int pass_map(struct block *b, uint64_t off, uint64_t len, struct block_extent *e)
{
	if (b->child->drv->map)
		return b->child->drv->map(b->child, off, len, e);
	*e = (struct block_extent){ .len = len, .present = true, .data = true };
	return 0;
}

int pass_resize(struct block *b, uint64_t size, enum block_prealloc p, struct err *err)
{
	int r = image_resize(b->child, size, p, err);
	if (!r)
		__atomic_store_n(&b->length, block_length(b->child), __ATOMIC_RELAXED);
	return r;
}

int64_t pass_file_length(struct block *b)
{
	return b->child->drv->file_length ? b->child->drv->file_length(b->child) : (int64_t)block_length(b->child);
}

int pass_truncate(struct block *b, uint64_t len)
{
	return b->child->drv->truncate ? b->child->drv->truncate(b->child, len) : -ENOTSUP;
}

int pass_allocate(struct block *b, uint64_t off, uint64_t len, bool write)
{
	return b->child->drv->allocate ? b->child->drv->allocate(b->child, off, len, write) : 0;
}

void pass_event(struct block *b, enum block_event e)
{
	block_event(b->child, e);
}
