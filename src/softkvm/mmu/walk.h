/*
 * Page walks: all paging modes of SDM vol. 3 ch. 4 (none, 32-bit with PSE, PAE, 4- and 5-level), with
 * NX, WP, SMEP, SMAP, protection keys and A/D updates.
 */
#ifndef SOFTKVM_MMU_WALK_H
#define SOFTKVM_MMU_WALK_H

#include "base/util.h"
#include "softkvm/mmu.h"
#include "softkvm/sys.h"

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

/* Bits that all levels combine: W, U (and), NX (or); G and the key come from the leaf. */
struct walk_rights { bool w, u, nx; unsigned key; };

/* May that party access the page so? 0, or PF_P and PF_PK of the error code. */
static inline uint32_t walk_check(const struct cpu *c, const struct walk_rights *r, enum access acc, struct walk_as as)
{
	bool write = acc == ACC_WRITE || acc == ACC_RMW;
	uint32_t err = 0;

	if (acc == ACC_EXEC)
		return r->nx || (as.user && !r->u) || (!as.user && r->u && (c->cr4 & CR4_SMEP)) ? PF_P : 0;
	if ((as.user && !r->u) || (!as.user && r->u && (c->cr4 & CR4_SMAP) && !as.ac) ||
	    (write && !r->w && (as.user || (c->cr0 & CR0_WP))))
		err = PF_P;
	/* The PK flag says that the key forbids it, whatever else does (SDM vol. 3 4.7). */
	if (r->u && (c->cr4 & CR4_PKE) && cpu_long(c)) {
		unsigned k = (c->pkru >> (2 * r->key)) & 3;

		if ((k & 1) || (write && (k & 2) && (as.user || (c->cr0 & CR0_WP))))
			err = PF_P | PF_PK;
	}
	return err;
}

/* Physical-address bits that must be zero. */
static inline unsigned walk_phys_bits(const struct cpu *c) { return c->feat && c->feat->phys_bits ? c->feat->phys_bits : 36; }
static inline uint64_t walk_rsvd_mask(const struct cpu *c)
{
	unsigned b = walk_phys_bits(c);

	return b >= 52 ? 0 : (BIT(52) - 1) & ~(BIT(b) - 1);
}

#endif
