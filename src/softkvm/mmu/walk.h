/*
 * Page walks: all paging modes of SDM vol. 3 ch. 4 (none, 32-bit with PSE, PAE, 4- and 5-level), with
 * NX, WP, SMEP, SMAP, protection keys and A/D updates.
 */
#ifndef SOFTKVM_MMU_WALK_H
#define SOFTKVM_MMU_WALK_H

#include "softkvm/mmu.h"

/* Who accesses, as the permission rules see it. */
struct walk_as {
	bool user;              /* CPL 3 and not implicit */
	bool ac;                /* supervisor with EFLAGS.AC, explicit access: SMAP does not apply */
};

struct walk {
	uint64_t gpa;           /* of the byte asked for */
	uint64_t leaf_size;     /* 4096, 2 MiB, 4 MiB, 1 GiB; ~0 without paging */
	bool writable;          /* a write by the same party would be allowed and the leaf is dirty */
	bool user, global;
};

/* 0, or the page-fault error code with bit 31 set. Updates A and D (D for writes). */
#define WALK_FAULT 0x80000000u
uint32_t mmu_walk(struct cpu *c, uint64_t lin, enum access acc, struct walk_as as, struct walk *w);

#endif
