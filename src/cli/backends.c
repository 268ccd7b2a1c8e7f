#include "cli/backends.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/throttle.h"
#include "loop/loop.h"

static void keep(struct backends *b, enum prop_type type, const char *id, void *p)
{
	struct backend *e = vmopts_grow(&b->v, &b->n, sizeof *b->v);
	*e = (struct backend){ type, id, p };
}

static int open_disk(struct backends *b, const struct block_opts *bo, struct loop *l, struct workers *w, struct err *err)
{
	struct block *blk;
	int ret = block_open(&blk, bo, l, w, err);

	if (!ret)
		keep(b, PROP_DRIVE, bo->id, blk);
	return ret;
}

/* First, so that they end last. */
static int start_iothreads(struct backends *b, struct vm_opts *o, struct err *err)
{
	int ret = 0;

	for (unsigned i = 0; !ret && i < o->nobjects; i++) {
		struct iothread *t;

		if (strcmp(o->objects[i].type, "iothread"))
			continue;
		ret = iothread_create(&t, err);
		if (!ret)
			keep(b, PROP_IOTHREAD, o->objects[i].id, t);
	}
	return ret;
}

/* --- limits --- */

static struct throttle_group *group_find(struct backends *b, const char *name)
{
	return name ? throttle_set_find(&b->groups, name) : NULL;
}

/* As QEMU: disks of one group share limits, and the last one that gives any sets them. NULL with r 0: none. */
static int group_for(struct backends *b, const char *name, const struct throttle_limits *l, struct loop *loop,
		     struct throttle_group **out, struct err *err)
{
	struct throttle_group *g = group_find(b, name);

	*out = g;
	if (g && throttle_wanted(l))
		throttle_group_set(g, l);
	if (g || (!name && !throttle_wanted(l)))
		return 0;
	return throttle_set_add(&b->groups, name ? name : "", l, clock_host(loop), out) ? err_set(err, -ENOMEM, "out of memory") : 0;
}

static int node_group(struct backends *b, const char *name, struct block_opts *bo, struct err *err)
{
	bo->throttle = group_find(b, name);
	return bo->throttle || !name ? 0 : err_set(err, -ENOENT, "-blockdev: throttle-group=%s: there is no such -object throttle-group", name);
}

static int open_disks(struct backends *b, struct vm_opts *o, struct loop *l, struct workers *w, struct err *err)
{
	struct throttle_group *g;
	int ret = 0;

	for (unsigned i = 0; !ret && i < o->nthrottles; i++)
		ret = group_for(b, o->throttles[i].name, &o->throttles[i].limits, l, &g, err);
	for (unsigned i = 0; !ret && i < o->ndrives; i++) {
		struct block_opts bo = o->drives[i].b;

		bo.id = o->drives[i].id;
		bo.file = o->drives[i].file;
		bo.snapshot |= o->snapshot;
		bo.tls = &o->tls;
		bo.throttles = &b->groups;
		bo.options = o->drives[i].whole ? &o->drives[i].node : NULL;
		bo.leaf = o->drives[i].leaf.n ? &o->drives[i].leaf : NULL;
		bo.backing_options = o->drives[i].backing.n ? &o->drives[i].backing : NULL;
		bo.data_options = o->drives[i].data.n ? &o->drives[i].data : NULL;
		if (o->drives[i].empty) {
			keep(b, PROP_DRIVE, bo.id, NULL);
			continue;
		}
		ret = group_for(b, o->drives[i].group, &o->drives[i].limits, l, &bo.throttle, err);
		if (!ret)
			ret = open_disk(b, &bo, l, w, err);
	}
	for (unsigned i = 0; !ret && i < o->nnodes; i++) {
		struct block_opts bo;
		const char *group = NULL;

		if (node_is_child(o, keyvals_get(&o->nodes[i].opts, "node-name")))
			continue;
		ret = node_block_opts(o, &o->nodes[i], &bo, &group, err);
		if (!ret)
			ret = node_group(b, group, &bo, err);
		bo.tls = &o->tls;
		bo.throttles = &b->groups;
		if (!ret)
			ret = open_disk(b, &bo, l, w, err);
	}
	return ret;
}

int backends_open(struct backends *b, struct vm_opts *o, struct loop *l, struct workers *w, const struct chr_env *env,
		  struct err *err)
{
	*b = (struct backends){ 0 };
	int ret = start_iothreads(b, o, err);

	if (!ret)
		ret = open_disks(b, o, l, w, err);

	for (unsigned i = 0; !ret && i < o->nnetdevs; i++) {
		struct net_backend *n;
		ret = net_open(&n, o->netdevs[i].text, l, err);
		if (!ret)
			keep(b, PROP_NETDEV, o->netdevs[i].id, n);
	}
	for (unsigned i = 0; !ret && i < o->nchardevs; i++) {
		struct chardev *c;
		ret = chr_open(&c, o->chardevs[i].text, env, err);
		if (!ret)
			keep(b, PROP_CHARDEV, o->chardevs[i].id, c);
	}
	if (ret)
		backends_close(b);
	return ret;
}

void backends_close(struct backends *b)
{
	for (unsigned i = b->n; i-- > 0;) {
		if (b->v[i].type == PROP_DRIVE)
			block_close(b->v[i].p);
		else if (b->v[i].type == PROP_NETDEV)
			net_close(b->v[i].p);
		else if (b->v[i].type == PROP_IOTHREAD)
			iothread_destroy(b->v[i].p);
		else
			chr_close(b->v[i].p);
	}
	throttle_set_free(&b->groups);
	free(b->v);
	*b = (struct backends){ 0 };
}

static void *find(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	struct backends *b = opaque;
	const char *names[64], *near;
	unsigned n = 0;

	for (unsigned i = 0; i < b->n; i++) {
		if (b->v[i].type != type)
			continue;
		if (!strcmp(b->v[i].id, id)) {
			if (!b->v[i].p)
				err_set(err, -ENOMEDIUM, "the device needs media, but drive '%s' is empty", id);
			return b->v[i].p;
		}
		if (n < ARRAY_SIZE(names))
			names[n++] = b->v[i].id;
	}
	near = parse_nearest(id, names, n);
	err_set(err, -ENOENT, "there is no %s with id '%s'%s%s%s",
		type == PROP_DRIVE ? "drive" : type == PROP_NETDEV ? "netdev" : type == PROP_IOTHREAD ? "iothread" : "chardev", id, near ? " (did you mean " : "",
		near ? near : "", near ? "?)" : "");
	return NULL;
}

struct backend_lookup backends_lookup(struct backends *b)
{
	return (struct backend_lookup){ find, b };
}
