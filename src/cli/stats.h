/*
 * -stats and -accel soft,stats=on|FILE: what was counted on the vCPUs, at the end of a run; in words on stderr, or as JSON in a
 * file that was opened before the sandbox.
 */
#ifndef CLI_STATS_H
#define CLI_STATS_H

#include <stdio.h>

#include "base/err.h"

struct machine;

/* Create the file; *f must be closed by the caller. 0 or -errno. */
int stats_open(FILE **f, const char *path, struct err *err);
void stats_words(struct machine *m, FILE *f);
void stats_json(struct machine *m, FILE *f);

#endif
