/*
 * Protected mode: exceptions of 32-bit code, limits, gates of both sizes, a 16-bit TSS, SYSENTER, virtual-8086 mode with the
 * VME, protected-mode virtual interrupts (SDM vol. 3 ch. 5-8, 21).
 */
#include "rt.h"

SNIP(bound_, "boundl %edx, (%eax)");
SNIP(into_, "movb $0x7f, %al; addb $1, %al\n.globl into_at\ninto_at: into");
extern u8 into_at[];
SNIP(ld_es, "mov %eax, %es");
SNIP(ld_ss, "mov %eax, %ss");
SNIP(es_rd, "mov %eax, %es; mov %edx, %eax\n.globl es_rd_at\nes_rd_at: mov %es:(%eax), %cl");
extern u8 es_rd_at[];
SNIP(es_wr4, "mov %eax, %es; mov %edx, %eax\n.globl es_wr_at\nes_wr_at: mov %ecx, %es:(%eax)");
extern u8 es_wr_at[];
SNIP(cs_wr, "mov %cl, %cs:(%eax)");
SNIP(ljmp_, "ljmp *(%eax)");
SNIP(lcall_, "lcall *(%eax)");
SNIP(ltr_, "ltr %ax");
SNIP(i31, "int $0x31");
SNIP(sysenter_, "sysenter");
SNIP(ud2_, "ud2");
SNIP(aam0, "aam $0");
SNIP(daa_, "mov $0x9a, %al; clc; daa; movzbl %al, %eax");
SNIP(les_, "les (%eax), %ecx");
SNIP(gate_same, "lcall $0x90, $0; ret");
SNIP(u_gate32, "pushl $0x1111; pushl $0x2222; lcall $0x98, $0; pop %ecx; pop %ecx; int $0x80");
SNIP(u_gate16, "pushw $0x3333; lcall $0xa0, $0; popw %cx; int $0x80");
SNIP(u_gate_dpl, "lcall $0x90, $0; int $0x80");
SNIP(u_sysenter, "mov $1f, %edx; mov %esp, %ecx; sysenter; ud2; 1: int $0x80");
SNIP(u_cli, "cli; pushfl; pop %eax; int $0x80");
SNIP(u_sti, "sti; pushfl; pop %eax; int $0x80");
SNIP(u_sysexit, "sysexit");
SNIP(u_nop, "int $0x80");
SNIP(sx_target, "mov %cs, %eax; mov %ss, %ebx; shl $16, %ebx; or %ebx, %eax; sysexit");
/* Gate targets leave what they saw in memory. */
__asm__(".text\n.globl gt_same, gt32, gt16\n"
	"gt_same: mov $0x77, %eax; lret\n"
	"gt32: mov 8(%esp), %eax; shl $16, %eax; mov 12(%esp), %ax; lret $8\n"   /* parameters: 2222 on top of 1111 */
	"gt16: movzwl 4(%esp), %eax; .byte 0x66; lret $2\n");
extern u8 gt_same[], gt32[], gt16[];
static u8 kst[4096] __attribute__((aligned(16)));
static u16 tss16[64] __attribute__((aligned(8)));
static u8 tss32[0x68 + 32 + 0x2001 + 64] __attribute__((aligned(4096)));

static u64 desc(u32 base, u32 limit, u32 access, u32 flags)
{
	return (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)access << 40 | (u64)(limit >> 16 & 15) << 48 | (u64)flags << 52 |
		(u64)(base >> 24) << 56;
}
static u64 call_gate(ul to, int type, int dpl, int n)
{
	return (to & 0xffff) | 0x08ull << 16 | (u64)n << 32 | (u64)(0x80 | dpl << 5 | type) << 40 | (u64)(to >> 16) << 48;
}

static void tables(void)
{
	static u64 gdt[32];
	struct { u16 limit; u32 base; } __attribute__((packed)) r = { sizeof gdt - 1, (ul)gdt };

	for (int i = 0; i < 9; i++)
		gdt[i] = GDT[i];
	gdt[6] = desc((ul)tss32, sizeof tss32 - 1, 0x89, 0);
	gdt[10] = desc(0, 0xfffff, 0x13, 12);           /* 50: not present */
	gdt[11] = desc(0, 0xfff, 0x93, 4);              /* 58: 4 KiB */
	gdt[12] = desc(0, 0xfff, 0x97, 4);              /* 60: expand-down */
	gdt[13] = desc(0, 0xfff, 0x97, 0);              /* 68: expand-down, 64 KiB at most */
	gdt[14] = desc(0, 0xfffff, 0x91, 12);           /* 70: read-only */
	gdt[15] = desc(0, 0xfffff, 0x99, 12);           /* 78: execute-only */
	gdt[16] = desc(0, 0xffff, 0x1b, 12);            /* 80: code, not present */
	gdt[17] = desc((ul)tss16, 0x2b, 0x81, 0);       /* 88: 16-bit TSS */
	gdt[18] = call_gate((ul)gt_same, 12, 0, 0);     /* 90 */
	gdt[19] = call_gate((ul)gt32, 12, 3, 2);        /* 98 */
	gdt[20] = call_gate(0x9800, 4, 3, 1);           /* a0: gt16, copied below 64 KiB */
	gdt[21] = call_gate((ul)gt32, 12, 3, 0) & ~(0x80ull << 40);     /* a8: not present */
	gdt[22] = desc((ul)tss16, 0x20, 0x81, 0);       /* b0: too short */
	gdt[23] = desc(0, 0xfffff, 0x9f, 12);           /* b8: conforming code */
	*(u32 *)(tss32 + 4) = (ul)kst + sizeof kst;
	*(u32 *)(tss32 + 8) = 0x10;
	*(u16 *)(tss32 + 0x66) = 0x68 + 32;
	tss32[sizeof tss32 - 1] = 0xff;
	__asm__ volatile("lgdt %0; ltr %w1" :: "m"(r), "r"(0x30));
}

static void faults(void)
{
	static const u32 pair[2] = { 5, 10 };
	static struct { u32 off; u16 sel; } __attribute__((packed)) far = { 0x100000, 0 };

	EQ(try_call(bound_, (ul)pair, 7), -1);
	EXC(bound_, pair, 11, BR, 0);
	EXC(bound_, pair, 4, BR, 0);
	EQ(try_call(into_, 0, 0), OF); EQ(last.ip, (ul)into_at + 1);
	EXC(aam0, 0, 0, DE, 0);
	EQ(try_call(daa_, 0, 0), -1); EQ(ret_val, 0x00);
	EXC(ud2_, 0, 0, UD, 0);
	EXC(ld_es, 0x50, 0, NP, 0x50);
	EXC(ld_es, 0x78, 0, GP, 0x78);
	EXC(ld_es, 0x100, 0, GP, 0x100);
	EXC(ld_ss, 0x50, 0, SS, 0x50);
	EXC(ld_ss, 0x70, 0, GP, 0x70);
	EXC(ld_ss, 0, 0, GP, 0);
	EQ(try_call(es_rd, 0x58, 0xfff), -1);
	EQ(try_call(es_rd, 0x58, 0x1000), GP); EQ(last.err, 0); EQ(last.ip, (ul)es_rd_at);
	EQ(try_call(es_wr4, 0x58, 0xffc), -1);
	EQ(try_call(es_wr4, 0x58, 0xffd), GP);
	EQ(try_call(es_rd, 0x60, 0x1000), -1);
	EQ(try_call(es_rd, 0x60, 0xfff), GP);
	EQ(try_call(es_rd, 0x68, 0xffff), -1);
	EQ(try_call(es_rd, 0x68, 0x10000), GP);
	EQ(try_call(es_wr4, 0x68, 0xfffe), GP);
	EQ(try_call(es_rd, 0x70, SCRATCH), -1);
	EQ(try_call(es_wr4, 0x70, SCRATCH), GP); EQ(last.err, 0); EQ(last.ip, (ul)es_wr_at);
	EQ(try_call(es_rd, 0, 0), GP); EQ(last.err, 0);
	EXC(cs_wr, SCRATCH, 0, GP, 0);
	far.sel = 0x50; EXC(les_, &far, 0, NP, 0x50);
	far.sel = 0x80; EXC(ljmp_, &far, 0, NP, 0x80);
	far.sel = 0x10; EXC(ljmp_, &far, 0, GP, 0x10);
	far.sel = 0x40; EXC(lcall_, &far, 0, GP, 0x40); /* ring 3 code */
	far.sel = 0x30; EXC(ljmp_, &far, 0, GP, 0x30);  /* busy TSS */
	far.sel = 0xb0; EXC(lcall_, &far, 0, TS, 0xb0);
	far.sel = 0xa8; EXC(lcall_, &far, 0, NP, 0xa8);
	EXC(ltr_, 0x10, 0, GP, 0x10);
	EXC(ltr_, 0x30, 0, GP, 0x30);
	set_gate(0x31, (ul)stubs, 0x50, 14, 0, 0); EXC(i31, 0, 0, GP, 0x50);
	set_gate(0x31, (ul)stubs, 0x80, 14, 0, 0); EXC(i31, 0, 0, NP, 0x80);
	set_gate(0x31, (ul)stubs, 0x08, 12, 0, 0); EXC(i31, 0, 0, GP, 0x31 * 8 + 2);
	set_gate(0x31, (ul)stubs, 0x08, 5, 0, 0); ((volatile u64 *)idt)[0x31] = 0x0000850000300000;     /* task gate to a busy TSS */
	EXC(i31, 0, 0, GP, 0x30);
}

static void gates(void)
{
	ul sp;

	EQ(try_call(gate_same, 0, 0), -1); EQ(ret_val, 0x77);
	EQ(try_user((ul)u_gate32, 0, 0), -1); EQ(ret_val, 0x22221111);
	/* Of IP and SP a 16-bit gate keeps 16 bits: all of it low. */
	for (int i = 0; i < 32; i++) {
		((volatile u8 *)0x9000)[i] = u_gate16[i];
		((volatile u8 *)0x9800)[i] = gt16[i];
	}
	sp = user_sp;
	user_sp = 0xe000;
	EQ(try_user(0x9000, 0, 0), -1); EQ(ret_val, 0x3333);
	user_sp = sp;
	EQ(try_user((ul)u_gate_dpl, 0, 0), GP); EQ(last.err, 0x90);
	/* SYSENTER and SYSEXIT */
	EXC(sysenter_, 0, 0, GP, 0);
	wrmsr(0x174, 0x8);
	wrmsr(0x175, (ul)kst + sizeof kst);
	wrmsr(0x176, (ul)sx_target);
	EQ(try_user((ul)u_sysexit, 0, 0), GP); EQ(last.err, 0);
	{ /* SYSEXIT wants ring 3 at CS + 16 and + 24: the table has 18 and 20 there, loaded without a look */
		EQ(try_user((ul)u_sysenter, 0, 0), -1);
		EQ(ret_val, 0x00100008);
	}
	wrmsr(0x174, 0);
}

/* PVI: CLI and STI of ring 3 act on VIF. */
static void pvi(void)
{
	ul cr4 = RDCR(4);

	EQ(try_user((ul)u_cli, 0, 0), GP);
	WRCR(4, cr4 | CR4_PVI);
	user_flags = 0x80202;
	EQ(try_user((ul)u_cli, 0, 0), -1); EQ(ret_val & 0x180200, 0x200);
	user_flags = 0x202;
	EQ(try_user((ul)u_sti, 0, 0), -1); EQ(ret_val & 0x180200, 0x80200);
	user_flags = 0x100202;
	EQ(try_user((ul)u_sti, 0, 0), GP); EQ(last.err, 0);
	user_flags = 2;
	WRCR(4, cr4);
}

/* -- virtual-8086 mode -------------------------------------------------------------------------------- */
#define VM 0x20000
__asm__(".text\n.globl vm_run\nvm_run:\n"    /* eax: IP at segment 3000, edx: flags */
	"pushfl; push %ebx; push %ebp; push %esi; push %edi; mov %esp, jb\n"
	"pushl $0; pushl $0; pushl $0x3000; pushl $0x3000; pushl $0x3000; pushl $0xf00; push %edx; pushl $0x3000; push %eax; iretl\n");
int vm_run(ul ip, ul flags);
#define CODE16(name, text) extern u8 name[], name##_end[]; __asm__(".text\n.code16\n.globl " #name ", " #name "_end\n" #name ": " text "\n" #name "_end:\n.code32")
#define V_END "; int $0x80; hlt"
CODE16(v_int, "int $0x31" V_END);
CODE16(v_pushf, "pushf; pop %ax" V_END);
CODE16(v_popf, "push $0x202; popf; pushfl; pop %eax" V_END);
CODE16(v_popf2, "push $0x202; popf; pushf; pop %ax" V_END);
CODE16(v_popf_tf, "push $0x302; popf" V_END);
CODE16(v_cli, "cli; pushf; pop %ax" V_END);
CODE16(v_sti, "sti; pushf; pop %ax" V_END);
CODE16(v_iret, "push $0x202; push %cs; call 1f; 1: pop %ax; add $8, %ax; push %ax; iret; nop; nop; mov $0x1234, %ax" V_END);
CODE16(v_int3, "int3" V_END);
CODE16(v_in, "in $0x51, %al" V_END);
CODE16(v_in2, "in $0x52, %al" V_END);
CODE16(v_limit, "mov $0xffff, %bx; mov (%bx), %ax" V_END);
CODE16(v_isr, "pop %bx; pop %cx; pop %dx; pushw %dx; push %cx; push %bx; mov %dx, %ax; iret");

static int vm(const u8 *code, const u8 *end, ul flags)
{
	volatile u8 *to = (volatile u8 *)0x30000;

	while (code < end)
		*to++ = *code++;
	return vm_run(0, VM | flags | 2);
}
#define VMRUN(c, flags) vm(c, c##_end, flags)

static void vm86(void)
{
	ul cr4 = RDCR(4);
	volatile u16 *ivt = (volatile u16 *)0;
	u8 *redirect = tss32 + 0x68;

	for (int i = 0; i < v_isr_end - v_isr; i++)
		((volatile u8 *)0x30800)[i] = v_isr[i];
	ivt[0x31 * 2] = 0x800;
	ivt[0x31 * 2 + 1] = 0x3000;
	/* INT 80H itself must come to us */
	redirect[0x80 / 8] = 1;
	set_gate(0x31, (ul)stubs + 16 * 0x31, 0x08, 14, 3, 0);
	WRCR(4, cr4 & ~(ul)CR4_VME);
	/* IOPL 3: everything works, INT goes through the IDT */
	EQ(VMRUN(v_int, 0x3000), 0x31); EQ(last.cs, 0x3000); EQ(last.ip, 2); EQ(last.flags & VM, VM);
	EQ(VMRUN(v_pushf, 0x3202), -1); EQ(ret_val & 0xffff, 0x3202);
	EQ(VMRUN(v_cli, 0x3202), -1); EQ(ret_val & 0x200, 0);
	EQ(VMRUN(v_iret, 0x3000), -1); EQ(ret_val & 0xffff, 0x1234);
	EQ(VMRUN(v_limit, 0x3000), GP); EQ(last.err, 0);
	EQ(VMRUN(v_in, 0x3000), -1);
	tss32[0x68 + 32 + 0x52 / 8] = 1 << (0x52 & 7);
	EQ(VMRUN(v_in2, 0x3000), GP); EQ(last.err, 0);
	/* IOPL 0 without VME: #GP */
	EQ(VMRUN(v_pushf, 0), GP); EQ(last.ip, 0); EQ(last.err, 0);
	EQ(VMRUN(v_cli, 0), GP);
	EQ(VMRUN(v_int, 0), GP); EQ(last.err, 0);
	EQ(VMRUN(v_popf2, 0), GP); EQ(last.ip, 3);
	EQ(VMRUN(v_int3, 0), BP); EQ(last.ip, 1);       /* INT3 is not sensitive */
	/* VME: virtual interrupt flag, redirection */
	WRCR(4, cr4 | CR4_VME);
	/* INT 80H at IOPL 0 with its bit set is #GP: the checks below end so */
#define VEND(c, flags) do { EQ(VMRUN(c, flags), GP); EQ(last.ip, (ul)(c##_end - c) - 3); } while (0)
	VEND(v_pushf, 0x80000);
	VEND(v_cli, 0x80200); EQ(last.flags & 0x80200, 0x200);
	VEND(v_sti, 0x200); EQ(last.flags & 0x80200, 0x80200);
	EQ(VMRUN(v_sti, 0x100200), GP); EQ(last.ip, 0); /* VIP */
	VEND(v_popf2, 0x200); EQ(last.flags & 0x80200, 0x80200);
	EQ(VMRUN(v_popf2, 0x100200), GP); EQ(last.ip, 3);
	EQ(VMRUN(v_popf_tf, 0x200), GP); EQ(last.ip, 3);
	EQ(VMRUN(v_popf, 0x200), GP); EQ(last.ip, 4);   /* PUSHFD is not covered */
	VEND(v_iret, 0x200); EQ(last.flags & 0x80200, 0x80200);
	VEND(v_int, 0x80200); EQ(last.flags & 0x80200, 0x80200);        /* redirected; the image had IF = VIF, IOPL 3 */
	redirect[0x31 / 8] |= 1 << (0x31 & 7);
	EQ(VMRUN(v_int, 0x200), GP); EQ(last.ip, 0); EQ(last.err, 0);
	EQ(VMRUN(v_int, 0x3200), 0x31);                 /* IOPL 3: to the IDT */
	redirect[0x31 / 8] = 0;
	EQ(VMRUN(v_int, 0x3200), -1);                   /* IOPL 3: to the IVT, with IF cleared there */
	EQ(ret_val & 0x3200, 0x3200);
	WRCR(4, cr4);
}

/* A 16-bit task: CALL to it, its IRET comes back. */
__asm__(".text\n.globl task16\ntask16: mov %eax, %ebx; mov %bx, 0x600100; str 0x600102; incw 0x600104; iret; jmp task16");
extern u8 task16[];
static void task(void)
{
	static struct { u32 off; u16 sel; } __attribute__((packed)) far = { 0, 0x88 };

	/* IP has 16 bits: the code is copied low. 32-bit code segment, as the selector says. */
	for (int i = 0; i < 64; i++)
		((volatile u8 *)0xa000)[i] = task16[i];
	tss16[7] = 0xa000; tss16[8] = 2;
	tss16[9] = 0x4321;                              /* AX */
	tss16[13] = 0xb000;                             /* SP */
	tss16[17] = 0x10; tss16[18] = 0x08; tss16[19] = 0x10; tss16[20] = 0x10;
	LOAD(u16, 0x600104) = 0;
	EQ(try_call(lcall_, (ul)&far, 0), -1);
	EQ(LOAD(u16, 0x600100), 0x4321);
	EQ(LOAD(u16, 0x600102), 0x88);
	EQ(LOAD(u16, 0x600104), 1);
	EQ(tss16[0], 0x30);
	EQ(RDCR(0) & CR0_TS, CR0_TS);
	{ u16 t; __asm__ volatile("str %0" : "=r"(t)); EQ(t, 0x30); }
	EQ(try_call(lcall_, (ul)&far, 0), -1);          /* goes on behind its IRET */
	EQ(LOAD(u16, 0x600104), 2);
	__asm__ volatile("clts");
}

/*
 * Task gates: a task of ring 0 notes what it finds, moves the task that it came from on by tg.skip bytes, and goes back to it. An error
 * code lies on its stack (SDM vol. 3 6.12.2), which is why it takes the stack's top from memory before it does.
 */
__asm__(".text\n.globl tg_task\ntg_task: mov %esp, tg; mov (%esp), %eax; mov %eax, tg + 4; str %eax; mov %eax, tg + 8; pushf; popl tg + 12\n"
	"incl tg + 16; mov tg + 24, %eax; add %eax, tss32 + 0x20; mov tg + 20, %esp; iret; jmp tg_task");
extern u8 tg_task[];
struct { u32 esp, top, tr, flags, count, stack, skip; } tg;
static u32 tg_tss[26] __attribute__((aligned(256)));
SNIP(tg_int, "int $0x35");
SNIP(u_tg, "cli; int $0x35; nop; int $0x80");

static u64 *gdt_entry(u16 sel)
{
	struct { u16 limit; u32 base; } __attribute__((packed)) r;

	__asm__ volatile("sgdt %0" : "=m"(r));
	return (u64 *)(r.base + (sel & ~7u));
}

static void tg_setup(void)
{
	static u8 st[1024] __attribute__((aligned(16)));

	for (unsigned n = 0; n < 26; n++)
		tg_tss[n] = 0;
	tg.stack = (ul)st + sizeof st;
	tg_tss[8] = (ul)tg_task;
	tg_tss[9] = 2;
	tg_tss[14] = tg.stack;
	for (unsigned n = 18; n < 24; n++)
		tg_tss[n] = n == 19 ? 0x08 : 0x10;
	*gdt_entry(0xe0) = desc((ul)tg_tss, 0x67, 0x89, 0);
	((u32 *)tg.stack)[-1] = 0x5a5a5a5a;
	tg.count = tg.tr = tg.flags = 0;
}

/* What a fault of this vector at `snip` leaves behind; -1: no error code. */
static void tg_fault(int vec, u8 *snip, ul a, u32 skip, long error)
{
	u64 gate = ((volatile u64 *)idt)[vec];

	tg_setup();
	tg.skip = skip;
	((volatile u64 *)idt)[vec] = 0x00008500ull << 32 | 0xe0ull << 16;
	EQT(vec, try_call(snip, a, 0), -1);
	((volatile u64 *)idt)[vec] = gate;
	EQT(vec, tg.count, 1);
	EQT(vec, tg.esp, error < 0 ? tg.stack : tg.stack - 4);
	EQT(vec, ((u32 *)tg.stack)[-1], error < 0 ? 2 | 1 << 14 : (u32)error);  /* PUSHF wrote below the code, or in its place */
	EQT(vec, tg.tr & 0xffff, 0xe0);
	EQT(vec, tg.flags & 1 << 14, 1 << 14);          /* nested, */
	EQT(vec, tg.flags & 1 << 16, 0);
	EQT(vec, tg_tss[0], 0x30);                      /* in the task that was interrupted */
	EQT(vec, *gdt_entry(0xe0) >> 40 & 0xff, 0x89);  /* and over */
	{ u16 t; __asm__ volatile("str %0" : "=r"(t)); EQT(vec, t, 0x30); }
	EQT(vec, *gdt_entry(0x30) >> 40 & 0xff, 0x8b);
	__asm__ volatile("clts");
}

/* The task's fault was handled in it: be the first one again. */
static void tg_back(void)
{
	u16 t;

	__asm__ volatile("str %0" : "=r"(t));
	EQ(t, 0xe0);
	EQ(tg_tss[0], 0x30);
	EQ(*(u32 *)(tss32 + 0x20), (ul)ud2_);
	*gdt_entry(0x30) = (*gdt_entry(0x30) & ~(2ull << 40));
	__asm__ volatile("ltr %w0; clts" :: "r"(0x30));
}

static void task_gates(void)
{
	tg_fault(UD, ud2_, 0, 2, -1);
	tg_fault(DE, aam0, 0, 2, -1);
	tg_fault(NP, ld_es, 0x50, 2, 0x50);
	tg_fault(GP, ld_es, 0x100, 2, 0x100);
	tg_fault(0x35, tg_int, 0, 0, -1);
	/* From ring 3: its fault, and its INT by a gate that it may use; both return a byte further on. */
	u64 gate[2] = { ((volatile u64 *)idt)[GP], ((volatile u64 *)idt)[UD] };
	tg_setup();
	tg.skip = 1;
	((volatile u64 *)idt)[GP] = 0x00008500ull << 32 | 0xe0ull << 16;
	((volatile u64 *)idt)[0x35] = 0x0000e500ull << 32 | 0xe0ull << 16;
	EQ(try_user((ul)u_tg, 0, 0), -1);
	EQ(tg.count, 2);
	((volatile u64 *)idt)[GP] = gate[0];
	/* What is wrong with the new task's segments is the new task's fault: before its first instruction, and while #UD was delivered. */
	tg_setup();
	tg_tss[23] = 0x50;
	((volatile u64 *)idt)[UD] = 0x00008500ull << 32 | 0xe0ull << 16;
	EQ(try_call(ud2_, 0, 0), NP); EQ(last.err, 0x51); EQ(last.ip, (ul)tg_task); EQ(last.flags & 1 << 14, 1 << 14);
	tg_back();
	/* So is its trap bit. */
	tg_setup();
	tg_tss[25] = 1;
	WRDR(6, 0);
	EQ(try_call(ud2_, 0, 0), DB); EQ(last.ip, (ul)tg_task); EQ(RDDR(6) & 0xe000, 0x8000); EQ(tg.count, 0);
	tg_back();
	((volatile u64 *)idt)[UD] = gate[1];
}

void guest_main(void)
{
	tables();
	faults();
	gates();
	pvi();
	vm86();
	task();
	task_gates();
}
