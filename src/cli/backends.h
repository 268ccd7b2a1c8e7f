/*
 * The back ends a command line names: opened all before any device exists, found by id, closed at
 * the end. Owns what it opened.
 */
#ifndef CLI_BACKENDS_H
#define CLI_BACKENDS_H

#include "chr/chr.h"
#include "cli/vmopts.h"
#include "net/net.h"

struct backends {
	struct throttle_set groups;
	struct backend { enum prop_type type; const char *id; void *p; } *v;
	unsigned n;
};

/* On failure everything opened so far is closed again. */
int backends_open(struct backends *b, struct vm_opts *o, struct loop *l, struct workers *w, const struct chr_env *env,
		  struct err *err);
/* Flushes disks, restores the terminal. */
void backends_close(struct backends *b);
struct backend_lookup backends_lookup(struct backends *b);

/* nodes.c: what a -blockdev node means as a disk; -ENOTSUP names the driver or key. */
/* *group: the throttle group the disk as a whole is in, or NULL; `group` NULL: driver=throttle stays a node, like those below. */
int node_block_opts(struct vm_opts *o, struct vm_node *n, struct block_opts *b, const char **group, struct err *err);
/* opt_block.c: aio=, NULL: not given. The cache mode is set. */
int detect_zeroes_key(const char *what, const char *v, struct block_opts *b, struct err *err);    /* after discard= */
/* Is this node the child of another, so that no device uses it by itself? */
bool node_is_child(struct vm_opts *o, const char *name);

#endif
