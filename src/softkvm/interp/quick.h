/*
 * The decoder in front of Zydis (quick.c): forms of instructions that Zydis decoded are remembered, and others of the same form are made from
 * them. Belongs to one vCPU, and to one setting of its Zydis decoder: quick_forget() when that changes. 64-bit code only.
 */
#ifndef SOFTKVM_INTERP_QUICK_H
#define SOFTKVM_INTERP_QUICK_H

#include <Zydis/Zydis.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "softkvm/insn.h"

#define QUICK_BITS 9
#define MEMO_BITS 11
#define QUICK_OPS 4

enum quick_fill { QUICK_KEEP, QUICK_REG, QUICK_RM, QUICK_OPCODE, QUICK_MEM, QUICK_IMM, QUICK_NOT };

struct quick_form {
	uint32_t key;           /* 0: none */
	uint8_t nop, fill[QUICK_OPS];
	uint8_t head[offsetof(ZydisDecodedInstruction, raw.prefixes[2])];       /* of a ZydisDecodedInstruction */
	struct ZydisDecodedInstructionRawImm_ imm;
	ZydisDecodedOperand op[QUICK_OPS];
};

/* A decoded instruction, whose displacement and immediate are to be filled in. */
struct quick_memo {
	uint64_t key;           /* 0: none */
	struct insn insn;
	uint8_t imm;            /* bits of the immediate */
	uint8_t kind;           /* enum memo_imm */
};

struct quick {
	struct quick_form form[1 << QUICK_BITS];
	struct quick_memo memo[1 << MEMO_BITS];
};

/* What ZydisDecoderDecodeFull() would give, in z and its operands; those behind them are marked as unused. False: not known here, ask Zydis. */
bool quick_decode(struct quick *q, const uint8_t *bytes, unsigned avail, ZydisDecodedInstruction *z, ZydisDecodedOperand *op);
/* Zydis decoded these bytes: remember the form if it is one of those that can be. */
void quick_learn(struct quick *q, const uint8_t *bytes, unsigned avail, const ZydisDecodedInstruction *z, const ZydisDecodedOperand *op);
/*
 * The same one step further, for integer instructions: what decode_insn() gives for these bytes, `off` bytes from the start of their block,
 * once it was asked about others that have the same prefix, REX, opcode, modrm and sib. False: not known here.
 */
bool quick_insn(const struct quick *q, const uint8_t *bytes, unsigned avail, unsigned off, struct insn *i);
/* decode_insn() gave `i`, and the instruction's raw immediate is as `z` says. */
void quick_insn_learn(struct quick *q, const uint8_t *bytes, unsigned avail, const ZydisDecodedInstruction *z, const struct insn *i);
static inline void quick_forget(struct quick *q)
{
	for (unsigned n = 0; n < 1u << QUICK_BITS; n++)
		q->form[n].key = 0;
	for (unsigned n = 0; n < 1u << MEMO_BITS; n++)
		q->memo[n].key = 0;
}

#endif
