/* Single step, breakpoints on code, data and ports, RF, general detect (SDM vol. 3 ch. 18), in 64-bit code. */
#include "rt.h"

#define PORT 0x5050
static u64 cell[8] __attribute__((aligned(64)));

SNIP(d_rep, "mov $3, %ecx; pushfq; orl $0x100, (%rsp); popfq\n.globl d_rep_at\nd_rep_at: rep stosb");
SNIP(d_ss, "mov %ss, %eax; pushfq; orl $0x100, (%rsp); popfq; mov %eax, %ss; nop\n.globl d_ss_at\nd_ss_at: nop");
SNIP(d_int, "pushfq; orl $0x100, (%rsp); popfq\n.globl d_int_at\nd_int_at: int $0x30");
SNIP(d_fault, "pushfq; orl $0x100, (%rsp); popfq\n.globl d_fault_at\nd_fault_at: mov (%rdi), %al");
SNIP(d_off, "pushfq; pushfq; orl $0x100, (%rsp); popfq; popfq\n.globl d_off_at\nd_off_at: nop");
SNIP(d_jmp, "pushfq; orl $0x100, (%rsp); popfq; jmp 1f; ud2; 1:\n.globl d_jmp_at\nd_jmp_at: nop");
SNIP(d_ice, "mov %ss, %eax; pushfq; orl $0x100, (%rsp); popfq; mov %eax, %ss; .byte 0xf1\n.globl d_ice_at\nd_ice_at: nop");
SNIP(w1, "movb $1, (%rdi)\n.globl w1_at\nw1_at: nop");
SNIP(w8, "movq $1, (%rdi)\n.globl w8_at\nw8_at: nop");
SNIP(r1, "mov (%rdi), %al\n.globl r1_at\nr1_at: nop");
SNIP(r8, "mov (%rdi), %rax\n.globl r8_at\nr8_at: nop");
SNIP(inc1, "lock incb (%rdi)\n.globl inc1_at\ninc1_at: nop");
SNIP(sse, "movups (%rdi), %xmm0; nop\n.globl sse_at\nsse_at: nop");
SNIP(psh, "mov %rsp, %rcx; lea 8(%rdi), %rsp; push %rax\n.globl psh_at\npsh_at: mov %rcx, %rsp");
SNIP(reps, "mov $4, %ecx\n.globl reps_i\nreps_i: rep stosb\n.globl reps_at\nreps_at: nop");
SNIP(ex, "nop\n.globl ex_at\nex_at: nop\n.globl ex_at2\nex_at2: nop");
SNIP(rf, "mov %rsp, %rcx; pushq $0x10; push %rcx; pushq $0x10002; pushq $0x18; lea rf_at(%rip), %rax; push %rax; iretq\n"
	".globl rf_at\nrf_at: nop\n.globl rf_at2\nrf_at2: nop");
SNIP(gd, "mov %db0, %rax");
SNIP(inp, "mov %edi, %edx; in %dx, %al\n.globl inp_at\ninp_at: nop");
SNIP(inp4, "mov %edi, %edx; in %dx, %eax\n.globl inp4_at\ninp4_at: nop");
SNIP(insr, "mov $0x5050, %edx; mov $4, %ecx\n.globl insr_i\ninsr_i: rep insb\n.globl insr_at\ninsr_at: nop");
SNIP(outsr, "mov %rdi, %rsi; mov $0x5050, %edx; mov $4, %ecx\n.globl outsr_i\noutsr_i: rep outsb; mov %ecx, %eax");
extern u8 insr_i[], insr_at[], outsr_i[];
extern u8 d_rep_at[], d_ss_at[], d_int_at[], d_fault_at[], d_off_at[], d_jmp_at[], d_ice_at[];
extern u8 w1_at[], w8_at[], r1_at[], r8_at[], inc1_at[], sse_at[],
	psh_at[], reps_i[], reps_at[], ex_at[], ex_at2[], rf_at[], rf_at2[], inp_at[], inp4_at[];

/* A #DB after (or at) `at` with these bits of DR6. */
#define DBG(snip, a, at, bits) do { \
		WRDR(6, 0xffff0ff0); \
		EQ(try_call(snip, (ul)(a), 0), DB); \
		EQ(last.ip, (ul)(at)); \
		EQ(RDDR(6), 0xffff0ff0 | (bits)); \
	} while (0)
#define NODBG(snip, a) EQ(try_call(snip, (ul)(a), 0), -1)
enum { BS = 1 << 14, BD = 1 << 13 };
/* Breakpoint n: rw 0 execute, 1 write, 2 port, 3 read or write; length 1, 2, 4, 8. */
static void bp(int n, ul addr, int rw, int len)
{
	ul l = len == 8 ? 2 : (ul)len - 1;

	if (n == 0) WRDR(0, addr);
	if (n == 1) WRDR(1, addr);
	if (n == 2) WRDR(2, addr);
	if (n == 3) WRDR(3, addr);
	WRDR(7, (RDDR(7) & ~(0xful << (16 + 4 * n) | 3ul << 2 * n)) | 1ul << 2 * n | (rw | l << 2) << (16 + 4 * n));
}
static void off(void) { WRDR(7, 0x400); }

static void steps(void)
{
	DBG(d_rep, cell, d_rep_at, BS);         /* after one round of the string */
	DBG(d_ss, 0, d_ss_at, BS);
	DBG(d_jmp, 0, d_jmp_at, BS);
	DBG(d_off, 0, d_off_at, BS);            /* the POPF that clears TF still traps */
	CHECK(!(last.flags & 0x100));
	DBG(d_ice, 0, d_ice_at, 0);             /* INT1 alone: the step that MOV SS held back is gone */
	EQ(try_call(d_int, 0, 0), 0x30);
	EQ(last.ip, (ul)d_int_at + 2);
	CHECK(last.flags & 0x100);
	WRDR(6, 0xffff0ff0);
	EQ(try_call(d_fault, 0x40000000, 0), PF);       /* a fault is not followed by a trap */
	EQ(last.ip, (ul)d_fault_at);
	EQ(RDDR(6), 0xffff0ff0);
}

static void data(void)
{
	ul c = (ul)cell;

	for (int n = 0; n < 4; n++) {
		bp(n, c + 8, 1, 1);
		DBG(w1, c + 8, w1_at, 1 << n);
		CHECK(!(last.flags & 1 << 16));
		NODBG(w1, c + 7); NODBG(w1, c + 9); NODBG(r1, c + 8);
		DBG(w8, c + 1, w8_at, 1 << n);  /* any byte of it */
		DBG(w8, c + 8, w8_at, 1 << n);
		NODBG(w8, c);
		DBG(inc1, c + 8, inc1_at, 1 << n);
		DBG(psh, c + 8, psh_at, 1 << n);
		off();
	}
	bp(0, c + 8, 3, 1);
	DBG(r1, c + 8, r1_at, 1); DBG(w1, c + 8, w1_at, 1); DBG(r8, c + 1, r8_at, 1);
	off();
	bp(1, c + 8, 1, 2); DBG(w1, c + 9, w1_at, 2); NODBG(w1, c + 10); off();
	bp(1, c + 8, 1, 4); DBG(w1, c + 11, w1_at, 2); NODBG(w1, c + 12); off();
	bp(1, c + 8, 1, 8); DBG(w1, c + 15, w1_at, 2); NODBG(w1, c + 16); NODBG(w1, c + 7); off();
	bp(1, c + 13, 1, 4); DBG(w1, c + 12, w1_at, 2); off();          /* low address bits are ignored */
	/* several at once */
	bp(0, c + 8, 1, 1); bp(2, c + 10, 3, 2); bp(3, c + 24, 1, 8);
	DBG(w8, c + 8, w8_at, 5);
	DBG(r8, c + 8, r8_at, 4);
	NODBG(w8, c + 16);
	off();
	/* a string stops behind the element */
	bp(0, c + 2, 1, 1);
	DBG(reps, c, reps_i, 1);
	EQ(cell[0] & 0, 0);
	bp(0, c + 3, 1, 1);
	WRDR(6, 0xffff0ff0);
	EQ(try_call(reps, c, 0), DB);
	EQ(last.ip, (ul)reps_at);
	off();
	bp(3, c + 1, 1, 1);
	DBG(insr, c, insr_i, 8);
	bp(3, c + 3, 1, 1);
	DBG(insr, c, insr_at, 8);
	bp(3, c + 1, 3, 1);
	DBG(outsr, c, outsr_i, 8);
	off();
	WRCR(4, RDCR(4) | CR4_OSFXSR);
	bp(0, c + 24, 3, 1);
	EQ(try_call(sse, c + 16, 0), DB);
	EQ(last.ip, (ul)sse_at - 1);
	off();
	/* the fault comes first, and then there was no access */
	bp(0, 0x40000000, 3, 1);
	WRDR(6, 0xffff0ff0);
	EQ(try_call(r1, 0x40000000, 0), PF);
	EQ(RDDR(6), 0xffff0ff0);
	off();
	/* the processor clears what matched before, and leaves the rest of DR6 to software */
	bp(2, c + 8, 1, 1);
	WRDR(6, 0xffff6ff0 | 1);
	EQ(try_call(w1, c + 8, 0), DB);
	EQ(RDDR(6), 0xffff6ff0 | 4);
	off();
	/* the global bit alone enables too; DR7's reserved bits */
	WRDR(0, c + 8);
	WRDR(7, 2 | 1 << 16);
	DBG(w1, c + 8, w1_at, 1);
	EQ(RDDR(7), 0x402 | 1 << 16);
	off();
}

static void code(void)
{
	bp(0, (ul)ex_at, 0, 1);
	DBG(ex, 0, ex_at, 1);
	CHECK(!(last.flags & 1 << 16));
	bp(1, (ul)ex_at2, 0, 1);
	DBG(ex, 0, ex_at, 1);
	off();
	bp(1, (ul)ex_at2, 0, 1);
	DBG(ex, 0, ex_at2, 2);
	off();
	/* RF lets one instruction pass */
	bp(0, (ul)rf_at, 0, 1);
	NODBG(rf, 0);
	bp(1, (ul)rf_at2, 0, 1);
	DBG(rf, 0, rf_at2, 2);
	off();
	/* general detect: a fault at the MOV, GD is cleared for the handler */
	WRDR(7, 0x2000);
	EQ(try_call(gd, 0, 0), DB);
	EQ(last.ip, (ul)gd);
	EQ(RDDR(7), 0x400);
	CHECK(RDDR(6) & BD);
	NODBG(gd, 0);
}

static void io(void)
{
	WRCR(4, RDCR(4) | CR4_DE);
	bp(2, PORT, 2, 1);
	DBG(inp, PORT, inp_at, 4);
	NODBG(inp, PORT + 1);
	DBG(inp4, PORT - 3, inp4_at, 4);
	DBG(insr, cell, insr_i, 4);             /* after each element */
	DBG(outsr, cell, outsr_i, 4);
	WRCR(4, RDCR(4) & ~(ul)CR4_DE);
	NODBG(insr, cell);
	off();
	bp(2, PORT, 2, 1);
	NODBG(inp, PORT);
	off();
}

void guest_main(void)
{
	*(volatile u64 *)(TSS + 0x24) = SCRATCH + 0x8000;       /* IST1: one stack pointer here is the operand */
	set_gate(DB, (ul)stubs + 16 * DB, 0x18, 14, 0, 1);
	WRDR(6, 0);
	EQ(RDDR(6), 0xffff0ff0);
	EQ(RDDR(7), 0x400);
	steps();
	data();
	code();
	io();
}
