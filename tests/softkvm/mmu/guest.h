/*
 * A vCPU's MMU alone, for its tests: RAM, page tables for one linear address, and accesses that say whether they faulted. The rest of the engine is
 * replaced by a few lines that record what it is asked for.
 */
#ifndef TESTS_SOFTKVM_MMU_GUEST_H
#define TESTS_SOFTKVM_MMU_GUEST_H

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "softkvm/bus.h"
#include "softkvm/insn.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/sys.h"

#define RAM_SIZE (8u << 20)
#define PT_BASE 0x100000ull             /* PML4, PDPT, PD, PT in four pages */
#define DATA 0x200000ull                /* physical page that LIN maps to */
#define LIN 0x00007f1234567000ull

struct mmu_guest {
	struct vm vm;
	struct cpu cpu;
	struct kvm_run run;
	uint8_t *ram;
	bool raised;
	unsigned vector;
	uint32_t error;
	uint64_t addr;
	enum unwind unwind;
	unsigned left;          /* cpu_leave_after() calls */
};
extern struct mmu_guest t;

void set_slot(uint32_t id, uint64_t gpa, uint64_t size, uint8_t *host, uint32_t flags, int want);
int setup(void **state);
int teardown(void **state);
uint64_t *entry(int level);                     /* 3 = PML4 .. 0 = PT, for LIN */
void map(uint64_t upper, uint64_t leaf);        /* LIN to DATA */
bool try_access(enum access acc, uint64_t lin, void *buf, unsigned len);        /* one access; true when it did not fault */

#endif
