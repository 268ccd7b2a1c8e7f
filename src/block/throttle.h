/*
 * I/O limits of one disk or of a group of disks: the same six averages, bursts and burst lengths as QEMU's
 * -drive throttling.* and throttle-group. A request that is over the limit waits in the group; nothing fails.
 */
#ifndef BLOCK_THROTTLE_H
#define BLOCK_THROTTLE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct clock;
struct throttle_group;

enum throttle_bucket { THROTTLE_BPS_TOTAL, THROTTLE_BPS_READ, THROTTLE_BPS_WRITE, THROTTLE_IOPS_TOTAL, THROTTLE_IOPS_READ,
		       THROTTLE_IOPS_WRITE, THROTTLE_BUCKETS };
#define THROTTLE_MAX 1000000000000000LL

/* Bytes or operations a second, 0: no limit; max: rate of a burst; burst_length: how long it may last, seconds. */
struct throttle_limit { uint64_t avg, max, burst_length; };
struct throttle_limits {
	struct throttle_limit b[THROTTLE_BUCKETS];
	uint64_t op_size;               /* bytes; a longer request counts as several operations. 0: one */
};

const char *throttle_name(enum throttle_bucket b);              /* "bps-total" */
bool throttle_wanted(const struct throttle_limits *l);
/* -EINVAL for combinations that QEMU refuses. */
int throttle_check(const struct throttle_limits *l, struct err *err);

/*
 * Checked limits; one reference is the caller's. `clock` outlives the group. NULL (a program without a loop): requests of threads
 * that wait only, that is, for driver=throttle below a disk. Returns NULL when memory is out.
 */
struct throttle_group *throttle_group_new(const struct throttle_limits *l, struct clock *clock);
struct throttle_group *throttle_group_ref(struct throttle_group *g);
void throttle_group_unref(struct throttle_group *g);            /* not while requests wait in it */
/* At run time, from any thread. */
void throttle_group_set(struct throttle_group *g, const struct throttle_limits *l);
void throttle_group_get(struct throttle_group *g, struct throttle_limits *l);

/* Groups by name (-object throttle-group), each with one reference of the set's. Zeroes: empty. */
struct throttle_named { char *name; struct throttle_group *group; };
struct throttle_set { struct throttle_named *v; unsigned n; };
struct throttle_group *throttle_set_find(const struct throttle_set *s, const char *name);
/* *out, which may be NULL itself, is the new group. 0 or -ENOMEM. */
int throttle_set_add(struct throttle_set *s, const char *name, const struct throttle_limits *l, struct clock *clock, struct throttle_group **out);
void throttle_set_free(struct throttle_set *s);

#endif
