/*
 * x87 and vector instructions. Private to this folder and jit/, but for vec_cpu_free() and vec_flush().
 *
 * The host CPU executes them: decoding turns an instruction into a `struct vec_op` with a stub of
 * machine code (stub.c) that loads the registers it uses from struct cpu, executes it with its memory
 * operand (if any) at [rsi], and stores what it wrote. vec.c holds the handlers that call stubs, with
 * all checks a stub cannot make; hot.c those that need no stub; mask.c what touches memory by element;
 * x87.c and xsave.c the state-handling instructions.
 */
#ifndef SOFTKVM_VEC_VEC_H
#define SOFTKVM_VEC_VEC_H

#include "softkvm/insn.h"

/* What must be on for an instruction not to be #UD or #NM. */
enum vec_class { VC_X87, VC_MMX, VC_SSE, VC_VEX, VC_EVEX, VC_NONE };

enum {
	VO_LOAD = 1 << 0,       /* reads its memory operand */
	VO_STORE = 1 << 1,      /* writes it */
	VO_FP = 1 << 2,         /* uses MXCSR */
	VO_MMX = 1 << 3,        /* makes the x87 state MMX state */
	VO_KMASK = 1 << 4,      /* memory elements are masked by opmask register `mask`: not accessed, so no fault */
	VO_VMASK = 1 << 5,      /* VMASKMOV: by the signs of vector register `mask` */
	VO_MM = 1 << 6,         /* MXCSR.MM lifts the alignment check */
	VO_DENSE = 1 << 7,      /* VCOMPRESS/VEXPAND: popcount(mask) leading elements */
	VO_PEND = 1 << 8,       /* x87/MMX: reports a pending x87 exception */
	VO_EMMS = 1 << 9,
	VO_NOPTR = 1 << 10,     /* x87: leaves FIP, FDP and FOP alone */
	VO_WHOLE = 1 << 11,     /* a masked store that faults as if nothing were masked */
};

/* Registers by kind for a stub: what to load before, what to store after. Part of the key. */
struct vec_shape {
	uint32_t v_in, v_out;   /* vector registers */
	uint8_t mm_in, mm_out, k_in, k_out;
	uint8_t g_in, g_out;    /* rax, rcx, rdx as bits 0..2 */
	uint8_t greg, grm;      /* guest registers standing behind rax and rcx */
	uint8_t width;          /* 0: legacy (XMM only, upper parts kept); else 16, 32, 64 */
	bool fl_in, fl_out;
	bool x87;
	uint8_t len;
	uint8_t code[15];       /* the rewritten instruction */
};

struct vec_op {
	int (*code)(struct cpu *c, void *mem);
	struct vec_op *next;
	uint16_t flags;         /* VO_* */
	uint8_t size;           /* bytes of the memory operand */
	uint8_t align;          /* required alignment minus one */
	uint8_t cls;
	uint8_t mask;           /* VO_KMASK, VO_VMASK */
	uint8_t esize;          /* bytes of an element in memory */
	uint8_t lanes;          /* VO_KMASK: mask bits that count */
	uint8_t dst_mm;         /* MMX register written, 0xff none */
	bool proven;            /* it has run here: the host knows it */
	uint16_t fop;           /* x87: low 11 bits of the opcode */
	struct vec_shape s;
};

/* The op with this contents (code is ignored), making its stub; NULL when the cache is full (vec_decode_full() then). */
struct vec_op *stub_get(struct cpu *c, const struct vec_op *want);
/* Call a stub. STUB_FP_FAULT: an unmasked SIMD exception; *mxcsr is the register as the CPU left it. */
enum stub_end { STUB_DONE, STUB_UNDEFINED, STUB_FP_FAULT, STUB_NO_MEMORY /* the client's is gone */ };
enum stub_end stub_try(struct cpu *c, const struct vec_op *op, void *mem, uint32_t *mxcsr);
/* With all exceptions masked. What is not STUB_DONE ends in stub_refuse(), after the caller put its state right. */
enum stub_end stub_run(struct cpu *c, const struct vec_op *op, void *mem);
_Noreturn void stub_refuse(struct cpu *c, enum stub_end end);
/* True when the instruction could be rewritten. */
bool stub_rewrite(struct vec_shape *s, const struct decoded *d);
bool host_has_isa(int isa_set);
bool host_avx512(void);
bool host_adx(void);
bool host_avx(void);
bool host_is_intel(void);

/* The translator's: all that decoding knows of an instruction, without a stub; whether a stub was made but never ran. */
bool vec_op_build(struct vec_op *op, const struct decoded *d);
bool vec_op_unproven(const struct insn *i);

/* Raise #UD or #NM when instructions of this class cannot run now. */
void vec_check_slow(struct cpu *c, enum vec_class cls);
static inline void vec_check_sse(struct cpu *c)
{
	if (unlikely((c->cr0 & (CR0_EM | CR0_TS)) || !(c->cr4 & CR4_OSFXSR)))
		vec_check_slow(c, VC_SSE);
}
static inline void vec_check_vex(struct cpu *c)
{
	if (unlikely((c->cr0 & CR0_TS) || !(c->cr4 & CR4_OSXSAVE) || (c->xcr0 & 6) != 6 || c->vm86 || c->real))
		vec_check_slow(c, VC_VEX);
}

/*
 * Misaligned and beyond a segment's limit at once: the first counts, as an AMD processor was seen to say (#GP, not #SS). To be
 * asked before the operand's address is held against the limit; `mask` is the required alignment minus one.
 */
static inline bool vec_misaligned_first(const struct cpu *c, const struct insn *i, unsigned mask)
{
	return unlikely((i->flags & IF_EA_SLOW) && mask) && !c->flat && ((c->seg[i->seg].base + insn_offset(c, i)) & mask);
}

/* No room for another stub: `i` has all blocks dropped and is decoded again. */
void vec_decode_full(struct insn *i);

/* x87.c */
void x87_check(struct cpu *c);                          /* #NM for EM or TS */
void x87_check_pending(struct cpu *c);                  /* #MF */
void x87_normalise(struct fpu *f);                      /* ES and B from flags and masks */
void x87_mmx_enter(struct fpu *f);                      /* MMX names for the registers, TOP 0, all valid */
bool x87_decode(struct insn *i, const struct decoded *d);
insn_fn x87_exec;

/* hot.c, mask.c, xsave.c: true when the instruction is theirs. */
bool hot_decode(struct insn *i, const struct decoded *d, const struct vec_op *op);
bool mask_decode(struct insn *i, const struct decoded *d);
bool xsave_decode(struct insn *i, const struct decoded *d);
/* Only the elements that are accessed are held against the segment's limit; `lin` is then not looked at. */
static inline bool mask_by_element(const struct cpu *c, const struct insn *i, const struct vec_op *op)
{
	return (op->flags & (VO_KMASK | VO_VMASK)) && (i->flags & IF_EA_SLOW) && !c->flat;
}
/* The opmask register selects no element of the memory operand. */
bool mask_is_empty(const struct cpu *c, const struct vec_op *op);
void mask_load(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin, void *buf);
/* Before a store: raises what it would. */
void mask_probe(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin);
void mask_store(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin, const void *buf);

/* FXSAVE's x87 registers and control words (bytes 0..23 and 32..159) in either pointer format. */
void fx_put_x87(const struct cpu *c, uint8_t area[160], bool wide);
void fx_get_x87(struct cpu *c, const uint8_t area[160], bool wide);
/* Component 2, 5, 6, 7 or 9 to or from its XSAVE form. */
void fpu_put_component(const struct cpu *c, unsigned n, uint8_t *p);
void fpu_get_component(struct cpu *c, unsigned n, const uint8_t *p);
uint64_t fpu_xinuse(const struct cpu *c);
uint32_t mxcsr_mask(void);

enum { FX_FCW = 0, FX_FSW = 2, FX_FTW = 4, FX_FOP = 6, FX_FIP = 8, FX_FDP = 16, FX_MXCSR = 24, FX_MASK = 28, FX_ST = 32,
       /* Bytes that the CPU leaves to software hold what the 64-bit form lacks. */
       FX_FCS = 464, FX_FDS = 466 };
enum { FSW_ES = 0x80, FSW_B = 0x8000, FSW_TOP = 0x3800 };

#endif
