/*
 * softkvm's side: a VM whose second slot is the arena, at guest-physical and linear addresses that equal the host's, with the same
 * rights. Ring 0 lives at KERNEL: a stub that loads the segments and returns to ring 3, and HLT for each exception.
 */
#include <stdio.h>
#include <stdlib.h>

#include "guest.h"
#include "oracle.h"
#include "softkvm/vec/vec.h"

#define KERNEL 0xffff800000000000ull    /* guest-physical 0 */
#define GDT 0x1000
#define LDT 0x1400
#define TSS 0x1800
#define IDT 0x2000
#define PML4 0x3000
#define PDPT_LOW 0x4000
#define PD_LOW 0x5000
#define PT_LOW 0x6000
#define PDPT_HIGH 0x7000
#define PD_HIGH 0x8000
#define STUBS 0xa000                    /* exception n: STUBS + 16 * n */
#define ENTER 0xb000
#define SELECTORS 0xb800                /* DS, ES, FS, GS for the stub */
#define STACK 0xd000

/* Two ways in: with the TLB as it is, and with an empty one. */
GUEST_ASM(enter_code, 64,
	  "push %rax; mov %cr3, %rax; mov %rax, %cr3; pop %rax\n.globl enter_warm\nenter_warm: push %rax\n"
	  "movabs 0xffff80000000b800, %ax; mov %eax, %ds; movabs 0xffff80000000b802, %ax; mov %eax, %es\n"
	  "movabs 0xffff80000000b804, %ax; mov %eax, %fs; movabs 0xffff80000000b806, %ax; mov %eax, %gs\n"
	  "pop %rax; iretq");
extern const uint8_t enter_warm[];

struct frame { uint64_t rip, cs, flags, rsp, ss; };
static struct guest g;

static void put(uint64_t gpa, uint64_t v) { memcpy(g.mem + gpa, &v, 8); }

static uint64_t descriptor(uint64_t base, uint32_t limit, unsigned access, unsigned flags)
{
	if (limit > 0xfffff) {
		limit >>= 12;
		flags |= 8;
	}
	return (limit & 0xffff) | (base & 0xffffff) << 16 | (uint64_t)access << 40 | (uint64_t)(limit >> 16) << 48 |
	       (uint64_t)flags << 52 | (base >> 24 & 0xff) << 56;
}

static void tables(void)
{
	uint64_t a = arena();

	put(GDT + 0x10, descriptor(0, 0xffffffff, 0x9b, 2));
	put(GDT + 0x18, descriptor(0, 0xffffffff, 0x93, 4));
	put(GDT + (SEL_CS32 & ~7), descriptor(0, 0xffffffff, 0xfb, 4));
	put(GDT + (SEL_DATA & ~7), descriptor(0, 0xffffffff, 0xf3, 4));
	put(GDT + (SEL_CS64 & ~7), descriptor(0, 0xffffffff, 0xfb, 2));
	put(LDT + (SEL_FS & ~7), descriptor(a + FS_BASE, 0xffffffff, 0xf3, 4));
	put(LDT + (SEL_GS & ~7), descriptor(a + GS_BASE, GS_LIMIT, 0xf3, 4));
	put(LDT + (SEL_CS16 & ~7), descriptor(a + A_CODE, CODE_SIZE - 1, 0xfb, 0));
	put(LDT + (SEL_DATA16 & ~7), descriptor(a + DATA16_BASE, DATA16_LIMIT, 0xf3, 0));
	put(TSS + 4, KERNEL + STACK);
	st_le16(g.mem + TSS + 0x66, 0x68);      /* no I/O permission map */
	for (unsigned v = 0; v < 32; v++) {
		uint64_t to = KERNEL + STUBS + 16 * v;
		unsigned dpl = v == EXC_BP || v == EXC_OF ? 3 : 0;      /* as Linux has it */

		g.mem[STUBS + 16 * v] = 0xf4;
		put(IDT + 16 * v, (to & 0xffff) | 0x10 << 16 | (uint64_t)(0x8e00 | dpl << 13) << 32 | (to >> 16 & 0xffff) << 48);
		put(IDT + 16 * v + 8, to >> 32);
	}
	memcpy(g.mem + ENTER, enter_code, (size_t)(enter_code_end - enter_code));
}

static void map_page(uint32_t off, uint64_t rights)
{
	put(PT_LOW + ((arena() + off) >> 12 & 511) * 8, (arena() + off) | rights | PTE_P | PTE_U);
}

static void page_tables(void)
{
	uint64_t a = arena();

	put(PML4, PDPT_LOW | PTE_P | PTE_W | PTE_U);
	put(PDPT_LOW + (a >> 30) * 8, PD_LOW | PTE_P | PTE_W | PTE_U);
	put(PD_LOW + (a >> 21 & 511) * 8, PT_LOW | PTE_P | PTE_W | PTE_U);
	for (unsigned n = 0; n < SANDBOX; n += 4096)
		map_page(A_SANDBOX + n, PTE_W | PTE_NX);
	map_page(A_CONST, PTE_NX);
	for (unsigned n = 0; n < CODE_SIZE; n += 4096)
		map_page(A_CODE + n, 0);
	put(PML4 + 256 * 8, PDPT_HIGH | PTE_P | PTE_W);
	put(PDPT_HIGH, PD_HIGH | PTE_P | PTE_W);
	put(PD_HIGH, PTE_P | PTE_W | PTE_PS);
	put(PD_HIGH + 8, 2 << 20 | PTE_P | PTE_W | PTE_PS);
}

static bool set_system(void)
{
	struct kvm_sregs s;
	struct kvm_xcrs x = { .nr_xcrs = 1 };
	uint64_t xcr0 = xsave_supported();

	guest_get_sregs(&g, 0, &s);
	s.cs = (struct kvm_segment){ .limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .s = 1, .g = 1, .l = 1 };
	s.ss = (struct kvm_segment){ .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .s = 1, .g = 1, .db = 1 };
	s.ds = s.es = s.fs = s.gs = s.ss;
	s.tr = (struct kvm_segment){ .base = KERNEL + TSS, .limit = 0x67, .selector = 0x40, .type = 11, .present = 1 };
	s.ldt = (struct kvm_segment){ .base = KERNEL + LDT, .limit = 0x1f, .selector = 0x50, .type = 2, .present = 1 };
	s.gdt = (struct kvm_dtable){ .base = KERNEL + GDT, .limit = 0x37 };
	s.idt = (struct kvm_dtable){ .base = KERNEL + IDT, .limit = 0xfff };
	s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
	s.cr3 = PML4;
	s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | (host_avx() ? CR4_OSXSAVE : 0);
	s.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
	guest_set_sregs(&g, 0, &s);
	x.xcrs[0].value = xcr0;
	return !host_avx() || !gioctl(&g.vcpu[0], KVM_SET_XCRS, &x, NULL);
}

int vm_init(void)
{
	if (arena() + ARENA > 1ull << 31 || arena() < 4 << 20)
		return -1;
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	if (gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region){ .slot = 1, .guest_phys_addr = arena(),
		   .memory_size = ARENA, .userspace_addr = (uintptr_t)native_alias() }, NULL))
		return -1;
	tables();
	page_tables();
	return set_system() ? 0 : -1;
}

void vm_end(void) { guest_destroy(&g); }

static struct kvm_xsave image;

static void set_fpu(const struct state *in)
{
	memset(&image, 0, sizeof image);
	state_to_xsave(in, (uint8_t *)&image, common_xcr0());
	if (gioctl(&g.vcpu[0], KVM_SET_XSAVE, &image, NULL))
		fail_msg("KVM_SET_XSAVE refused");
}

static uint64_t *reg(struct kvm_regs *r, unsigned n)
{
	switch (n) {
	case R_RAX: return (uint64_t *)&r->rax;
	case R_RCX: return (uint64_t *)&r->rcx;
	case R_RDX: return (uint64_t *)&r->rdx;
	case R_RBX: return (uint64_t *)&r->rbx;
	case R_RSP: return (uint64_t *)&r->rsp;
	case R_RBP: return (uint64_t *)&r->rbp;
	case R_RSI: return (uint64_t *)&r->rsi;
	case R_RDI: return (uint64_t *)&r->rdi;
	default: return (uint64_t *)&r->r8 + (n - 8);
	}
}

static void result(struct state *out, int reason)
{
	struct kvm_regs r;
	struct kvm_sregs s;
	struct frame f;
	unsigned v;
	bool error;

	guest_get_regs(&g, 0, &r);
	guest_get_sregs(&g, 0, &s);
	v = (unsigned)(r.rip - (KERNEL + STUBS)) / 16;
	error = v < 32 && (EXC_HAS_ERROR_MASK >> v & 1);
	memcpy(&f, g.mem + STACK - sizeof f, sizeof f);
	for (unsigned n = 0; n < 16; n++)
		out->gpr[n] = n == R_RSP ? f.rsp : *reg(&r, n);
	out->trap = reason == KVM_EXIT_HLT && r.rip - (KERNEL + STUBS) < 512 ? (int)v : 1000 + reason;
	out->rip = f.rip;
	out->flags = f.flags;
	out->cs = (uint16_t)f.cs;
	out->ss = (uint16_t)f.ss;
	out->seg[0] = s.ds.selector;
	out->seg[1] = s.es.selector;
	out->seg[2] = s.fs.selector;
	out->seg[3] = s.gs.selector;
	out->error = error ? ld_le32(g.mem + STACK - sizeof f - 8) : 0;
	out->cr2 = v == EXC_PF ? s.cr2 : 0;
	gioctl(&g.vcpu[0], KVM_GET_XSAVE, &image, NULL);
	state_from_xsave(out, (const uint8_t *)&image);
	memcpy(out->mem, native_alias() + A_SANDBOX, SANDBOX);
}

void vm_run(const struct test_case *t, const struct state *in, struct state *out, unsigned start)
{
	struct frame f = { in->rip - start, in->cs, in->flags, in->gpr[R_RSP], in->ss };
	struct kvm_regs r = { .rflags = 2, .rsp = KERNEL + STACK - sizeof f,
			      .rip = KERNEL + ENTER + (t->flush && !start ? 0 : (uint64_t)(enter_warm - enter_code)) };

	arena_load(t, in);
	softkvm_code_written(g.vm.f, arena() + A_CODE, CODE_SIZE);
	for (unsigned n = 0; n < 16; n++)
		if (n != R_RSP)
			*reg(&r, n) = in->gpr[n];
	memcpy(g.mem + STACK - sizeof f, &f, sizeof f);
	memcpy(g.mem + SELECTORS, in->seg, sizeof in->seg);
	guest_set_regs(&g, 0, &r);
	set_fpu(in);
	result(out, guest_run(&g, 0));
}
