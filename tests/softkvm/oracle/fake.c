/* The vector family alone, on a struct cpu whose linear memory is the sandbox: for xsave_test.c. */
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include "oracle.h"
#include "softkvm/fault.h"
#include "softkvm/interp/block.h"
#include "softkvm/sys.h"
#include "softkvm/vec/vec.h"

static struct cpu *cpu;
static struct tlb *tlb;
static jmp_buf back;
static struct insn insns[2];   /* integer handlers may go on to the next one: it stops */

static void op_stop(struct cpu *c, const struct insn *i) { }

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
	if ((uint64_t)((int64_t)(lin << 16) >> 16) != lin)
		leave(insns[0].flags & IF_STACK ? EXC_SS : EXC_GP);
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
bool sys_decode(struct insn *i, const struct decoded *d) { return false; }
bool cpuid_has_isa(const struct cpu *c, int isa) { return true; }
uint64_t cpu_next_rip(const struct cpu *c) { return 0; }
void cpu_leave_after(struct cpu *c) { }
void cpu_set_rflags(struct cpu *c, uint64_t fl)
{
	c->aflags = aflags_from(fl);
	c->eflags = (uint32_t)fl & ~OSZAPC;
}
void *mem_host(struct cpu *c, uint64_t lin, unsigned len, enum access acc)
{
	return acc == ACC_READ ? tlb_hit_r(c, lin, len) : tlb_hit_w(c, lin, len);
}
void *mem_rmw(struct cpu *c, uint64_t lin, unsigned size)
{
	range(lin, size);
	return mem_host(c, lin, size, ACC_RMW);
}
void mem_lock(struct cpu *c) { }
void mem_unlock(struct cpu *c) { }

int engine_init(void)
{
	static struct block none;       /* whose links lead nowhere */

	if (posix_memalign((void **)&cpu, 64, sizeof *cpu))
		return -1;
	memset(cpu, 0, sizeof *cpu);
	fault_enter(cpu);
	tlb = calloc(1, sizeof *tlb);
	cpu->tlb = tlb;
	cpu->blocks = calloc(1, sizeof *cpu->blocks);
	cpu->blk = &none;
	cpu->code_stamp = CODE_STAMP_NONE;
	cpu->budget = 1 << 30;
	cpu->flat = true;
	cpu->code_bits = 64;
	cpu->cpl = 3;
	cpu->cr0 = CR0_PE | CR0_NE | CR0_PG;
	cpu->cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | (host_avx() ? CR4_OSXSAVE : 0);
	cpu->xcr0 = xsave_supported();
	fpu_reset(&cpu->fpu);
	return tlb && cpu->blocks ? 0 : -1;
}

static bool decode_vector(const struct test_case *t)
{
	struct decoded d = { .z = t->z, .bytes = t->bytes, .code_bits = 64, .cpu = cpu };

	memcpy(d.op, t->op, sizeof d.op);
	insns[0] = (struct insn){ .len = t->len, .base = R_ZERO, .index = R_ZERO, .seg = SEG_DS };
	if (t->z.address_width == 32)
		insns[0].flags |= IF_A32;
	return vec_decode(&insns[0], &d);
}

bool engine_prepare(const struct test_case *t)
{
	for (unsigned pass = 0; pass < 2; pass++) {
		if (!decode_vector(t))
			return false;
		if (!(insns[0].flags & IF_END) || pass)
			break;
		vec_flush(cpu);
	}
	return true;
}

/* Empty: every access takes the slow path. */
static void set_tlb(void)
{
	for (unsigned n = 0; n < SANDBOX_PAGES; n++) {
		uint64_t lin = (uintptr_t)sandbox + n * 4096;
		struct tlb_entry e = { tlb_empty_tag(tlb_index(lin)), lin };

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
	cpu->eflags = FL_IF;
	memcpy(f->zmm, in->zmm, sizeof f->zmm);
	memcpy(f->k, in->k, sizeof f->k);
	memcpy(f->fx, in->fx, 24);
	memcpy(f->fx + FX_ST, in->fx + FX_ST, 128);
	f->mxcsr = in->mxcsr;
	memcpy(sandbox, in->mem, SANDBOX);
	set_tlb();
	cpu->cur = &insns[0];
	insns[1].fn = op_stop;
	cpu->block_end = &insns[1];
	r = setjmp(back);
	if (!r)
		insns[0].fn(cpu, &insns[0]);
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
