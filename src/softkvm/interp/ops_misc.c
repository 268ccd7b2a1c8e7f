/* No-ops, hints, cache and fence instructions, flag instructions, XLAT, BOUND, random numbers, UD. */
#include <sched.h>
#include <stdlib.h>
#include <sys/random.h>

#include "softkvm/interp/ops.h"

#define PAUSES_SPIN 256

OP(nop) { NEXT; }
/*
 * PAUSE ends a block so that a spinning vCPU soon looks at its requests. Many of them close together are a wait
 * for another vCPU, which may be the one this thread keeps from running: let it.
 */
OP(pause_op)
{
	__builtin_ia32_pause();
	if (unlikely(++c->blocks->pauses >= PAUSES_SPIN)) {
		c->blocks->pauses = 0;
		sched_yield();
		return;
	}
	CHAIN(0);
}
OP(fence) { __asm__ volatile("mfence" : : : "memory"); NEXT; }

/* CLFLUSH, CLFLUSHOPT, CLWB, CLDEMOTE: nothing to flush, but the address is checked as for a load of a byte. */
OP(clflush) { mem_probe(c, insn_lin(c, i, 1, ACC_READ), 1, ACC_READ); }

OP(clzero)
{
	u64 lin = c->gpr[R_RAX];
	static const u8 zero[64];

	lin = (i->flags & IF_A32 ? (u32)lin : i->flags & IF_A16 ? (u16)lin : lin) & ~63ULL;
	if (!c->flat)
		lin = seg_lin(c, i->seg, lin, 64, ACC_WRITE);
	else if (i->seg == SEG_FS || i->seg == SEG_GS)
		lin += c->seg[i->seg].base;
	mem_write(c, lin, zero, 64);
}

/* -- flags ------------------------------------------------------------------------------------- */
OP(clc) { c->aflags &= (u16)~AF_CF; NEXT; }
OP(stc) { c->aflags |= AF_CF; NEXT; }
OP(cmc) { c->aflags ^= AF_CF; NEXT; }
OP(cld) { c->eflags &= ~(u32)FL_DF; NEXT; }
OP(std) { c->eflags |= FL_DF; NEXT; }
OP(lahf) { SET8(R_RAX * 8 + 1, c->aflags >> 8); NEXT; }
OP(sahf) { c->aflags = (u16)((c->aflags & AF_OF) | ((GET8(R_RAX * 8 + 1) & 0xd5) | 2) << 8); NEXT; }
OP(salc) { SET8(R_RAX * 8, c->aflags & AF_CF ? 0xff : 0); NEXT; }

/* -- tables ------------------------------------------------------------------------------------ */
/* The decoder gives [BX]; AL is added before truncation. */
OP(xlat)
{
	u64 o = c->gpr[R_RBX] + GET8(R_RAX * 8), lin;

	o = i->flags & IF_A32 ? (u32)o : i->flags & IF_A16 ? (u16)o : o;
	lin = c->flat ? (i->seg == SEG_FS || i->seg == SEG_GS ? o + c->seg[i->seg].base : o) : seg_lin(c, i->seg, o, 1, ACC_READ);
	WITH_LD_AT(8, v, lin, SET8(R_RAX * 8, v));
}

OP(bound)
{
	unsigned size = i->aux;
	u64 lin = insn_lin(c, i, 2 * size, ACC_READ), lo = ops_ld_slow(c, lin, size);
	u64 hi = ops_ld_slow(c, (u32)(lin + size), size);
	bool bad;

	if (size == 2)
		bad = (s16)GET16(i->dst) < (s16)lo || (s16)GET16(i->dst) > (s16)hi;
	else
		bad = (s32)GET32(i->dst) < (s32)lo || (s32)GET32(i->dst) > (s32)hi;
	if (bad)
		cpu_raise(c, EXC_BR);
}

/* -- random numbers ---------------------------------------------------------------------------- */
/*
 * The operating system's generator: a guest seeds its own from these, so nothing weaker will do. Drawn in
 * batches; a system call per number would be slow.
 */
static u64 random64(struct cpu *c)
{
	struct block_cache *bc = c->blocks;
	u64 v;

	if (!bc->random_left) {
		if (getrandom(bc->random, sizeof bc->random, 0) != sizeof bc->random)
			return 0;
		bc->random_left = ARRAY_SIZE(bc->random);
	}
	v = bc->random[--bc->random_left];
	bc->random[bc->random_left] = 0;
	return v;
}

OP(rdrand)
{
	u64 v = random64(c);

	if (i->aux == 16)
		SET16(i->dst, v);
	else if (i->aux == 32)
		SET32(i->dst, v);
	else
		SET64(i->dst, v);
	c->aflags = 0x0200 | AF_CF;
	NEXT;
}

/* -- decoding ---------------------------------------------------------------------------------- */
static bool plain(struct insn *i, insn_fn *fn)
{
	i->fn = fn;
	return true;
}

static bool with_mem(struct insn *i, const struct decoded *d, insn_fn *fn)
{
	if (!is_mem(d, 0))
		return false;
	insn_set_mem(i, d, &d->op[0]);
	return plain(i, fn);
}

static bool decode_hint(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_PREFETCH:
	case ZYDIS_MNEMONIC_PREFETCHNTA:
	case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1:
	case ZYDIS_MNEMONIC_PREFETCHT2:
	case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1:
	case ZYDIS_MNEMONIC_ENDBR32:
	case ZYDIS_MNEMONIC_ENDBR64:
		return plain(i, nop);
	case ZYDIS_MNEMONIC_MFENCE:
	case ZYDIS_MNEMONIC_SFENCE:
	case ZYDIS_MNEMONIC_LFENCE:
		return plain(i, fence);
	case ZYDIS_MNEMONIC_SERIALIZE:
		i->flags |= IF_END;
		return plain(i, fence);
	case ZYDIS_MNEMONIC_PAUSE:
		i->flags |= IF_END;
		return plain(i, pause_op);
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
	case ZYDIS_MNEMONIC_CLDEMOTE:
		return with_mem(i, d, clflush);
	case ZYDIS_MNEMONIC_CLZERO:
		for (unsigned n = 0; n < d->z.operand_count; n++)
			if (is_mem(d, n)) {
				struct insn t = *i;

				insn_set_mem(&t, d, &d->op[n]);
				i->seg = t.seg;
			}
		return plain(i, clzero);
	default:
		return false;
	}
}

static bool decode_xlat(struct insn *i, const struct decoded *d)
{
	for (unsigned n = 0; n < d->z.operand_count; n++)
		if (is_mem(d, n)) {
			struct insn t = *i;

			insn_set_mem(&t, d, &d->op[n]);
			i->seg = t.seg;
		}
	return plain(i, xlat);
}

static bool decode_bound(struct insn *i, const struct decoded *d)
{
	i->dst = reg_off(d, 0);
	i->aux = d->z.operand_width / 8;
	insn_set_mem(i, d, &d->op[1]);
	return plain(i, bound);
}

bool ops_misc_decode(struct insn *i, const struct decoded *d)
{
	if (i->flags & IF_LOCK)
		return false;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_CLC: return plain(i, clc);
	case ZYDIS_MNEMONIC_STC: return plain(i, stc);
	case ZYDIS_MNEMONIC_CMC: return plain(i, cmc);
	case ZYDIS_MNEMONIC_CLD: return plain(i, cld);
	case ZYDIS_MNEMONIC_STD: return plain(i, std);
	case ZYDIS_MNEMONIC_LAHF: return plain(i, lahf);
	case ZYDIS_MNEMONIC_SAHF: return plain(i, sahf);
	case ZYDIS_MNEMONIC_SALC: return plain(i, salc);
	case ZYDIS_MNEMONIC_XLAT: return decode_xlat(i, d);
	case ZYDIS_MNEMONIC_BOUND: return decode_bound(i, d);
	case ZYDIS_MNEMONIC_RDRAND:
	case ZYDIS_MNEMONIC_RDSEED:
		i->dst = reg_off(d, 0);
		i->aux = (uint8_t)d->op[0].size;
		return plain(i, rdrand);
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_UD2:
		i->flags |= IF_END;
		return plain(i, op_ud);
	default:
		return decode_hint(i, d);
	}
}
