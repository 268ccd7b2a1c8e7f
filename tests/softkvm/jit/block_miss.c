/*
 * block_test --missing: checks of the translator's memory operands fail at any time. Stands between translated code and mmu/fill.c: now and then
 * the access is left to its instruction's handler although an entry could be had, and entries that later checks want go. So every
 * check of an instruction, row or held address is met with those before and behind it in any state. What held addresses are left with from other code
 * (jit/gen_hold.c) is nobody's memory, in every mode of the test.
 *
 * Called with the guest's vector state in the host's registers: compiled as mmu/fill.c is, and calls nothing else.
 */
#include "block_miss.h"

bool missing;
uint64_t refused;
uint8_t nobodys[8192];

uint8_t *__real_mmu_fill_r(struct cpu *c, uint64_t lin, uint64_t size);
uint8_t *__real_mmu_fill_w(struct cpu *c, uint64_t lin, uint64_t size);
uint8_t *__wrap_mmu_fill_r(struct cpu *c, uint64_t lin, uint64_t size);
uint8_t *__wrap_mmu_fill_w(struct cpu *c, uint64_t lin, uint64_t size);
enum jit_result __real_jit_run(struct cpu *c, struct block *b, uint32_t mode);
enum jit_result __wrap_jit_run(struct cpu *c, struct block *b, uint32_t mode);

/* Of the pages that operands lie in, but for the one at `lin`. */
static void drop_some(struct cpu *c, uint64_t lin)
{
	uint64_t which = below(4) ? rnd() & rnd() : below(2) ? ~0ull : 0;

	for (unsigned n = 0; n < 2 * PAGES; n++) {
		uint64_t page = BASE + 4096 * (n / 2);

		if ((which >> n & 1) && page != (lin & ~4095ull))
			tlb_drop(c, tlb_full(c->tlb), n & 1, tlb_index(page));
	}
}

static bool refuse(struct cpu *c, uint64_t lin)
{
	if (!missing)
		return false;
	drop_some(c, lin);
	if (below(3))
		return false;
	refused++;
	return true;
}

uint8_t *__wrap_mmu_fill_r(struct cpu *c, uint64_t lin, uint64_t size)
{
	return refuse(c, lin) ? 0 : __real_mmu_fill_r(c, lin, size);
}

uint8_t *__wrap_mmu_fill_w(struct cpu *c, uint64_t lin, uint64_t size)
{
	return refuse(c, lin) ? 0 : __real_mmu_fill_w(c, lin, size);
}

/* No host address is held when translated code is entered: what is used all the same shows. */
enum jit_result __wrap_jit_run(struct cpu *c, struct block *b, uint32_t mode)
{
	for (unsigned n = 0; n < HOLDS; n++)
		c->jit->low->hold[n] = (uintptr_t)nobodys + below(sizeof nobodys - 512) + 128;
	return __real_jit_run(c, b, mode);
}
