/*
 * Lockstep, for tests: the translator and the interpreter execute the same guest side by side, over whole boots.
 *
 * A step starts where the loop would enter translated code. The translation and all that is linked to it runs until
 * its (short) budget ends; then memory and registers are put back, and the interpreter's handlers run the same
 * instructions one by one until the same state is met. Registers, flags, vector state, the event that ended the step
 * and the pages written must agree. The interpreter's outcome is what the guest goes on with.
 *
 * Instructions that act on more than the vCPU and its memory, or read clocks and chance (IF_ONCE: system
 * instructions, RDRAND; accesses to MMIO), end a step in front of them and are interpreted once.
 *
 * Memory is put back by page: a page is copied before the first write entry of the TLB for it may exist (struct
 * cpu_watch). Devices may write meanwhile: a step that differs is repeated, and what differs only once was theirs.
 * One vCPU only.
 */
#ifndef SOFTKVM_JIT_LOCKSTEP_H
#define SOFTKVM_JIT_LOCKSTEP_H

#include "softkvm/jit/internal.h"

struct lockstep;

int lockstep_init(struct jit *j);               /* 0 or -ENOMEM */
void lockstep_free(struct jit *j);              /* logs what was compared */
/* In jit_run()'s place. */
enum jit_result lockstep_run(struct jit *j, struct block *b, uint32_t mode);
/* jit_run() without lockstep: what it compares. */
enum jit_result jit_run_translated(struct cpu *c, struct block *b, uint32_t mode);

#endif
