/*
 * -blockdev: nodes, and graphs of them. What a node refers to by name (file=, backing=, data-file=, at any depth) is written in its
 * place, so that the block layer gets one nested description and needs no names.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "cli/backends.h"

enum { DEPTH_MAX = 64 };

static struct vm_node *node_find(struct vm_opts *o, const char *name)
{
	for (unsigned i = 0; i < o->nnodes; i++)
		if (!strcmp(keyvals_get(&o->nodes[i].opts, "node-name"), name))
			return &o->nodes[i];
	return NULL;
}

/* Is `key` one whose value names a node? */
static bool is_reference(const char *key)
{
	static const char *const names[] = { "file", "backing", "data-file", "image", "log", "raw", "test" };
	const char *dot = strrchr(key, '.'), *list = strstr(key, "children.");

	if (list && (list == key || list[-1] == '.') && !strchr(list + strlen("children."), '.'))
		return true;
	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		if (!strcmp(dot ? dot + 1 : key, names[i]))
			return true;
	return false;
}

bool node_is_child(struct vm_opts *o, const char *name)
{
	for (unsigned i = 0; i < o->nnodes; i++) {
		const struct keyvals *l = &o->nodes[i].opts;

		for (unsigned k = 0; k < l->n; k++)
			if (is_reference(l->o[k].key) && !strcmp(l->o[k].val, name))
				return true;
	}
	return false;
}

/* All of a node's options to `out`, with `prefix` before each key. */
static int expand(struct vm_opts *o, const struct vm_node *n, const char *prefix, unsigned depth, struct keyvals *out, struct err *err)
{
	const struct keyvals *l = &n->opts;
	char key[512];
	int ret = depth > DEPTH_MAX ? err_set(err, -ELOOP, "-blockdev: more than %d nodes one below the other; is there a loop?", DEPTH_MAX) : 0;

	for (unsigned i = 0; !ret && i < l->n; i++) {
		const char *v = l->o[i].val;
		bool ref = is_reference(l->o[i].key) && *v; /* empty is null: nothing is there */

		if (snprintf(key, sizeof key, "%s%s%s", prefix, l->o[i].key, ref ? "." : "") >= (int)sizeof key)
			return err_set(err, -EINVAL, "-blockdev: key too long: %s", l->o[i].key);
		if (ref && !node_find(o, v))
			return err_set(err, -ENOENT, "-blockdev: %s=%s names no node", l->o[i].key, v);
		ret = ref ? expand(o, node_find(o, v), key, depth + 1, out, err) : keyvals_add(out, key, v);
		if (ret == -ENOMEM)
			return err_set(err, ret, "out of memory");
	}
	return ret;
}

/* driver=throttle on top: the node below in its place. */
static int below_throttle(struct keyvals *l, struct err *err)
{
	struct keyvals below;
	if (!keyvals_get(l, "throttle-group"))
		return err_set(err, -EINVAL, "-blockdev: throttle-group= is missing");
	if (!keyvals_sub(&below, l, "file."))
		return err_set(err, -EINVAL, "-blockdev: driver=throttle: file= is missing");
	static const char *const generic[] = { "read-only", "discard", "detect-zeroes", "cache.direct", "cache.no-flush" };
	int ret = 0;

	for (size_t i = 0; !ret && i < ARRAY_SIZE(generic); i++) { /* said of the upper node, they hold below */
		const char *v = keyvals_get(l, generic[i]);

		if (v && !keyvals_get(&below, generic[i]))
			ret = keyvals_add(&below, generic[i], v);
	}
	keyvals_get(l, "node-name");
	if (!ret)
		ret = keyvals_end(l, "-blockdev", err);
	if (ret) {
		keyvals_free(&below);
		return ret;
	}
	keyvals_free(l);
	*l = below;
	return 0;
}

int node_block_opts(struct vm_opts *o, struct vm_node *n, struct block_opts *b, const char **group, struct err *err)
{
	const char *name = keyvals_get(&n->opts, "node-name"), *driver = keyvals_get(&n->opts, "driver");

	*b = (struct block_opts){ .id = name, .snapshot = o->snapshot, .options = &n->flat };
	if (!driver)
		return err_set(err, -EINVAL, "-blockdev: driver= is missing");
	keyvals_free(&n->flat);
	int ret = expand(o, n, "", 0, &n->flat, err);
	if (!ret && group && !strcmp(driver, "throttle")) {
		ret = below_throttle(&n->flat, err);
		if (!ret)
			*group = keyvals_get(&n->opts, "throttle-group");
		driver = ret ? NULL : keyvals_get(&n->flat, "driver");
	}
	/* A protocol's node is a disk as it is. */
	if (!ret && block_check_format("-blockdev", driver ? driver : "", NULL))
		b->format = "raw";
	return ret;
}
