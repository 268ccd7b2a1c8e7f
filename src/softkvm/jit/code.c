/* Bytes of machine code, and the thunks between C and translated code. */
#include "softkvm/jit/internal.h"

const int8_t jit_map[16] = {
	[R_RAX] = H_R13, [R_RCX] = H_R14, [R_RDX] = H_RDX, [R_RBX] = H_RBX, [R_RSP] = H_R12, [R_RBP] = H_RBP,
	[R_RSI] = H_RSI, [R_RDI] = H_RDI, [8] = H_R8, [9] = H_R9, [10] = H_R10, [11] = -1, [12] = H_R11,
	[13] = -1, [14] = -1, [15] = -1,
};

/* -- emission ------------------------------------------------------------------------------------ */
void em_abs(struct em *e, unsigned reg, const void *p)
{
	e8(e, (reg & 7) << 3 | 4);
	e8(e, 0x25);
	e32(e, (uint32_t)(uintptr_t)p);
}

static void opcode(struct em *e, bool w, unsigned op, unsigned reg)
{
	unsigned rex = 0x40 | w << 3 | (reg >> 3) << 2;

	if (rex != 0x40)
		e8(e, rex);
	e8(e, op);
}

void em_op_abs(struct em *e, bool w, unsigned op, unsigned reg, const void *p)
{
	opcode(e, w, op, reg);
	em_abs(e, reg, p);
}

void em_op_near(struct em *e, bool w, unsigned op, unsigned reg, const void *p)
{
	opcode(e, w, op, reg);
	e8(e, (reg & 7) << 3 | 5);
	e32(e, (uint32_t)(uintptr_t)p - (uint32_t)((uintptr_t)e->p + 4 + (uintptr_t)e->to_rx));
}

void em_load(struct em *e, unsigned reg, const void *p) { em_op_near(e, true, 0x8b, reg, p); }
void em_store(struct em *e, unsigned reg, const void *p) { em_op_near(e, true, 0x89, reg, p); }
void em_load32(struct em *e, unsigned reg, const void *p) { em_op_near(e, false, 0x8b, reg, p); }

void em_mov(struct em *e, unsigned dst, unsigned src)
{
	if (dst == src)
		return;
	e8(e, 0x48 | (src >> 3) << 2 | dst >> 3);
	e8(e, 0x89);
	e8(e, 0xc0 | (src & 7) << 3 | (dst & 7));
}

void em_imm(struct em *e, unsigned reg, uint64_t v)
{
	if (v <= UINT32_MAX) {
		if (reg >> 3)
			e8(e, 0x41);
		e8(e, 0xb8 | (reg & 7));
		e32(e, (uint32_t)v);
	} else if ((int64_t)v == (int32_t)v) {
		e8(e, 0x48 | reg >> 3);
		e8(e, 0xc7);
		e8(e, 0xc0 | (reg & 7));
		e32(e, (uint32_t)v);
	} else {
		e8(e, 0x48 | reg >> 3);
		e8(e, 0xb8 | (reg & 7));
		e64(e, v);
	}
}

void em_mem(struct em *e, bool w, unsigned op, unsigned reg, int base, int index, unsigned scale, int32_t disp)
{
	unsigned x = index < 0 ? 0 : (unsigned)index, b = base < 0 ? 0 : (unsigned)base, mod;
	unsigned rex = 0x40 | w << 3 | (reg >> 3) << 2 | (x >> 3) << 1 | b >> 3;

	if (rex != 0x40)
		e8(e, rex);
	e8(e, op);
	mod = base < 0 ? 0 : !disp && (b & 7) != 5 ? 0 : disp == (int8_t)disp ? 1 : 2;
	if (index < 0 && base >= 0 && (b & 7) != 4) {
		e8(e, mod << 6 | (reg & 7) << 3 | (b & 7));
	} else {
		e8(e, mod << 6 | (reg & 7) << 3 | 4);
		e8(e, scale << 6 | (index < 0 ? 4 : x & 7) << 3 | (base < 0 ? 5 : b & 7));
	}
	if (mod == 1)
		e8(e, (uint8_t)disp);
	else if (mod == 2 || base < 0)
		e32(e, (uint32_t)disp);
}

uint8_t *em_jmp(struct em *e)
{
	e8(e, 0xe9);
	e32(e, 0);
	return e->p - 4;
}

uint8_t *em_call(struct em *e)
{
	e8(e, 0xe8);
	e32(e, 0);
	return e->p - 4;
}

uint8_t *em_jcc(struct em *e, unsigned cc)
{
	e8(e, 0x0f);
	e8(e, 0x80 | cc);
	e32(e, 0);
	return e->p - 4;
}

void em_to(uint8_t *rel32, const uint8_t *target) { st_le32(rel32, (uint32_t)(target - (rel32 + 4))); }
void em_here(struct em *e, uint8_t *rel32) { if (!e->full) em_to(rel32, e->p); }

/* To 16 bytes; the area has that much room behind a translation. */
void em_align(struct em *e)
{
	while ((uintptr_t)e->p & 15)
		*e->p++ = 0xcc;
}

void em_flags(struct em *e, struct cpu *c)
{
	EM(e, 0x0f);                                            /* movzx eax, word [aflags] */
	em_op_abs(e, false, 0xb7, SA, &c->aflags);
	EM(e, 0x04, 0x7f, 0x9e);                                /* add al, 0x7f ; sahf */
}

void em_charge(struct em *e, struct cpu *c, uint32_t n)
{
	e8(e, n < 128 ? 0x83 : 0x81);                           /* sub dword [budget], n */
	em_abs(e, 5, &c->budget);
	n < 128 ? e8(e, n) : e32(e, n);
}

/* -- thunks -------------------------------------------------------------------------------------- */
static void load_all(struct em *e, struct cpu *c, const int8_t *map)
{
	for (unsigned g = 0; g < 16; g++)
		if (map[g] >= 0)
			em_load(e, (unsigned)map[g], &c->gpr[g]);
}

static void store_all(struct em *e, struct cpu *c, const int8_t *map)
{
	for (unsigned g = 0; g < 16; g++)
		if (map[g] >= 0)
			em_store(e, (unsigned)map[g], &c->gpr[g]);
}

/*
 * enter(code): C calls it; in translated code rsp is 16-byte aligned.
 * leave: translated code jumps there with its result in rax.
 * abandon: the same, general-purpose registers and flags having been put away (resume.c).
 * call: translated code calls it with a site in eax; returns to it, with the guest's flags in EFLAGS, goes on at other code, or leaves when the loop must
 * look (result 1): see jit_call_insn().
 * call_out: where it goes on in the other cases.
 * live: translated code calls it with JV_* bits in eax; they are in vec_ok afterwards unless the guest may not use them.
 */
static void thunk_call_c(struct em *e, const void *fn)
{
	EM(e, 0x48, 0x83, 0xec, 0x08);
	em_imm(e, H_RAX, (uintptr_t)fn);
	EM(e, 0xff, 0xd0, 0x48, 0x83, 0xc4, 0x08);              /* call rax ; add rsp, 8 */
}

static void thunk_live(struct jit *j, struct em *e, const int8_t *map)
{
	store_all(e, j->c, map);
	EM(e, 0x89, 0xc6);                                      /* mov esi, eax */
	live_emit_save(e, j);
	em_imm(e, H_RDI, (uintptr_t)j->c);
	thunk_call_c(e, jit_live);
	load_all(e, j->c, map);
	live_emit_load(e, j);
	e8(e, 0xc3);
}

static void thunk_call(struct jit *j, struct em *e, const int8_t *map)
{
	store_all(e, j->c, map);
	EM(e, 0x89, 0xc6);                                      /* mov esi, eax */
	em_imm(e, H_RDI, (uintptr_t)j->c);
	live_emit_save(e, j);
	thunk_call_c(e, jit_call_insn);
	EM(e, 0x48, 0x85, 0xc0);                                /* test rax, rax */
	uint8_t *out = em_jcc(e, 5);
	em_to(out, j->rw + j->call_out);
	load_all(e, j->c, map);
	live_emit_load(e, j);
	em_flags(e, j->c);
	e8(e, 0xc3);
}

/* SC: the index in a TLB's table of linear address ST, ST: its difference to the tag there. */
static void tag_difference(struct em *e, const struct tlb_entry *t)
{
	EM(e, 0xc4, 0xc3, 0x7b, 0xf0, 0xcf, 0x08);      /* rorx ecx, r15d, 8 */
	EM(e, 0x81, 0xe1, 0xf0, 0xff, 0x00, 0x00);      /* and ecx, 0xfff0 */
	EM(e, 0x4c, 0x33, 0xb9);                        /* xor r15, [rcx + tag] */
	e32(e, (uint32_t)(uintptr_t)t);
}

uint8_t *em_check(struct em *e, const struct tlb_entry *t, unsigned size, bool apart)
{
	uint8_t *from;

	tag_difference(e, t);
	EM(e, 0x49, 0x81, 0xff);                        /* cmp r15, 4096 - size */
	e32(e, 4096 - size);
	from = em_jcc(e, 7);                            /* ja */
	if (apart)
		EM(e, 0x48, 0x8b, 0x89);                /* mov rcx, [rcx + host] */
	else
		EM(e, 0x4c, 0x03, 0xb9);                /* add r15, [rcx + host] */
	e32(e, (uint32_t)(uintptr_t)t + 8);
	return from;
}

/*
 * A TLB check failed with the index in rcx and the tag's difference in r15; the size is on the stack. r15: the host address, not 0
 * (ZF clear), or mmu_fill_r/w() would not. Other registers but rcx stay what they are.
 */
static void thunk_fill(struct jit *j, struct em *e, const struct tlb *tlb, bool write)
{
	EM(e, 0x4c, 0x33, 0xb9);                                /* xor r15, [rcx + tag]: the linear address */
	e32(e, (uint32_t)(uintptr_t)(write ? tlb->w : tlb->r));
	EM(e, 0x50, 0x52, 0x56, 0x57, 0x41, 0x50, 0x41, 0x51, 0x41, 0x52, 0x41, 0x53, 0x51);    /* push rax, rdx, rsi, rdi, r8-r11, rcx */
	em_imm(e, H_RDI, (uintptr_t)j->c);
	em_mov(e, H_RSI, ST);
	EM(e, 0x48, 0x8b, 0x54, 0x24, 0x50);                    /* mov rdx, [rsp + 80] */
	em_imm(e, H_RAX, (uintptr_t)(write ? mmu_fill_w : mmu_fill_r));
	EM(e, 0xff, 0xd0);                                      /* call rax */
	em_mov(e, ST, H_RAX);
	EM(e, 0x59, 0x41, 0x5b, 0x41, 0x5a, 0x41, 0x59, 0x41, 0x58, 0x5f, 0x5e, 0x5a, 0x58);
	EM(e, 0x4d, 0x85, 0xff, 0xc2, 0x08, 0x00);              /* test r15, r15 ; ret 8 */
}

static void thunks_fill(struct jit *j, struct em *e)
{
	for (unsigned m = 0; m < TLB_MODES; m++)
		for (unsigned w = 0; w < 2; w++) {
			j->fill[m][w] = (uint32_t)(e->p - j->rw);
			thunk_fill(j, e, j->c->tlbs[m], w);
		}
}

/*
 * check: translated code calls it, ST being a linear address; it returns with a host address, or the handlers run (fail) and code goes on behind them.
 * miss: the same for a check in the code itself that has failed.
 */
static void thunk_check(struct jit *j, struct em *e, unsigned mode, bool write, unsigned order)
{
	const struct tlb *tlb = j->c->tlbs[mode];
	uint8_t *from;

	while ((uintptr_t)e->p & 63)            /* a cache line for each */
		e8(e, 0xcc);
	j->check[mode][write][order] = (uint32_t)(e->p - j->rw);
	from = em_check(e, write ? tlb->w : tlb->r, 1u << order, false);
	e8(e, 0xc3);
	em_here(e, from);
	j->miss[mode][write][order] = (uint32_t)(e->p - j->rw);
	e8(e, 0x6a);                            /* push size ; call */
	e8(e, 1u << order);
	e8(e, 0xe8);
	e32(e, 0);
	em_to(e->p - 4, j->rw + j->fill[mode][write]);
	em_to(em_jcc(e, 4), j->rw + j->fail);
	e8(e, 0xc3);
}

/*
 * span: code calls it, ST being a linear address and SA how many bytes from there are accessed, 1 to 4096. ST: the host address, ZF clear; or ZF set: they
 * lie in two pages that the host does not have side by side, or the TLB will not have an entry.
 */
static void thunk_span(struct jit *j, struct em *e, unsigned mode, bool write)
{
	const struct tlb *tlb = j->c->tlbs[mode];
	uint8_t *bad, *miss;

	em_align(e);
	j->span[mode][write] = (uint32_t)(e->p - j->rw);
	EM(e, 0x44, 0x89, 0xf9, 0x81, 0xe1, 0xff, 0x0f, 0x00, 0x00, 0x01, 0xc1);        /* mov ecx, r15d ; and ecx, 4095 ; add ecx, eax */
	EM(e, 0x81, 0xf9, 0x00, 0x10, 0x00, 0x00);              /* cmp ecx, 4096 */
	bad = em_jcc(e, 7);
	miss = em_check(e, write ? tlb->w : tlb->r, 1, false);
	e8(e, 0xc3);
	em_here(e, miss);
	EM(e, 0x50, 0xe8, 0x00, 0x00, 0x00, 0x00);              /* push rax ; call */
	em_to(e->p - 4, j->rw + j->fill[mode][write]);
	e8(e, 0xc3);
	em_here(e, bad);
	tag_difference(e, write ? tlb->w : tlb->r);
	EM(e, 0x50, 0x81, 0x0c, 0x24);                          /* push rax ; or dword [rsp], MMU_FILL_ITSELF ; call */
	e32(e, MMU_FILL_ITSELF);
	EM(e, 0xe8, 0x00, 0x00, 0x00, 0x00);
	em_to(e->p - 4, j->rw + j->fill[mode][write]);
	e8(e, 0xc3);
}

uint8_t *em_lookup(struct em *e, const struct jit *j)
{
	uint8_t *none;

	EM(e, 0x89, 0xc1, 0x81, 0xe1);                          /* mov ecx, eax ; and ecx, index */
	e32(e, (uint32_t)((BIT(IND_BITS) - 1) << IND_LOW));
	em_mem(e, true, 0x3b, H_RAX, -1, H_RCX, 1, (int32_t)(uintptr_t)&j->low->ind->rip);
	none = em_jcc(e, 5);
	em_mem(e, false, 0x8b, H_RAX, -1, H_RCX, 1, (int32_t)(uintptr_t)&j->low->ind->at);
	return none;
}
_Static_assert(sizeof(struct jit_ind) == 2 << IND_LOW, "em_lookup()");

/* lookup: the code for the target of an indirect jump in rax, as `check`. The table of indirect targets has it, or else it is looked for, in C. */
static void thunk_lookup(struct jit *j, struct em *e)
{
	uint8_t *none;

	em_align(e);
	j->lookup = (uint32_t)(e->p - j->rw);
	none = em_lookup(e, j);
	e8(e, 0xc3);
	em_here(e, none);
	EM(e, 0x52, 0x56, 0x57, 0x41, 0x50, 0x41, 0x51, 0x41, 0x52, 0x41, 0x53);        /* push rdx, rsi, rdi, r8-r11 */
	em_imm(e, H_RDI, (uintptr_t)j);
	em_mov(e, H_RSI, SA);
	em_imm(e, H_RAX, (uintptr_t)jit_find);
	EM(e, 0xff, 0xd0);                                      /* call rax */
	EM(e, 0x41, 0x5b, 0x41, 0x5a, 0x41, 0x59, 0x41, 0x58, 0x5f, 0x5e, 0x5a);
	EM(e, 0x48, 0x85, 0xc0);                                /* test rax, rax */
	em_to(em_jcc(e, 4), j->rw + j->fail);
	e8(e, 0xc3);
}

/* look: the budget is used up in the translation in r15. ZF: it is refilled, and code goes on. Else the loop is to look. Keeps rax. */
static void thunk_look(struct jit *j, struct em *e)
{
	em_align(e);
	j->look = (uint32_t)(e->p - j->rw);
	EM(e, 0x50, 0x52, 0x56, 0x57, 0x41, 0x50, 0x41, 0x51, 0x41, 0x52, 0x41, 0x53, 0x51);    /* push rax, rdx, rsi, rdi, r8-r11, rcx */
	em_imm(e, H_RDI, (uintptr_t)j);
	em_mov(e, H_RSI, ST);
	em_imm(e, H_RAX, (uintptr_t)jit_look);
	EM(e, 0xff, 0xd0, 0x48, 0x85, 0xc0);                    /* call rax ; test rax, rax */
	EM(e, 0x59, 0x41, 0x5b, 0x41, 0x5a, 0x41, 0x59, 0x41, 0x58, 0x5f, 0x5e, 0x5a, 0x58, 0xc3);
}

static void thunks_check(struct jit *j, struct em *e)
{
	for (unsigned m = 0; m < TLB_MODES; m++)
		for (unsigned w = 0; w < 2; w++)
			thunk_span(j, e, m, w);
	for (unsigned m = 0; m < TLB_MODES; m++)
		for (unsigned w = 0; w < 2; w++)
			for (unsigned order = 0; order < CHECK_SIZES; order++)
				thunk_check(j, e, m, w, order);
}

static void move_regs(struct em *e, struct jit *j, bool store)
{
	for (unsigned h = 0; h < 16; h++)
		if (h != SA && h != SC && h != ST && h != H_RSP)
			em_op_abs(e, true, store ? 0x89 : 0x8b, h, &j->low->regs[h]);
}

/* fail: the return address says which check it was, see jit_miss(). One for all choices of registers. */
static void thunk_fail(struct jit *j, struct em *e)
{
	j->fail = (uint32_t)(e->p - j->rw);
	move_regs(e, j, true);
	live_emit_save(e, j);
	EM(e, 0x48, 0x8b, 0x34, 0x24);                          /* mov rsi, [rsp] */
	em_imm(e, H_RDI, (uintptr_t)j);
	thunk_call_c(e, jit_miss);
	EM(e, 0x48, 0x85, 0xc0);                                /* test rax, rax */
	em_to(em_jcc(e, 5), j->rw + j->call_out);
	move_regs(e, j, false);
	live_emit_load(e, j);
	em_load(e, SA, &j->low->go_on);
	EM(e, 0x48, 0x89, 0x04, 0x24);                          /* mov [rsp], rax */
	em_flags(e, j->c);
	e8(e, 0xc3);
}

/* `call` and `live` for code that keeps registers elsewhere: behind the code so far. */
void jit_map_thunks(struct jit *j, struct jit_map_thunks *m, const int8_t *map)
{
	struct em e = { j->rw + j->hot, j->rw + j->hot_size, false, jit_to_rx(j) };

	m->call = (uint32_t)(e.p - j->rw);
	thunk_call(j, &e, map);
	m->live = (uint32_t)(e.p - j->rw);
	thunk_live(j, &e, map);
	em_align(&e);
	j->hot = (size_t)(e.p - j->rw);
}

/*
 * The stack of calls begins with two that nobody returns from: their address is not canonical, and not known to the guest. Returns where the rel32 of the
 * first's code is; that of the other is CALL_AGAIN behind it.
 */
#define CALLS_BASE 40           /* with 8 bytes that align it */
#define CALL_AGAIN 9
static uint8_t *calls_begin(struct jit *j, struct em *e)
{
	uint8_t *at;

	EM(e, 0x48, 0x83, 0xec, CALLS_BASE);                            /* sub rsp, */
	EM(e, 0x48, 0xc7, 0x04, 0x24);                                  /* mov qword [rsp], imm32 */
	at = e->p;
	EM(e, 0, 0, 0, 0, 0x48, 0xc7, 0x44, 0x24, 0x10, 0, 0, 0, 0);    /* mov qword [rsp + 16], imm32 */
	em_load(e, SC, &j->low->calls_none);
	EM(e, 0x48, 0x89, 0x4c, 0x24, 0x08, 0x48, 0x89, 0x4c, 0x24, 0x18);      /* mov [rsp + 8], rcx ; mov [rsp + 24], rcx */
	em_store(e, H_RSP, &j->low->calls_base);
	em_mem(e, true, 0x8d, SC, H_RSP, -1, 0, -CALLS_BYTES);
	em_store(e, SC, &j->low->calls_limit);
	return at;
}

void jit_thunks(struct jit *j)
{
	struct em e = { j->rw, j->rw + JIT_THUNKS, false, jit_to_rx(j) };
	uint8_t *look, *out, *base;

	j->low->host_mxcsr = 0x1f80;
	j->enter = (uint32_t)(e.p - j->rw);
	EM(&e, 0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x89, 0xf8);
	base = calls_begin(j, &e);
	load_all(&e, j->c, jit_map);
	EM(&e, 0xff, 0xe0);
	j->leave = (uint32_t)(e.p - j->rw);
	store_all(&e, j->c, jit_map);
	j->abandon = (uint32_t)(e.p - j->rw);
	live_emit_save(&e, j);
	look = e.p;
	em_load(&e, H_RSP, &j->low->calls_base);
	EM(&e, 0x48, 0x83, 0xc4, CALLS_BASE, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);
	j->call_out = (uint32_t)(e.p - j->rw);
	EM(&e, 0x48, 0x83, 0xc4, 0x08, 0x83, 0xf8, 1);          /* drop the return address ; cmp eax, 1 */
	out = em_jcc(&e, 4);
	load_all(&e, j->c, jit_map);
	EM(&e, 0xff, 0xe0);                                     /* jmp rax */
	em_here(&e, out);
	em_to(em_jmp(&e), look);
	for (unsigned n = 0; n < 2; n++)                        /* where a return goes that was none of ours */
		st_le32(base + n * CALL_AGAIN, (uint32_t)(uintptr_t)(j->rx + (e.p - j->rw)));
	em_store(&e, SA, &j->c->rip);
	EM(&e, 0x31, 0xc0);                                     /* xor eax, eax */
	em_to(em_jmp(&e), j->rw + j->leave);
	thunks_fill(j, &e);
	thunk_fail(j, &e);
	thunk_lookup(j, &e);
	thunk_look(j, &e);
	thunks_check(j, &e);
	j->hot = (size_t)(e.p - j->rw);
	jit_map_thunks(j, &j->maps[0], jit_map);
	j->hot = JIT_THUNKS;
	j->cold = 0;
}
