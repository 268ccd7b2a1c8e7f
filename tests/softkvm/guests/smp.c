/*
 * Four processors: start by INIT and SIPI, IPIs with every shorthand, locked operations, page-split locks, CMPXCHG16B, TLB
 * shoot-down, code that another processor changes, wake-up from HLT.
 */
#include "rt.h"

#define LAPIC 0xfee00000ul
enum { ID = 0x20, EOI = 0xb0, LDR = 0xd0, DFR = 0xe0, SVR = 0xf0, ICR = 0x300, ICR2 = 0x310 };
#define N 4
#define TRAMP 0x9000
#define ROUNDS 3000
static u32 ap(u32 r) { return rd32(LAPIC + r); }
static void aw(u32 r, u32 v) { wr32(LAPIC + r, v); }

static volatile u32 alive, job, done[N], got[N], sipi_cs[N];
static volatile u64 counter __attribute__((aligned(64))), pair[2] __attribute__((aligned(16)));
static u8 split_area[8192] __attribute__((aligned(4096)));
#define SPLIT ((volatile u64 *)(split_area + 4092))
static volatile u32 byte_area[16];
static u8 ap_stack[N][8192] __attribute__((aligned(16), used));
volatile u64 ap_cr3, ap_next = 1;
void ap_main(ul n);

/* Real mode at TRAMP to 64-bit; the number comes from a shared counter. */
__asm__(".text\n.globl tramp, tramp_end\n.code16\ntramp:\n"
	"cli; mov %cs, %ax; mov %ax, %ds; mov %ax, 0xf0\n"
	"lgdtl %cs:gdtr16 - tramp\n"
	"mov $0x6a0, %eax; mov %eax, %cr4\n"
	"mov %cs:cr3v - tramp, %eax; mov %eax, %cr3\n"
	"mov $0xc0000080, %ecx; rdmsr; or $0x900, %eax; wrmsr\n"
	"mov $0x80010031, %eax; mov %eax, %cr0\n"
	"ljmpl $0x18, $0x9000 + long64 - tramp\n"
	".code64\nlong64: mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
	"mov $1, %edi; lock xadd %rdi, ap_next\n"
	"mov %edi, %eax; inc %eax; shl $13, %eax; lea ap_stack(%rax), %rsp\n"
	"mov $ap_main, %rax; call *%rax\n"
	".globl cr3v\ngdtr16: .word 0x4f; .long 0x1000\ncr3v: .long 0\ntramp_end:\n");
extern u8 tramp[], tramp_end[], cr3v[];

/* -- work, done by all four at once ---------------------------------------------------------------- */
static void w_locked(ul n)
{
	for (int i = 0; i < ROUNDS; i++) {
		__asm__ volatile("lock incq %0" : "+m"(counter) :: "memory");
		__asm__ volatile("lock addl %1, %0" : "+m"(byte_area[0]) : "r"(1u) : "memory");
		__asm__ volatile("lock incw %0" : "+m"(*(volatile u16 *)((u8 *)byte_area + 5)) :: "memory");
	}
}

static void w_cas(ul n)
{
	for (int i = 0; i < ROUNDS; i++) {
		u64 a = pair[0], d = pair[1], b, c;
		u8 ok;

		do {
			b = a + 1;
			c = d + 3;
			__asm__ volatile("lock cmpxchg16b %1; setz %0" : "=q"(ok), "+m"(*(volatile u8 (*)[16])pair), "+a"(a), "+d"(d) : "b"(b), "c"(c) : "memory");
		} while (!ok);
		if (d != a * 3)
			got[n]++;       /* a torn pair was seen */
	}
}

static void w_split(ul n)
{
	for (int i = 0; i < 300; i++)
		__asm__ volatile("lock incq %0" : "+m"(*SPLIT) :: "memory");
}

/* XCHG as a spin lock around plain memory. */
static volatile u32 lock_word, guarded;
static void w_spin(ul n)
{
	for (int i = 0; i < 1000; i++) {
		u32 v = 1;

		for (;;) {
			__asm__ volatile("xchg %0, %1" : "+r"(v), "+m"(lock_word) :: "memory");
			if (!v)
				break;
			__asm__ volatile("pause");
			v = 1;
		}
		guarded = guarded + 1;
		lock_word = 0;
	}
}

/* Store buffering with MFENCE in between: both cannot read 0. */
static volatile u32 sb[2][16], sb_turn, sb_got[2][400];
static void w_fence(ul n)
{
	if (n > 1)
		return;
	for (u32 i = 0; i < 400; i++) {
		__asm__ volatile("lock incl %0" : "+m"(sb_turn) :: "memory");
		while (sb_turn < (i + 1) * 2)
			__asm__ volatile("pause");
		sb[n][0] = i + 1;
		__asm__ volatile("mfence" ::: "memory");
		sb_got[n][i] = sb[!n][0];
	}
}

static void (*const work[])(ul) = { 0, w_locked, w_cas, w_split, w_spin, w_fence };

/* -- interrupts ------------------------------------------------------------------------------------- */
static volatile u32 irqs[N], nmis[N], shot[N], ack_shoot;
static void on_50(void) { irqs[ap(ID) >> 24]++; aw(EOI, 0); }
static void on_nmi(void) { nmis[ap(ID) >> 24]++; }
#define PAGE 0x8000000000ul
static void on_shoot(void)
{
	invlpg(PAGE);
	__asm__ volatile("lock incl %0" : "+m"(ack_shoot) :: "memory");
	aw(EOI, 0);
}

void ap_main(ul n)
{
	struct { u16 limit; ul base; } __attribute__((packed)) r = { 0xfff, (ul)idt };
	u32 seen = 0, id;

	__asm__ volatile("lidt %0" :: "m"(r));
	id = ap(ID) >> 24;
	got[id] = 0;
	aw(SVR, 0x1ff);
	aw(LDR, 1u << (24 + id));
	__asm__ volatile("lock incl %0" : "+m"(alive) :: "memory");
	for (;;) {
		while (job == seen)
			__asm__ volatile("sti; pause; cli" ::: "memory");
		seen = job;
		if (seen == 100) {      /* sleep until an interrupt comes */
			done[id] = 100;
			__asm__ volatile("sti; hlt; cli" ::: "memory");
			done[id] = 101;
		} else if (seen == 101) {       /* watch a page that changes below */
			while (job == 101) {
				__asm__ volatile("sti; nop; cli" ::: "memory");
				shot[id] = *(volatile u32 *)PAGE;
				done[id] = 102;
			}
		} else if (seen == 102) {       /* run code that is patched meanwhile */
			int (*f)(void) = (int (*)(void))SCRATCH;

			while (job == 102) {
				got[id] = (u32)f();
				done[id] = 103;
				__asm__ volatile("cpuid" :: "a"(0) : "rbx", "rcx", "rdx", "memory");
			}
		} else {
			work[seen](id);
		}
		__asm__ volatile("mfence" ::: "memory");
		done[id] = seen == 100 ? 101 : seen;
	}
}

static void all_do(u32 j)
{
	job = j;
	if (j < sizeof work / sizeof *work)
		work[j](0);
	for (int i = 1; i < N; i++)
		while (done[i] != j)
			__asm__ volatile("pause");
}

static void map_all(void)
{
	u64 *pml4 = (u64 *)(RDCR(3) & ~0xffful), *low = (u64 *)(pml4[0] & ~0xfffull), *pd = (u64 *)TABLES;

	for (u64 i = 0; i < 512; i++)
		pd[i] = (3ull << 30) + (i << 21) + 0x9f;
	low[3] = TABLES | 7;
	pml4[1] = (TABLES + 0x1000) | 7;
	*(u64 *)(TABLES + 0x1000) = (TABLES + 0x2000) | 7;
	*(u64 *)(TABLES + 0x2000) = (TABLES + 0x3000) | 7;
	*(u64 *)(TABLES + 0x3000) = 0x700000 | 3;
	WRCR(3, RDCR(3));
}

static void start(void)
{
	u32 *p;

	for (u8 *a = tramp, *b = (u8 *)TRAMP; a < tramp_end; a++)
		*b++ = *a;
	p = (u32 *)(ul)(TRAMP + (cr3v - tramp));
	*p = (u32)RDCR(3);
	*(volatile u16 *)(TRAMP + 0xf0) = 0;
	aw(SVR, 0x1ff);
	aw(LDR, 1u << 24);
	aw(DFR, ~0u);
	/* A SIPI before INIT wakes nobody. */
	aw(ICR, 0xc4600 | TRAMP >> 12);
	for (u64 t = rdtsc() + 2000000; rdtsc() < t;)
		;
	EQ(alive, 0);
	aw(ICR, 0xc4500);
	for (u64 t = rdtsc() + 1000000; rdtsc() < t;)
		;
	aw(ICR, 0xc4600 | TRAMP >> 12);
	aw(ICR, 0xc4600 | TRAMP >> 12);         /* the second one changes nothing */
	while (alive != N - 1)
		__asm__ volatile("pause");
	EQ(*(volatile u16 *)(TRAMP + 0xf0), TRAMP >> 4);
	EQ(ap_next, N);
}

static void settle(volatile u32 *p, u32 a, u32 b, u32 c)
{
	for (u64 t = rdtsc() + 8000000000ull; rdtsc() < t && !(p[1] == a && p[2] == b && p[3] == c);)
		__asm__ volatile("pause");
	EQ(p[1], a); EQ(p[2], b); EQ(p[3], c);
}

static void ipis(void)
{
	handlers[0x50] = on_50;
	aw(ICR, 0xc4050); settle(irqs, 1, 1, 1); EQ(irqs[0], 0);
	aw(ICR2, 2 << 24); aw(ICR, 0x4050); settle(irqs, 1, 2, 1);
	aw(ICR2, 0x0a << 24); aw(ICR, 0x4850); settle(irqs, 2, 2, 2);   /* logical 1 and 3 */
	aw(ICR2, 0xff << 24); aw(ICR, 0x4050); settle(irqs, 3, 3, 3);
	__asm__ volatile("sti; nop; nop; cli" ::: "memory");
	EQ(irqs[0], 1);
	aw(ICR, 0x84050); settle(irqs, 4, 4, 4);
	__asm__ volatile("sti; nop; nop; cli" ::: "memory");
	EQ(irqs[0], 2);
	for (int i = 0; i < 12; i++) {          /* lowest priority: one of them each time */
		aw(ICR2, 0x0e << 24);
		aw(ICR, 0x4950);
		for (u64 t = rdtsc() + 4000000000ull; rdtsc() < t && irqs[1] + irqs[2] + irqs[3] != 13u + (u32)i;)
			;
		EQ(irqs[1] + irqs[2] + irqs[3], 13 + i);
	}
	handlers[NMI] = on_nmi;
	aw(ICR, 0xc4400); settle(nmis, 1, 1, 1);
	EQ(nmis[0], 0);
}

static void idle(void)
{
	u64 t;

	job = 100;
	for (int i = 1; i < N; i++)
		while (done[i] != 100)
			__asm__ volatile("pause");
	t = rdtsc();
	aw(ICR, 0xc4050);
	for (int i = 1; i < N; i++)
		while (done[i] != 101)
			__asm__ volatile("pause");
	CHECK(rdtsc() - t < 8000000000ull);
}

/* Without the IPI the others may use the old page; after it they must not. */
static void shootdown(void)
{
	volatile u64 *pte = (volatile u64 *)(TABLES + 0x3000);

	handlers[0x52] = on_shoot;
	*(volatile u32 *)0x700000 = 0;
	job = 101;
	for (int i = 1; i < N; i++)
		while (done[i] != 102)
			__asm__ volatile("pause");
	for (u32 k = 1; k <= 20; k++) {
		ul page = 0x700000 + 0x1000 * (k & 1);

		*(volatile u32 *)page = k;
		*pte = page | 3;
		invlpg(PAGE);
		ack_shoot = 0;
		aw(ICR, 0xc4052);
		while (ack_shoot != N - 1)
			__asm__ volatile("pause");
		for (int i = 1; i < N; i++)
			done[i] = 0;
		for (int i = 1; i < N; i++)
			while (done[i] != 102)
				__asm__ volatile("pause");
		for (int i = 1; i < N; i++) /* a round that began after the shoot-down */
			done[i] = 0;
		for (int i = 1; i < N; i++)
			while (done[i] != 102)
				__asm__ volatile("pause");
		for (int i = 1; i < N; i++)
			EQT(k, shot[i], k);
	}
}

/* mov $imm, %eax; ret: the immediate is replaced while they call it. */
static void patching(void)
{
	volatile u8 *c = (volatile u8 *)SCRATCH;

	c[5] = 0xc3;
	*(volatile u32 *)(c + 1) = 1;
	c[0] = 0xb8;
	job = 102;
	for (u32 k = 1; k <= 50; k++) {
		*(volatile u32 *)(c + 1) = k * 0x01010101;
		for (int r = 0; r < 2; r++) {
			for (int i = 1; i < N; i++)
				done[i] = 0;
			for (int i = 1; i < N; i++)
				while (done[i] != 103)
					__asm__ volatile("pause");
		}
		for (int i = 1; i < N; i++)
			EQT(k, got[i], k * 0x01010101);
	}
}

void guest_main(void)
{
	map_all();
	start();
	all_do(1);
	EQ(counter, N * ROUNDS);
	EQ(byte_area[0], N * ROUNDS);
	EQ(*(volatile u16 *)((u8 *)byte_area + 5), N * ROUNDS);
	all_do(2);
	EQ(pair[0], N * ROUNDS);
	EQ(pair[1], N * ROUNDS * 3);
	for (int i = 0; i < N; i++)
		EQ(got[i], 0);
	all_do(3);
	EQ(*SPLIT, N * 300);
	all_do(4);
	EQ(guarded, N * 1000);
	all_do(5);
	for (int i = 0; i < 400; i++)
		CHECK(sb_got[0][i] == (u32)i + 1 || sb_got[1][i] == (u32)i + 1);
	ipis();
	idle();
	shootdown();
	patching();
}
