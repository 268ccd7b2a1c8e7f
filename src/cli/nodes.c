/* -blockdev: format node over protocol node, by reference or in one option. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "cli/backends.h"

static struct vm_node *node_find(struct vm_opts *o, const char *name)
{
	for (unsigned i = 0; i < o->nnodes; i++)
		if (!strcmp(keyvals_get(&o->nodes[i].opts, "node-name"), name))
			return &o->nodes[i];
	return NULL;
}

bool node_is_child(struct vm_opts *o, const char *name)
{
	for (unsigned i = 0; i < o->nnodes; i++) {
		const char *f = keyvals_get(&o->nodes[i].opts, "file");
		if (f && !strcmp(f, name))
			return true;
	}
	return false;
}

static const char *get(struct keyvals *l, const char *prefix, const char *key, char buf[64])
{
	snprintf(buf, 64, "%s%s", prefix, key);
	return keyvals_get(l, buf);
}

/* Keys that both kinds of node may carry. */
static int usage_keys(struct keyvals *l, const char *prefix, struct block_opts *b, struct err *err)
{
	const char *what = "-blockdev", *v;
	bool ro = b->read_only, direct = b->cache == CACHE_NONE, noflush = b->cache == CACHE_UNSAFE;
	char key[64];
	int ret;
#define KEY(k) (get(l, prefix, k, key), key)

	if ((ret = keyvals_bool(l, what, KEY("read-only"), &ro, err)) ||
	    (ret = keyvals_bool(l, what, KEY("auto-read-only"), &b->auto_read_only, err)) ||
	    (ret = keyvals_bool(l, what, KEY("cache.direct"), &direct, err)) ||
	    (ret = keyvals_bool(l, what, KEY("cache.no-flush"), &noflush, err)) ||
	    (ret = keyvals_only(l, what, KEY("locking"), "auto|on", err)) ||
	    (ret = keyvals_only(l, what, KEY("force-share"), "off", err)))
		return ret;
	if ((v = get(l, prefix, "discard", key))) {
		if (strcmp(v, "unmap") && strcmp(v, "ignore"))
			return err_set(err, -EINVAL, "-blockdev: discard=%s is neither ignore nor unmap", v);
		b->discard_unmap = !strcmp(v, "unmap");
	}
	ret = detect_zeroes_key(what, get(l, prefix, "detect-zeroes", key), b, err);
	if (ret)
		return ret;
	b->read_only = ro;
	b->cache = noflush ? CACHE_UNSAFE : direct ? CACHE_NONE : CACHE_WRITEBACK;
	return block_aio_key(what, get(l, prefix, "aio", key), b, err);
#undef KEY
}

/* `leaf`: where to keep the options of a node that the block layer reads itself. */
static int protocol(struct keyvals *l, const char *prefix, struct keyvals *leaf, struct block_opts *b, struct err *err)
{
	char key[64];
	const char *driver = get(l, prefix, "driver", key);

	if (driver && !strcmp(driver, "nbd")) {
		keyvals_free(leaf);
		keyvals_sub(leaf, l, prefix);
		b->leaf = leaf;
		return usage_keys(l, prefix, b, err);
	}
	if (!driver || (strcmp(driver, "file") && strcmp(driver, "host_device")))
		return err_set(err, -ENOTSUP, "-blockdev: driver=%s is not supported ("BLOCK_FORMATS" over file, host_device or nbd)",
			       driver ? driver : "");
	b->file = get(l, prefix, "filename", key);
	if (!b->file)
		return err_set(err, -EINVAL, "-blockdev: filename= is missing");
	return usage_keys(l, prefix, b, err);
}

/* driver=throttle: the node below, and in which group. */
static int throttle_node(struct vm_opts *o, struct vm_node *n, struct block_opts *b, const char **group, struct err *err)
{
	struct keyvals *l = &n->opts;
	const char *ref = keyvals_get(l, "file"), *name = keyvals_get(l, "throttle-group"), *below = NULL;
	struct vm_node *child = ref ? node_find(o, ref) : NULL;

	if (!name)
		return err_set(err, -EINVAL, "-blockdev: throttle-group= is missing");
	if (!child || child == n)
		return err_set(err, -ENOENT, "-blockdev: driver=throttle: file=%s names no node", ref ? ref : "");
	if (!strcmp(keyvals_get(&child->opts, "driver") ? keyvals_get(&child->opts, "driver") : "", "throttle"))
		return err_set(err, -ENOTSUP, "-blockdev: a throttle node over another is not supported");
	int ret = node_block_opts(o, child, b, &below, err);
	b->id = keyvals_get(l, "node-name");
	*group = name;
	return ret ? ret : keyvals_end(l, "-blockdev", err);
}

int node_block_opts(struct vm_opts *o, struct vm_node *n, struct block_opts *b, const char **group, struct err *err)
{
	struct keyvals *l = &n->opts;
	const char *driver = keyvals_get(l, "driver"), *ref = keyvals_get(l, "file");
	int ret;

	*b = (struct block_opts){ .id = keyvals_get(l, "node-name"), .format = "raw", .snapshot = o->snapshot };
	if (!driver)
		return err_set(err, -EINVAL, "-blockdev: driver= is missing");
	if (!strcmp(driver, "throttle"))
		return throttle_node(o, n, b, group, err);
	bool format = !block_check_format("-blockdev", driver, NULL);
	if (format)
		b->format = driver;
	if (!format) {
		ret = protocol(l, "", &n->leaf, b, err);
	} else if (ref) {
		struct vm_node *child = node_find(o, ref);
		if (!child)
			return err_set(err, -ENOENT, "-blockdev: file=%s names no node", ref);
		ret = protocol(&child->opts, "", &child->leaf, b, err);
		if (!ret)
			ret = keyvals_end(&child->opts, "-blockdev", err);
	} else {
		ret = protocol(l, "file.", &n->leaf, b, err);
	}
	if (!ret && format)
		ret = usage_keys(l, "", b, err);
	return ret ? ret : keyvals_end(l, "-blockdev", err);
}
