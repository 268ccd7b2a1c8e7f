/* blkdebug: errors and stops at chosen points, as QEMU's driver of that name. blkdebug.c does it, blkdebug_conf.c reads the rules. */
#ifndef BLOCK_BLKDEBUG_H
#define BLOCK_BLKDEBUG_H

#include "block/graph.h"

enum blkdebug_io { BLKDEBUG_READ, BLKDEBUG_WRITE, BLKDEBUG_WRITE_ZEROES, BLKDEBUG_DISCARD, BLKDEBUG_FLUSH, BLKDEBUG_BLOCK_STATUS, BLKDEBUG_IO_COUNT };
enum blkdebug_action { BLKDEBUG_INJECT, BLKDEBUG_SET_STATE, BLKDEBUG_SUSPEND };

struct blkdebug_rule {
	enum blkdebug_action action;
	enum block_event event;
	unsigned state;                 /* 0: any */
	/* inject */
	int error;                      /* errno; 0: none after all */
	int64_t offset;                 /* a request that has this byte; -1: any */
	unsigned io;                    /* bits of enum blkdebug_io */
	bool once;
	bool active;                    /* its event was the last one that made any active */
	unsigned new_state;
	char *tag;                      /* suspend */
	struct blkdebug_rule *next;
};

struct blkdebug {
	pthread_mutex_t lock;
	pthread_cond_t resumed;
	struct blkdebug_rule *rules;    /* the latest first */
	unsigned nrules, state;
	bool dirty;                     /* atomic: something was written since the last flush */
	struct blkdebug_stop *stopped;  /* requests that wait for blkdebug_resume() */
	uint64_t align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard; /* bytes, 0: not given */
};

/* The rules of config=FILE, inject-error.N and set-state.N, and the limits; all keys but image are used up. */
int blkdebug_config(struct blkdebug *d, struct keyvals *l, unsigned file_align, struct err *err);
int blkdebug_add_rule(struct blkdebug *d, const struct blkdebug_rule *rule);
/* -1: there is no such event. */
int blkdebug_event_of(const char *name);

#endif
