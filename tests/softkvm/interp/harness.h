/*
 * The interpreter with the real MMU and nothing else around it: a flat 64-bit guest, other parts replaced by a
 * few lines (harness.c). For unit tests and the micro benchmark.
 */
#ifndef INTERP_HARNESS_H
#define INTERP_HARNESS_H

#include "softkvm/cpu.h"
#include "softkvm/insn.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/sys.h"

#define H_RAM (16u << 20)
#define H_CODE 0x100000u        /* physical = linear: identity mapped */
#define H_DATA 0x200000u
#define H_STACK 0x300000u
/* All of that once more in three places; in the first and the third the lowest 2 MiB are one page further up. */
static inline uint64_t harness_alias(unsigned n) { return (uint64_t)n << 39 | (n & 1) << 12; }

struct harness {
	struct vm vm;
	struct cpu cpu;
	struct kvm_run *run;
	uint8_t *ram;
	struct event got;       /* last event that reached event_deliver() */
	uint64_t got_rip;
	bool exit_on_event;
	uint64_t alias;         /* harness_run() starts at this + H_CODE */
	unsigned polls_left;    /* not 0: budgets (16384 instructions) after which a run ends with RUN_EINTR */
};

extern struct harness h;

void harness_start(void);
void harness_stop(void);
/* 16, 32 (with paging off) or 64 bits; flat segments. */
void harness_mode(unsigned bits);
/* 32-bit code under the 64-bit mode's page tables; flat segments. */
void harness_compat(void);
void harness_code(const void *bytes, size_t n);
/* Run from H_CODE until HLT or an event. */
enum run_result harness_run(void);

#endif
