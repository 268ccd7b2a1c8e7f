#include "cli/backends.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"

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

static int open_disks(struct backends *b, struct vm_opts *o, struct loop *l, struct workers *w, struct err *err)
{
	int ret = 0;

	for (unsigned i = 0; !ret && i < o->ndrives; i++) {
		struct block_opts bo = o->drives[i].b;

		bo.id = o->drives[i].id;
		bo.file = o->drives[i].file;
		bo.snapshot |= o->snapshot;
		ret = open_disk(b, &bo, l, w, err);
	}
	for (unsigned i = 0; !ret && i < o->nnodes; i++) {
		struct block_opts bo;

		if (node_is_child(o, keyvals_get(&o->nodes[i].opts, "node-name")))
			continue;
		ret = node_block_opts(o, &o->nodes[i], &bo, err);
		if (!ret)
			ret = open_disk(b, &bo, l, w, err);
	}
	return ret;
}

int backends_open(struct backends *b, struct vm_opts *o, struct loop *l, struct workers *w, const struct chr_env *env,
		  struct err *err)
{
	*b = (struct backends){ 0 };
	int ret = open_disks(b, o, l, w, err);

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
		else
			chr_close(b->v[i].p);
	}
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
		if (!strcmp(b->v[i].id, id))
			return b->v[i].p;
		if (n < ARRAY_SIZE(names))
			names[n++] = b->v[i].id;
	}
	near = parse_nearest(id, names, n);
	err_set(err, -ENOENT, "there is no %s with id '%s'%s%s%s",
		type == PROP_DRIVE ? "drive" : type == PROP_NETDEV ? "netdev" : "chardev", id, near ? " (did you mean " : "",
		near ? near : "", near ? "?)" : "");
	return NULL;
}

struct backend_lookup backends_lookup(struct backends *b)
{
	return (struct backend_lookup){ find, b };
}
