/* The contract between bench/mips.c and the programs it runs in the guest. */
#ifndef BENCH_GUEST_WORK_H
#define BENCH_GUEST_WORK_H

#include <stdint.h>

struct work {
	uint64_t rounds, result;
	uint8_t *data;                  /* 8 MiB */
	uint32_t table[72];             /* 64 round constants, 8 initial values */
};

typedef void work_fn(struct work *w);
work_fn work_sha, work_sort, work_chase, work_calls, work_text, work_copy, work_move;

#endif
