/* Exceptions of 64-bit mode: every vector that code can cause, with error code, saved RIP and flags (SDM vol. 3 ch. 6). */
#include "rt.h"

SNIP(div0, "xor %ecx, %ecx\n.globl div0_at\ndiv0_at: div %ecx");
extern u8 div0_at[];
SNIP(idiv_ovf, "mov $0x80000000, %eax; cdq; mov $-1, %ecx\n.globl idiv_at\nidiv_at: idiv %ecx");
extern u8 idiv_at[];
SNIP(bp, "int3");
SNIP(into64, ".byte 0xce");
SNIP(ud2, "ud2");
SNIP(lock_nop, ".byte 0xf0, 0x90");
SNIP(lock_mov, ".byte 0xf0, 0x48, 0x89, 0x07");
SNIP(long_insn, ".fill 14, 1, 0x66; .byte 0x90, 0x90");      /* 15 bytes are the most: this is 15, fine */
SNIP(too_long, ".fill 15, 1, 0x66; .byte 0x90");
SNIP(fnop_, "fnop");
SNIP(fwait_, "fwait");
SNIP(sse_, "xorps %xmm0, %xmm0");
SNIP(mmx_, "pxor %mm0, %mm0; emms");
SNIP(load_ds, "mov %edi, %ds");
SNIP(load_ss, "mov %edi, %ss");
SNIP(ltr_, "ltr %di");
SNIP(lldt_, "lldt %di");
SNIP(ld8, "mov (%rdi), %al");
SNIP(st8, "mov %al, (%rdi)");
SNIP(ld_bp, "mov %rbp, %rcx; mov %rdi, %rbp\n.globl ld_bp_at\nld_bp_at: mov (%rbp), %al; mov %rcx, %rbp");
extern u8 ld_bp_at[];
SNIP(push_sp, "mov %rdi, %rsp\n.globl push_at\npush_at: push %rax");
extern u8 push_at[];
SNIP(jmp_to, "jmp *%rdi");
SNIP(ret_to, "push %rdi\n.globl ret_at\nret_at: ret");
extern u8 ret_at[];
SNIP(int_30, "int $0x30");
SNIP(mov_cr0, "mov %rdi, %cr0");
SNIP(mov_cr3, "mov %rdi, %cr3");
SNIP(mov_cr4, "mov %rdi, %cr4");
SNIP(mov_cr8, "mov %rdi, %cr8");
SNIP(mov_dr7, "mov %rdi, %db7");
SNIP(mov_dr6, "mov %rdi, %db6");
SNIP(mov_dr4, "mov %db4, %rax");
SNIP(rdmsr_, "mov %edi, %ecx\n.globl rdmsr_at\nrdmsr_at: rdmsr");
extern u8 rdmsr_at[];
SNIP(wrmsr_, "mov %edi, %ecx; mov %esi, %eax; mov %rsi, %rdx; shr $32, %rdx\n.globl wrmsr_at\nwrmsr_at: wrmsr");
extern u8 wrmsr_at[];
SNIP(fxrstor_, "fxrstor (%rdi)");
SNIP(ldmxcsr_, "ldmxcsr (%rdi)");
SNIP(movaps_, "movaps (%rdi), %xmm0");
SNIP(divps_, "ldmxcsr (%rdi); xorps %xmm1, %xmm1; mov $1, %eax; cvtsi2ss %eax, %xmm0\n.globl divps_at\ndivps_at: divss %xmm1, %xmm0");
extern u8 divps_at[];
SNIP(fdiv_, "fninit; fldcw (%rdi); fld1; fldz; fdivrp\n.globl fdiv_at\nfdiv_at: fwait");
extern u8 fdiv_at[];
SNIP(lgdt_, "lgdt (%rdi)");
SNIP(cx16, "cmpxchg16b (%rdi)");
SNIP(swapgs_, "swapgs");
SNIP(xsetbv_, "mov %esi, %ecx; mov %rdi, %rax; mov %rdi, %rdx; shr $32, %rdx\n.globl xsetbv_at\nxsetbv_at: xsetbv");
extern u8 xsetbv_at[];
SNIP(xgetbv_, "mov %edi, %ecx\n.globl xgetbv_at\nxgetbv_at: xgetbv");
extern u8 xgetbv_at[];
SNIP(wrfs, "wrfsbase %rdi");
SNIP(lcall_m, "lcall *(%rdi)");
SNIP(ljmp_m, "ljmp *(%rdi)");
SNIP(iret_bad, "push %rsi; push %rsp; pushfq; push %rdi; lea 1f(%rip), %rax; push %rax\n.globl iret_at\niret_at: iretq; 1: add $8, %rsp");
extern u8 iret_at[];
SNIP(icebp, ".byte 0xf1");
SNIP(popf_tf, "pushfq; orl $0x100, (%rsp); popfq; nop\n.globl tf_at\ntf_at: nop");
extern u8 tf_at[];

/* User code; `int $0x80` ends it. */
#define USER(name, code) SNIP(name, code "; int $0x80")
USER(u_nop, "nop");
USER(u_cli, "cli");
USER(u_hlt, "hlt");
USER(u_out, "out %al, $0x80");
USER(u_int30, "int $0x30");
USER(u_int3, "int3");
USER(u_rdtsc, "rdtsc");
USER(u_rdpmc, "rdpmc");
USER(u_lgdt, "lgdt (%rsp)");
USER(u_sgdt, "sgdt -16(%rsp)");
USER(u_str, "str %eax");
USER(u_smsw, "smsw %eax");
USER(u_cr0, "mov %cr0, %rax");
USER(u_dr7, "mov %db7, %rax");
USER(u_msr, "mov $0x10, %ecx; rdmsr");
USER(u_invlpg, "invlpg (%rsp)");
USER(u_wbinvd, "wbinvd");
USER(u_stac, "stac");
USER(u_swapgs, "swapgs");
USER(u_sysret, "sysretq");
USER(u_mwait, "mwait");
USER(u_cpuid, "xor %eax, %eax; cpuid");
USER(u_ac2, "mov 1(%rsp), %ax");
USER(u_ac8, "mov -4(%rsp), %rax");
USER(u_ac_ok, "mov 1(%rsp), %al; movups 1(%rsp), %xmm0");
USER(u_popf, "pushq $0x3202; popfq; pushfq; pop %rax");
USER(u_ds, "mov %edi, %ds");

/* 64-bit call gates: eight-byte pushes, a null SS, the new stack from RSP0. */
struct far { u32 off; u16 sel; } __attribute__((packed));
static const struct far far_c0 = { 0, 0xc3 }, far_d0 = { 0, 0xd3 }, far_e0 = { 0, 0xe3 }, far_d0_rpl0 = { 0, 0xd0 };
USER(u_cg, "lcall *(%rdi)");
USER(u_jg, "ljmp *(%rdi)");
SNIP(k_cg, "lcall *(%rdi)");
SNIP(cg_target, "mov %cs, %eax; shl $16, %eax; mov %ss, %ecx; or %ecx, %eax; shl $32, %rax; mov 8(%rsp), %ecx; shl $16, %ecx; or %rcx, %rax\n"
     "mov 24(%rsp), %ecx; or %rcx, %rax; mov %rsp, cg_sp; lretq");
SNIP(cg_same, "mov 8(%rsp), %rax; lretq");
ul cg_sp __attribute__((used));

static int user(const u8 *f, ul a) { return try_user((ul)f, a, 0); }
#define UEXC(f, a, vector, error) do { EQ(user(f, a), vector); EQ(last.err, error); EQ(last.ip, (ul)(f)); EQ(last.cs, 0x23); EQ(last.ss, 0x2b); } while (0)

static void simple(void)
{
	EQ(try_call(div0, 0, 0), DE); EQ(last.ip, (ul)div0_at); CHECK(last.flags & 1 << 16);
	EQ(try_call(idiv_ovf, 0, 0), DE); EQ(last.ip, (ul)idiv_at);
	EQ(try_call(bp, 0, 0), BP); EQ(last.ip, (ul)bp + 1); CHECK(!(last.flags & 1 << 16));
	EXC(into64, 0, 0, UD, 0);
	EXC(ud2, 0, 0, UD, 0);
	CHECK(last.flags & 1 << 16);
	EQ(last.cs, 0x18);
	EQ(last.ss, 0x10);
	EXC(lock_nop, 0, 0, UD, 0);
	EXC(lock_mov, SCRATCH, 0, UD, 0);
	EQ(try_call(long_insn, 0, 0), -1);
	EXC(too_long, 0, 0, GP, 0);
	EQ(try_call(int_30, 0, 0), 0x30); EQ(last.ip, (ul)int_30 + 2); CHECK(!(last.flags & 1 << 16));
}

static void fpu(void)
{
	static const u32 unmask_zm = 0x1d80;
	static const u16 unmask_x87 = 0x37b;
	static u8 bad[512] __attribute__((aligned(16)));
	ul cr0 = RDCR(0) & ~(ul)(CR0_TS | CR0_EM), cr4 = RDCR(4) | CR4_OSFXSR | CR4_OSXMMEXCPT;

	WRCR(4, cr4);
	WRCR(0, cr0 | CR0_TS | CR0_MP);
	EXC(fnop_, 0, 0, NM, 0);
	EXC(fwait_, 0, 0, NM, 0);
	EXC(sse_, 0, 0, NM, 0);
	EXC(mmx_, 0, 0, NM, 0);
	WRCR(0, (cr0 | CR0_TS) & ~(ul)CR0_MP);
	EQ(try_call(fwait_, 0, 0), -1);
	WRCR(0, cr0 | CR0_EM);
	EXC(fnop_, 0, 0, NM, 0);
	EXC(sse_, 0, 0, UD, 0);
	EXC(mmx_, 0, 0, UD, 0);
	WRCR(0, cr0 | CR0_MP | CR0_NE);
	WRCR(4, cr4 & ~(ul)CR4_OSFXSR);
	EXC(sse_, 0, 0, UD, 0);
	EQ(try_call(mmx_, 0, 0), -1);
	WRCR(4, cr4);
	EQ(try_call(sse_, 0, 0), -1);
	EQ(try_call(divps_, (ul)&unmask_zm, 0), XM); EQ(last.ip, (ul)divps_at); EQ(last.err, 0);
	WRCR(4, cr4 & ~(ul)CR4_OSXMMEXCPT);
	EQ(try_call(divps_, (ul)&unmask_zm, 0), UD); EQ(last.ip, (ul)divps_at);
	WRCR(4, cr4);
	EQ(try_call(fdiv_, (ul)&unmask_x87, 0), MF); EQ(last.ip, (ul)fdiv_at); EQ(last.err, 0);
	__asm__ volatile("fninit");
	bad[24 + 3] = 0x80;
	EXC(fxrstor_, bad, 0, GP, 0);
	EXC(fxrstor_, bad + 8, 0, GP, 0);
	EXC(ldmxcsr_, bad + 24, 0, GP, 0);
	EXC(movaps_, bad + 8, 0, GP, 0);
	EXC(cx16, SCRATCH + 8, 0, GP, 0);
	WRCR(4, cr4 & ~(ul)CR4_OSXSAVE);
	EQ(try_call(xgetbv_, 0, 0), UD); EQ(last.ip, (ul)xgetbv_at);
	WRCR(4, cr4 | CR4_OSXSAVE);
	EQ(try_call(xgetbv_, 0, 0), -1); EQ(ret_val & 1, 1);
	EQ(try_call(xgetbv_, 2, 0), GP);
	EQ(try_call(xsetbv_, 2, 0), GP); EQ(last.ip, (ul)xsetbv_at);          /* x87 off */
	EQ(try_call(xsetbv_, 5, 0), GP);                                      /* AVX without SSE */
	EQ(try_call(xsetbv_, 1ul << 62 | 3, 0), GP);
	EQ(try_call(xsetbv_, 3, 1), GP);                                      /* XCR1 */
	EQ(try_call(xsetbv_, 3, 0), -1);
	/* A pending x87 fault must not outlive this. */
	__asm__ volatile("fninit");
	{ static const u32 def = 0x1f80; __asm__ volatile("ldmxcsr %0" :: "m"(def)); }
}

static void segments(void)
{
	static struct { u32 off; u16 sel; } __attribute__((packed)) far32 = { 0x5000, 0 };
	static struct { u16 limit; u64 base; } __attribute__((packed)) gd = { 0xff, 1ull << 59 };       /* not canonical in 57 bits either */

	/* More descriptors: the table is followed by the TSS at 0x1200. */
	struct { u16 limit; u64 base; } __attribute__((packed)) r = { 0xff, 0x1000 };
	GDT[10] = 0x00cf13000000ffff;           /* 50: data, not present */
	GDT[11] = 0x00af1b000000ffff;           /* 58: 64-bit code, not present */
	GDT[12] = 0x00cf91000000ffff;           /* 60: read-only data */
	GDT[13] = 0x00cf99000000ffff;           /* 68: execute-only code, 32-bit */
	GDT[14] = 0x0000020000000000; GDT[15] = 0;      /* 70: LDT, not present */
	GDT[16] = 0x0000820000000fff; GDT[17] = 0x8000000;      /* 80: LDT with a non-canonical base */
	GDT[18] = 0x0000890000000067; GDT[19] = 0x1f0000000000; /* 90: TSS whose upper half has type bits */
	GDT[20] = 0x00ef9b000000ffff;           /* a0: code with L and D */
	GDT[21] = 0x00affb000000ffff;           /* a8: user code */
	GDT[22] = 0x0000820000000fff; GDT[23] = 0;              /* b0: good LDT */
	__asm__ volatile("lgdt %0" :: "m"(r));
	EXC(load_ds, 0x50, 0, NP, 0x50);
	EXC(load_ds, 0x53, 0, GP, 0x50);        /* DPL 0 against RPL 3 comes first */
	EXC(load_ds, 0x68, 0, GP, 0x68);
	EXC(load_ds, 0x100, 0, GP, 0x100);
	EXC(load_ds, 0x54, 0, GP, 0x54);        /* no LDT */
	EXC(load_ds, 0x30, 0, GP, 0x30);        /* a TSS */
	EQ(try_call(load_ds, 0x60, 0), -1);
	EQ(try_call(load_ds, 3, 0), -1);
	EXC(load_ss, 0x50, 0, SS, 0x50);
	EXC(load_ss, 0x60, 0, GP, 0x60);
	EXC(load_ss, 0x18, 0, GP, 0x18);
	EXC(load_ss, 0x2b, 0, GP, 0x28);
	EXC(load_ss, 1, 0, GP, 0);              /* null: RPL must be CPL */
	EQ(try_call(load_ss, 0, 0), -1);
	EXC(lldt_, 0x70, 0, NP, 0x70);
	EXC(lldt_, 0x80, 0, GP, 0x80);
	EXC(lldt_, 0x10, 0, GP, 0x10);
	EXC(lldt_, 0xb4, 0, GP, 0xb4);
	EQ(try_call(lldt_, 0xb0, 0), -1);
	EQ(try_call(lldt_, 0, 0), -1);
	EXC(ltr_, 0x90, 0, GP, 0x90);
	EQ(try_call(ltr_, 0x30, 0), -1);
	EXC(ltr_, 0x30, 0, GP, 0x30);           /* busy now */
	EXC(ltr_, 0, 0, GP, 0);
	EXC(lgdt_, &gd, 0, GP, 0);
	far32.sel = 0x58; EXC(lcall_m, &far32, 0, NP, 0x58);
	far32.sel = 0xa0; EXC(lcall_m, &far32, 0, GP, 0xa0);
	far32.sel = 0xa8; EXC(lcall_m, &far32, 0, GP, 0xa8);
	far32.sel = 0x30; EXC(lcall_m, &far32, 0, GP, 0x30);    /* a TSS: no task switches here */
	far32.sel = 0x10; EXC(ljmp_m, &far32, 0, GP, 0x10);
	far32.sel = 0; EXC(ljmp_m, &far32, 0, GP, 0);
	/* IRETQ */
	EQ(try_call(iret_bad, 0x58, 0x10), NP); EQ(last.err, 0x58); EQ(last.ip, (ul)iret_at);
	EQ(try_call(iret_bad, 0x18, 0x2b), GP); EQ(last.err, 0x28);
	EQ(try_call(iret_bad, 0x18, 0x50), SS); EQ(last.err, 0x50);
	EQ(try_call(iret_bad, 0, 0x10), GP); EQ(last.err, 0);
	EQ(try_call(iret_bad, 0x18, 0), -1);    /* null SS in ring 0 is good */
	EQ(try_call(iret_bad, 0x18, 0x10), -1);
	EQ(try_call(iret_bad, 0x23, 0), GP); EQ(last.err, 0);   /* null SS in ring 3 is not */
}

static void addresses(void)
{
	ul nc = 0x800000000000;

	*(volatile u64 *)(TSS + 0x34) = SCRATCH + 0x8000;       /* IST3: the stack is what is wrong here */
	set_gate(SS, (ul)stubs + 16 * SS, 0x18, 14, 0, 3);
	EXC(ld8, nc, 0, GP, 0);
	EXC(st8, ~nc, 0, GP, 0);
	EQ(try_call(ld_bp, nc, 0), SS); EQ(last.err, 0); EQ(last.ip, (ul)ld_bp_at);
	EQ(try_call(push_sp, nc + 8, 0), SS); EQ(last.err, 0); EQ(last.ip, (ul)push_at);
	EQ(last.sp, nc + 8);
	EXC(jmp_to, nc, 0, GP, 0);
	EQ(try_call(ret_to, nc, 0), GP); EQ(last.ip, (ul)ret_at);
	EXC(ld8, 0x40000123, 0, PF, 0);
	EQ(last.cr2, 0x40000123);
	EXC(st8, 0x40000124, 0, PF, 2);
	EQ(last.cr2, 0x40000124);
	EQ(try_call(jmp_to, 0x40000000, 0), PF); EQ(last.ip, 0x40000000); EQ(last.cr2, 0x40000000);
	EQ(last.err, rdmsr(0xc0000080) & 1 << 11 ? 0x10 : 0);
}

static void system(void)
{
	ul cr0 = RDCR(0), cr4 = RDCR(4), cr3 = RDCR(3);

	EXC(mov_cr0, cr0 & ~CR0_PG, 0, GP, 0);
	EXC(mov_cr0, cr0 & ~1ul, 0, GP, 0);
	EXC(mov_cr0, cr0 | 1ul << 32, 0, GP, 0);
	EXC(mov_cr0, (cr0 | 1 << 29) & ~(1ul << 30), 0, GP, 0);
	EXC(mov_cr3, cr3 | 1ul << 52, 0, GP, 0);
	EXC(mov_cr3, cr3 | 1ul << 62, 0, GP, 0);
	EXC(mov_cr4, cr4 & ~(ul)CR4_PAE, 0, GP, 0);
	EXC(mov_cr4, cr4 ^ CR4_LA57, 0, GP, 0);
	EXC(mov_cr4, cr4 | 1ul << 31, 0, GP, 0);
	EXC(mov_cr8, 16, 0, GP, 0);
	EXC(mov_dr7, 1ul << 32, 0, GP, 0);
	EXC(mov_dr6, 1ul << 32, 0, GP, 0);
	WRCR(4, cr4 | CR4_DE);
	EXC(mov_dr4, 0, 0, UD, 0);
	WRCR(4, cr4 & ~(ul)CR4_DE);
	EQ(try_call(mov_dr4, 0, 0), -1);
	WRCR(4, cr4);
	EQ(try_call(rdmsr_, 0x12345678, 0), GP); EQ(last.ip, (ul)rdmsr_at);
	EQ(try_call(wrmsr_, 0x12345678, 0), GP); EQ(last.ip, (ul)wrmsr_at);
	EQ(try_call(wrmsr_, 0xc0000082, 1ul << 57), GP);        /* LSTAR not canonical, with five levels either */
	EQ(try_call(wrmsr_, 0xc0000080, 1ul << 40), GP);
	EQ(try_call(wrmsr_, 0xc0000080, rdmsr(0xc0000080) & ~0x100ul), GP);   /* LME with paging on */
	EQ(try_call(wrmsr_, 0x277, 0x02), GP);                 /* PAT: type 2 */
	EQ(try_call(wrmsr_, 0xc0000103, 1ul << 32), GP);
	WRCR(4, cr4 & ~(ul)CR4_FSGSBASE);
	EXC(wrfs, 0, 0, UD, 0);
	WRCR(4, cr4 | CR4_FSGSBASE);
	EXC(wrfs, 1ul << 59, 0, GP, 0);
	WRCR(4, cr4);
	EQ(try_call(icebp, 0, 0), DB); EQ(last.ip, (ul)icebp + 1);
	EQ(try_call(popf_tf, 0, 0), DB); EQ(last.ip, (ul)tf_at); CHECK(RDDR(6) & 1 << 14); CHECK(last.flags & 0x100);
}

static void ring3(void)
{
	ul cr0 = RDCR(0), cr4 = RDCR(4);

	EQ(user(u_nop, 0), -1);
	UEXC(u_cli, 0, GP, 0);
	CHECK(last.flags & 1 << 16);
	UEXC(u_hlt, 0, GP, 0);
	UEXC(u_out, 0, GP, 0);
	UEXC(u_int30, 0, GP, 0x30 * 8 + 2);
	EQ(user(u_int3, 0), BP); EQ(last.ip, (ul)u_int3 + 1);
	UEXC(u_rdpmc, 0, GP, 0);
	UEXC(u_lgdt, 0, GP, 0);
	UEXC(u_cr0, 0, GP, 0);
	UEXC(u_dr7, 0, GP, 0);
	EQ(user(u_msr, 0), GP);
	UEXC(u_invlpg, 0, GP, 0);
	UEXC(u_wbinvd, 0, GP, 0);
	UEXC(u_stac, 0, UD, 0);
	UEXC(u_swapgs, 0, GP, 0);
	WRCR(4, cr4 & ~(ul)(CR4_UMIP | CR4_TSD));
	EQ(user(u_sgdt, 0), -1);
	EQ(user(u_str, 0), -1); EQ(ret_val, 0x30);
	EQ(user(u_smsw, 0), -1); EQ(ret_val, (u32)cr0);
	EQ(user(u_rdtsc, 0), -1);
	WRCR(4, cr4 | CR4_UMIP | CR4_TSD);
	UEXC(u_sgdt, 0, GP, 0);
	UEXC(u_str, 0, GP, 0);
	UEXC(u_smsw, 0, GP, 0);
	UEXC(u_rdtsc, 0, GP, 0);
	WRCR(4, cr4);
	UEXC(u_ds, 0x10, GP, 0x10);
	UEXC(u_ds, 0x2c, GP, 0x2c);
	EQ(user(u_ds, 0x2b), -1);
	/* POPF in ring 3 changes neither IF nor IOPL. */
	EQ(user(u_popf, 0), -1); EQ(ret_val & 0x3200, 0);
	user_flags = 0x3002;
	EQ(user(u_popf, 0), -1); EQ(ret_val & 0x3200, 0x3200);
	EQ(user(u_cli, 0), -1);
	EQ(user(u_out, 0), -1);
	/* alignment */
	WRCR(4, cr4 | CR4_OSFXSR);
	WRCR(0, cr0 | CR0_AM);
	user_flags = 2;
	EQ(user(u_ac2, 0), -1);
	user_flags = 0x40002;
	UEXC(u_ac2, 0, AC, 0);
	UEXC(u_ac8, 0, AC, 0);
	EQ(user(u_ac_ok, 0), -1);
	WRCR(0, cr0 & ~(ul)CR0_AM);
	EQ(user(u_ac2, 0), -1);
	WRCR(0, cr0);
	WRCR(4, cr4);
	user_flags = 2;
	/* CPUID faulting (MSR 140H): PLATFORM_INFO bit 31 says that it is there. */
	if (try_call(rdmsr_, 0xce, 0) == -1 && rdmsr(0xce) >> 31 & 1) {
		EQ(user(u_cpuid, 0), -1);
		wrmsr(0x140, 1);
		EQ(user(u_cpuid, 0), GP); EQ(last.err, 0);
		{ u32 r[4]; cpuid(0, 0, r); CHECK(r[0]); }
		EQ(try_call(wrmsr_, 0x140, 2), GP);
		wrmsr(0x140, 0);
		EQ(user(u_cpuid, 0), -1);
	}
}

SNIP(i90, "int $0x90");
SNIP(i91, "int $0x91");
SNIP(i92, "int $0x92");
SNIP(i93, "int $0x93");
SNIP(i94, "int $0x94");
SNIP(i95, "int $0x95");
SNIP(i96, "int $0x96");
SNIP(i97, "int $0x97");
SNIP(i98, "int $0x98");

static void gate(int n, ul to, int access)
{
	GDT[n] = (to & 0xffff) | 0x18ull << 16 | (u64)access << 40 | (to >> 16 & 0xffff) << 48;
	GDT[n + 1] = to >> 32;
}

static void call_gates(void)
{
	gate(24, (ul)cg_target, 0xec);
	EQ(user(u_cg, (ul)&far_c0), -1);
	EQ(ret_val, 0x001800000023002bul);
	EQ(cg_sp, *(volatile u64 *)(TSS + 4) - 32);
	UEXC(u_jg, (ul)&far_c0, GP, 0x18);              /* JMP does not change rings */
	gate(26, (ul)cg_target, 0x8c);
	UEXC(u_cg, (ul)&far_d0, GP, 0xd0);              /* DPL 0 */
	gate(26, (ul)cg_target, 0x6c);
	UEXC(u_cg, (ul)&far_d0, NP, 0xd0);
	gate(26, (ul)cg_same, 0x8c);
	EXC(k_cg, &far_d0, 0, GP, 0xd0);               /* RPL 3 */
	EQ(try_call(k_cg, (ul)&far_d0_rpl0, 0), -1);
	EQ(ret_val, 0x18);
	gate(28, 0x800000000000, 0xec);
	EXC(k_cg, &far_e0, 0, GP, 0);
	gate(28, (ul)cg_target, 0xec);
	GDT[29] |= 1ull << 40;                          /* the upper half has no type */
	EXC(k_cg, &far_e0, 0, GP, 0xe0);
	gate(28, (ul)cg_target, 0xe4);                  /* 16-bit gates do not exist here */
	EXC(k_cg, &far_e0, 0, GP, 0xe0);
	gate(28, (ul)cg_target, 0xec);
	GDT[28] = (GDT[28] & ~0xffff0000ull) | 0x08 << 16;      /* to 32-bit code */
	EXC(k_cg, &far_e0, 0, GP, 0x08);
}

/* Gate faults, stack faults in delivery, double faults. */
static void delivery(void)
{
	u64 save[2];
	volatile u64 *g = (volatile u64 *)idt;

	set_gate(0x90, (ul)stubs, 0x18, 14, 0, 0);
	g[0x90 * 2] &= ~(1ull << 47);
	EXC(i90, 0, 0, NP, 0x90 * 8 + 2);
	g[0x91 * 2] = g[0x91 * 2 + 1] = 0;
	EXC(i91, 0, 0, GP, 0x91 * 8 + 2);
	set_gate(0x92, (ul)stubs, 0x50, 14, 0, 0);
	EXC(i92, 0, 0, GP, 0x50);                   /* data segment */
	set_gate(0x93, (ul)stubs, 0x58, 14, 0, 0);
	EXC(i93, 0, 0, NP, 0x58);
	set_gate(0x94, (ul)stubs, 0x08, 14, 0, 0);
	EXC(i94, 0, 0, GP, 0x08);                   /* 32-bit code */
	set_gate(0x95, (ul)stubs, 0, 14, 0, 0);
	EXC(i95, 0, 0, GP, 0);
	set_gate(0x96, 0x800000000000, 0x18, 14, 0, 0);
	EXC(i96, 0, 0, GP, 0);
	set_gate(0x97, (ul)stubs, 0x18, 14, 0, 1);
	*(volatile u64 *)(TSS + 0x24) = 0x800000000100;
	EXC(i97, 0, 0, SS, 0);
	set_gate(0x98, (ul)stubs, 0x18, 6, 0, 0);                               /* 16-bit gate */
	EXC(i98, 0, 0, GP, 0x98 * 8 + 2);
	/* EXT: the fault of an event that the program did not ask for. */
	save[0] = g[UD * 2];
	g[UD * 2] &= ~(1ull << 47);
	EQ(try_call(ud2, 0, 0), NP); EQ(last.err, UD * 8 + 3); EQ(last.ip, (ul)ud2);
	g[UD * 2] = save[0];
	/* double faults: #GP in #GP's delivery, #NP in #PF's */
	save[0] = g[GP * 2];
	g[GP * 2] &= ~(1ull << 47);
	EQ(try_call(int_30, 0, 0), 0x30);
	EQ(try_call(mov_cr8, 99, 0), DF); EQ(last.err, 0); EQ(last.ip, (ul)mov_cr8);
	g[GP * 2] = save[0];
	save[0] = g[PF * 2];
	g[PF * 2] &= ~(1ull << 47);
	EQ(try_call(ld8, 0x40000555, 0), DF); EQ(last.err, 0); EQ(last.cr2, 0x40000555);
	/* a benign one first: no double fault */
	g[PF * 2] = save[0];
	save[0] = g[DE * 2];
	set_gate(DE, (ul)stubs, 0x58, 14, 0, 0);
	EQ(try_call(div0, 0, 0), DF);           /* #DE is contributory: #NP on top of it */
	g[DE * 2] = save[0];
}

void guest_main(void)
{
	simple();
	fpu();
	segments();
	addresses();
	system();
	ring3();
	call_gates();
	delivery();
	if (param[0]) { /* triple fault: the runner expects KVM_EXIT_SHUTDOWN */
		((volatile u64 *)idt)[DF * 2] = ((volatile u64 *)idt)[GP * 2] = 0;
		try_call(mov_cr8, 99, 0);
		EQ(1, 0);
	}
}
