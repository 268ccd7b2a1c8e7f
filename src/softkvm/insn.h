/*
 * A decoded instruction and how handlers see it.
 *
 * decode.c turns bytes into `struct insn`s by way of Zydis; each has a handler that executes it on a
 * `struct cpu`. Handler families live in ops_*.c (integer), sys_*.c (system) and vec*.c (x87 and
 * vector), and each family offers one lookup: given the decoded Zydis instruction it fills the
 * `struct insn` or says it does not know it.
 */
#ifndef SOFTKVM_INSN_H
#define SOFTKVM_INSN_H

#include <Zydis/Zydis.h>

#include "softkvm/cpu.h"
#include "softkvm/mmu.h"

struct insn;
typedef void insn_fn(struct cpu *c, const struct insn *i);

enum {
	IF_END = 1 << 0,        /* last in its block: may overwrite cpu->rip, change mode or mappings, or halt */
	IF_MEM = 1 << 1,        /* has a memory operand described by base, index, scale, disp, seg */
	IF_EA_SLOW = 1 << 2,    /* address needs segment base or checks, or truncation: use insn_lin_slow() */
	IF_LOCK = 1 << 3,
	IF_REP = 1 << 4,        /* F3 */
	IF_REPNE = 1 << 5,      /* F2 */
	IF_STACK = 1 << 6,      /* memory accesses are stack accesses: non-canonical is #SS */
	IF_A32 = 1 << 7,        /* address size 32 */
	IF_A16 = 1 << 8,        /* address size 16 */
	IF_O16 = 1 << 9,        /* operand size 16 (0x66 or 16-bit code) */
	IF_RIPREL = 1 << 10,
	IF_NEW_IMM = 1 << 14,   /* its immediate was written after the block was decoded: patch.c */
	IF_NEW_DISP = 1 << 15,  /* the same of its displacement */
	IF_ONCE = 1 << 13,      /* acts on more than the vCPU and its memory, or reads clocks or chance: lockstep does not repeat it */
	IF_NOT_LAST = 1 << 12,  /* block.c adds IF_END where no other instruction follows in the block */
	IF_BRANCH = 1 << 11,    /* with IF_END: the handler never goes on to what lies behind it in the block */
};

struct insn {
	insn_fn *fn;
	union { uint64_t imm; void *ptr; int64_t simm; }; /* immediate, branch target displacement, or a family's own data */
	int32_t disp;           /* RIP-relative: already relative to gpr[R_BLK] */
	uint16_t flags;
	uint16_t off;           /* from the start of the block */
	uint8_t len;
	uint8_t dst, src;       /* byte offsets into gpr[] (AH..BH are odd), or family-defined register numbers */
	uint8_t base, index;    /* register numbers 0..17; R_ZERO when absent */
	uint8_t scale;          /* shift 0..3 */
	uint8_t seg;            /* effective segment */
	uint8_t aux;            /* family-defined: condition code, operand size, sub-opcode */
};
_Static_assert(sizeof(struct insn) == 32, "insn: two per cache line");

/* What a family gets to look at: everything Zydis knows, and the bytes. */
struct decoded {
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	const uint8_t *bytes;
	uint8_t code_bits;      /* 16, 32, 64 */
	const struct cpu *cpu;  /* for features */
};

/* Fill i->fn and what the handler needs (operands are already described by insn_set_mem() where present). False: not mine. */
typedef bool insn_family(struct insn *i, const struct decoded *d);
bool ops_decode(struct insn *i, const struct decoded *d);      /* integer, branches, strings, BMI */
bool sys_decode(struct insn *i, const struct decoded *d);      /* system, far transfers, segment loads, I/O, flags with privilege */
bool vec_decode(struct insn *i, const struct decoded *d);      /* x87, MMX, SSE..AVX-512, AES, SHA, CLMUL, XSAVE family */

/* decode.c: describe the memory operand of `op` in `i` (base, index, disp, seg, IF_MEM...). */
void insn_set_mem(struct insn *i, const struct decoded *d, const ZydisDecodedOperand *op);
/* Byte offset into gpr[] of a general-purpose register operand (AH..BH included). */
uint8_t insn_reg_off(ZydisRegister r);
/* SEG_* of an operand's segment register; SEG_DS of any other. */
uint8_t insn_seg(ZydisRegister r);
/* Raises #UD: what undefined bytes, bad LOCK prefixes and features not offered decode to. */
insn_fn op_ud;

/* -- addresses -------------------------------------------------------------------------------- */
/* CS/DS/..-relative offset of the memory operand, truncated to the address size. */
uint64_t insn_offset(const struct cpu *c, const struct insn *i);
/* Linear address with segment base, limit and type checks for an access of `size` bytes. */
uint64_t insn_lin_slow(struct cpu *c, const struct insn *i, unsigned size, enum access acc);

static inline uint64_t insn_lin(struct cpu *c, const struct insn *i, unsigned size, enum access acc)
{
	if (likely(!(i->flags & IF_EA_SLOW)))
		return c->gpr[i->base] + (c->gpr[i->index] << i->scale) + (uint64_t)(int64_t)i->disp;
	return insn_lin_slow(c, i, size, acc);
}

/* Linear address of seg:off with the checks of the current mode (segment.c). In 64-bit code only FS and GS
 * have a base; canonical checks are the MMU's. Raises #GP(0), or #SS(0) for SEG_SS. */
uint64_t seg_lin(struct cpu *c, unsigned seg, uint64_t off, unsigned size, enum access acc);

/* -- registers -------------------------------------------------------------------------------- */
#define REG8(c, o) (*((uint8_t *)(c)->gpr + (o)))
#define REG16(c, o) (*(uint16_t *)((uint8_t *)(c)->gpr + (o)))
#define REG32(c, o) (*(uint32_t *)((uint8_t *)(c)->gpr + (o)))          /* reading */
#define REG64(c, o) (*(uint64_t *)((uint8_t *)(c)->gpr + (o)))
#define REG_SET32(c, o, v) (REG64(c, o) = (uint32_t)(v))                /* writing zero-extends */

#endif
