/* The engine side: the vector family on a struct cpu whose linear memory is the sandbox. */
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/vec/vec.h"

static struct cpu *cpu;
static struct tlb *tlb;
static jmp_buf back;
static struct insn insn;

static _Noreturn void leave(int vector)
{
	longjmp(back, vector + 2);
}

void cpu_raise(struct cpu *c, unsigned vector) { leave((int)vector); }
void cpu_raise_err(struct cpu *c, unsigned vector, uint32_t error) { leave((int)vector); }
void cpu_raise_pf(struct cpu *c, uint64_t addr, uint32_t error) { leave(EXC_PF); }
void cpu_unwind(struct cpu *c, enum unwind why) { leave(100); }
void cpu_request(struct cpu *c, uint32_t req) { vec_flush(c); }
uint64_t cpu_cur_rip(const struct cpu *c) { return 0; }
void mmu_flush_all(struct cpu *c) { }

static uint8_t *range(uint64_t lin, unsigned len)
{
	if (range_bad(lin - (uintptr_t)sandbox, len, SANDBOX))
		leave(EXC_PF);
	return (uint8_t *)(uintptr_t)lin;
}

void mem_read(struct cpu *c, uint64_t lin, void *buf, unsigned len) { memcpy(buf, range(lin, len), len); }
void mem_write(struct cpu *c, uint64_t lin, const void *buf, unsigned len) { memcpy(range(lin, len), buf, len); }
void mem_read_slow(struct cpu *c, uint64_t lin, void *buf, unsigned len) { mem_read(c, lin, buf, len); }
void mem_write_slow(struct cpu *c, uint64_t lin, const void *buf, unsigned len) { mem_write(c, lin, buf, len); }
void mem_probe(struct cpu *c, uint64_t lin, unsigned len, enum access acc) { range(lin, len); }

uint64_t seg_lin(struct cpu *c, unsigned seg, uint64_t off, unsigned size, enum access acc) { return off; }
uint64_t insn_offset(const struct cpu *c, const struct insn *i)
{
	uint64_t o = c->gpr[i->base] + (c->gpr[i->index] << i->scale) + (uint64_t)(int64_t)i->disp;

	return i->flags & IF_A32 ? (uint32_t)o : o;
}
uint64_t insn_lin_slow(struct cpu *c, const struct insn *i, unsigned size, enum access acc) { return insn_offset(c, i); }
uint8_t insn_reg_off(ZydisRegister r)
{
	return (uint8_t)(ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, r)) * 8);
}

void insn_set_mem(struct insn *i, const struct decoded *d, const ZydisDecodedOperand *op)
{
	const ZydisDecodedOperandMem *m = &op->mem;

	i->flags |= IF_MEM | (d->z.address_width == 32 ? IF_A32 | IF_EA_SLOW : 0);
	i->base = m->base == ZYDIS_REGISTER_NONE ? R_ZERO : insn_reg_off(m->base) / 8;
	i->index = m->index == ZYDIS_REGISTER_NONE || m->type == ZYDIS_MEMOP_TYPE_VSIB ? R_ZERO : insn_reg_off(m->index) / 8;
	i->scale = (uint8_t)(m->scale ? __builtin_ctz(m->scale) : 0);
	i->disp = m->disp.has_displacement ? (int32_t)m->disp.value : 0;
	i->seg = SEG_DS;
}

int engine_init(void)
{
	if (posix_memalign((void **)&cpu, 64, sizeof *cpu))
		return -1;
	memset(cpu, 0, sizeof *cpu);
	tlb = calloc(1, sizeof *tlb);
	cpu->tlb = tlb;
	cpu->flat = true;
	cpu->code_bits = 64;
	cpu->cpl = 3;
	cpu->cr0 = CR0_PE | CR0_NE | CR0_PG;
	cpu->cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | (host_avx() ? CR4_OSXSAVE : 0);
	cpu->xcr0 = xsave_supported();
	fpu_reset(&cpu->fpu);
	return tlb ? 0 : -1;
}

bool engine_prepare(const struct test_case *t)
{
	struct decoded d = { .z = t->z, .bytes = t->bytes, .code_bits = 64, .cpu = cpu };

	memcpy(d.op, t->op, sizeof d.op);
	for (unsigned pass = 0; pass < 2; pass++) {
		insn = (struct insn){ .len = t->len, .base = R_ZERO, .index = R_ZERO, .seg = SEG_DS };
		if (t->z.address_width == 32)
			insn.flags |= IF_A32;
		if (!vec_decode(&insn, &d))
			return false;
		if (!(insn.flags & IF_END))
			break;
		vec_flush(cpu);
	}
	return true;
}

static void set_tlb(const struct test_case *t)
{
	for (unsigned n = 0; n < SANDBOX_PAGES; n++) {
		uint64_t lin = (uintptr_t)sandbox + n * 4096;
		struct tlb_entry e = { t->tlb[n] ? lin : tlb_empty_tag(tlb_index(lin)), 0 };

		tlb->r[tlb_index(lin)] = tlb->w[tlb_index(lin)] = e;
	}
}

void engine_test_run(const struct test_case *t, const struct state *in, struct state *out)
{
	struct fpu *f = &cpu->fpu;
	int r;

	memcpy(cpu->gpr, in->gpr, sizeof in->gpr);
	cpu->gpr[R_ZERO] = 0;
	cpu->aflags = aflags_from(in->flags);
	memcpy(f->zmm, in->zmm, sizeof f->zmm);
	memcpy(f->k, in->k, sizeof f->k);
	memcpy(f->fx, in->fx, 24);
	memcpy(f->fx + FX_ST, in->fx + FX_ST, 128);
	f->mxcsr = in->mxcsr;
	memcpy(sandbox, in->mem, SANDBOX);
	set_tlb(t);
	r = setjmp(back);
	if (!r)
		insn.fn(cpu, &insn);
	*out = *in;
	out->trap = r ? r - 2 : -1;
	memcpy(out->gpr, cpu->gpr, sizeof out->gpr);
	out->flags = cpu_get_rflags(cpu);
	memcpy(out->zmm, f->zmm, sizeof f->zmm);
	memcpy(out->k, f->k, sizeof f->k);
	memcpy(out->fx, f->fx, 24);
	memcpy(out->fx + FX_ST, f->fx + FX_ST, 128);
	out->mxcsr = f->mxcsr;
	memcpy(out->mem, sandbox, SANDBOX);
}
