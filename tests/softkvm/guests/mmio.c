/*
 * Memory operands that are a device, in every instruction form and width: the same code runs on RAM and on a page behind MMIO
 * exits that holds the same bytes; registers, flags and memory must come out the same. Operands lie inside the page, aligned and
 * not, and across its ends, half RAM and half device. Then ports, single and in strings.
 */
#include "rt.h"

#define DEVICE 0xd0000000ul
#define PORT 0x5000
#define V 0x8000000000ul        /* RAM, device, RAM */
#define REF 0x8000010000ul      /* RAM, RAM, RAM */
#define RAM(n) (SCRATCH + 0x1000ul * (n))
static u64 out[2][32];

/* rdi: operand, rsi: where the results go, r8: a second, plain operand. */
#define M(name, code) SNIP(name, \
	"mov $0x8877665544332211, %rax; mov $0x1020304050607080, %rbx; mov $0x0103070f1f3f7f01, %rcx; mov $0x7766554433221100, %rdx\n" \
	"mov $0xdeadbeefcafef00d, %r9; mov %rdi, %r10; mov %rsi, %r11; lea 128(%rsi), %r8; stc\n" code "\n" \
	"pushfq; popq 32(%r11); mov %rax, (%r11); mov %rbx, 8(%r11); mov %rcx, 16(%r11); mov %rdx, 24(%r11); mov %r9, 40(%r11)\n" \
	"sub %r10, %rdi; mov %rdi, 48(%r11); mov %r10, %rdi; mov %r11, %rsi")
#define X(name, code) M(name, code "; movups %xmm0, 64(%r11)")
#define Y(name, code) M(name, code "; vmovups %ymm0, 64(%r11)")

#define FORMS \
	F(mov_r8, M, "mov (%rdi), %al") F(mov_r16, M, "mov (%rdi), %ax") F(mov_r32, M, "mov (%rdi), %eax") F(mov_r64, M, "mov (%rdi), %rax") \
	F(mov_ah, M, "mov (%rdi), %ah") F(st_ah, M, "mov %ah, (%rdi)") \
	F(mov_w8, M, "mov %al, (%rdi)") F(mov_w16, M, "mov %ax, (%rdi)") F(mov_w32, M, "mov %eax, (%rdi)") F(mov_w64, M, "mov %rax, (%rdi)") \
	F(mov_i8, M, "movb $0x5a, (%rdi)") F(mov_i16, M, "movw $0x5aa5, (%rdi)") F(mov_i32, M, "movl $0x5aa51234, (%rdi)") \
	F(mov_i64, M, "movq $-2, (%rdi)") \
	F(movzx8, M, "movzbl (%rdi), %eax") F(movzx8q, M, "movzbq (%rdi), %rax") F(movzx16, M, "movzwl (%rdi), %eax") \
	F(movsx8, M, "movsbw (%rdi), %ax") F(movsx8q, M, "movsbq (%rdi), %rax") F(movsx16, M, "movswq (%rdi), %rax") \
	F(movsxd, M, "movslq (%rdi), %rax") F(movnti_, M, "movnti %rax, (%rdi)") \
	F(xchg8, M, "xchg %al, (%rdi)") F(xchg16, M, "xchg %ax, (%rdi)") F(xchg32, M, "xchg %eax, (%rdi)") F(xchg64, M, "xchg %rax, (%rdi)") \
	F(add_m8, M, "add %al, (%rdi)") F(add_m16, M, "add %ax, (%rdi)") F(add_m32, M, "add %eax, (%rdi)") F(add_m64, M, "add %rax, (%rdi)") \
	F(add_r64, M, "add (%rdi), %rax") F(add_i, M, "addl $0x7fffffff, (%rdi)") F(adc_m, M, "adc %rax, (%rdi)") F(sbb_m, M, "sbb %eax, (%rdi)") \
	F(or_m, M, "or %eax, (%rdi)") F(and_m, M, "and %ax, (%rdi)") F(sub_m, M, "sub %rax, (%rdi)") F(xor_m, M, "xor %al, (%rdi)") \
	F(cmp_m, M, "cmp %rax, (%rdi)") F(cmp_r, M, "cmp (%rdi), %eax") F(test_m, M, "test %rax, (%rdi)") F(test_i, M, "testb $0x55, (%rdi)") \
	F(inc_m, M, "incb (%rdi)") F(dec_m, M, "decl (%rdi)") F(neg_m, M, "negw (%rdi)") F(not_m, M, "notq (%rdi)") \
	F(lock_add, M, "lock add %eax, (%rdi)") F(lock_inc, M, "lock incq (%rdi)") F(lock_or, M, "lock orb $0x81, (%rdi)") \
	F(xadd8, M, "xadd %al, (%rdi)") F(xadd64, M, "lock xadd %rax, (%rdi)") \
	F(cx_miss, M, "cmpxchg %ebx, (%rdi)") F(cx_hit, M, "mov (%rdi), %rax; lock cmpxchg %rbx, (%rdi)") F(cx8b, M, "lock cmpxchg8b (%rdi)") \
	F(cx8b_hit, M, "mov (%rdi), %eax; mov 4(%rdi), %edx; cmpxchg8b (%rdi)") \
	F(bt_m, M, "mov $37, %ecx; bt %ecx, (%rdi)") F(bts_i, M, "btsl $7, (%rdi)") F(btr_r, M, "mov $70, %ecx; btr %rcx, (%rdi)") F(btc_l, M, "lock btcq $3, (%rdi)") \
	F(shl_m, M, "shlb %cl, (%rdi); test %eax, %eax") F(sar_m, M, "sarl $5, (%rdi); test %eax, %eax") F(rcr_m, M, "rcrw $1, (%rdi); test %eax, %eax") F(rol_m, M, "rolq $9, (%rdi); test %eax, %eax") \
	F(shld_m, M, "shld $5, %rax, (%rdi); test %eax, %eax") F(mul_m, M, "mulq (%rdi); test %eax, %eax") F(imul_m, M, "imul (%rdi), %eax; test %eax, %eax") F(imul3, M, "imul $77, (%rdi), %rax; test %eax, %eax") \
	F(div_m, M, "orb $0x80, 7(%rdi); xor %edx, %edx; divq (%rdi); test %eax, %eax") F(idiv_m, M, "orb $1, (%rdi); mov $5, %eax; cltd; idivl (%rdi); test %eax, %eax") \
	F(setc_m, M, "setc (%rdi)") F(cmov_m, M, "cmovc (%rdi), %rax") F(cmov_not, M, "cmovnc (%rdi), %eax") \
	F(push_m, M, "pushq (%rdi); pop %rax") F(pop_m, M, "push %rbx; popq (%rdi)") \
	F(push_st, M, "mov %rsp, %rax; lea 8(%rdi), %rsp; push %rbx; mov %rax, %rsp; xor %eax, %eax") \
	F(pop_st, M, "mov %rsp, %rdx; mov %rdi, %rsp; pop %rax; mov %rdx, %rsp; xor %edx, %edx") \
	F(popcnt_m, M, "popcnt (%rdi), %rax") F(bsf_m, M, "orb $8, (%rdi); bsf (%rdi), %rax; test %eax, %eax") F(crc_m, M, "crc32q (%rdi), %rax") \
	F(lods, M, "mov %rdi, %rsi; lodsl; mov %r11, %rsi") F(stos, M, "stosq") F(scas, M, "scasl") \
	F(movs_out, M, "mov %r8, %rsi; movsq") F(movs_in, M, "mov %rdi, %rsi; mov %r8, %rdi; movsq; mov %r10, %rdi; mov (%r8), %rax") \
	F(cmps, M, "mov %r8, %rsi; cmpsl") \
	F(rep_stos, M, "mov $5, %ecx; rep stosw") F(rep_movs_out, M, "mov %r8, %rsi; mov $3, %ecx; rep movsq") \
	F(rep_movs_in, M, "mov %rdi, %rsi; mov %r8, %rdi; mov $7, %ecx; rep movsl; mov %r10, %rdi; mov (%r8), %rax; mov 16(%r8), %rbx") \
	F(rep_movs_own, M, "mov %rdi, %rsi; add $8, %rdi; mov $13, %ecx; rep movsb") \
	F(rep_movs_down, M, "mov %rdi, %rsi; add $24, %rsi; lea 16(%rdi), %rdi; mov $3, %ecx; std; rep movsq; cld") \
	F(rep_lods, M, "mov %rdi, %rsi; mov $4, %ecx; rep lodsw; mov %r11, %rsi") F(repe_cmps, M, "mov %rdi, %rsi; mov $9, %ecx; repe cmpsb; mov %r11, %rsi") \
	F(repne_scas, M, "mov 9(%rdi), %al; mov $20, %ecx; repne scasb") \
	F(lea_call, M, "lea 1f(%rip), %rax; mov %rax, (%rdi); jmp *(%rdi); ud2; 1: xor %eax, %eax; mov %rax, (%rdi)") \
	F(sse_ld16, X, "movups (%rdi), %xmm0") F(sse_st16, X, "movups 32(%r8), %xmm0; movups %xmm0, (%rdi)") F(sse_movq, X, "movq (%rdi), %xmm0; movq %xmm0, 8(%rdi)") \
	F(sse_movd, X, "movd (%rdi), %xmm0; movd %xmm0, 4(%rdi)") F(sse_add, X, "pxor %xmm0, %xmm0; movups (%rdi), %xmm1; paddb %xmm1, %xmm0") \
	F(sse_movhps, X, "xorps %xmm0, %xmm0; movhps (%rdi), %xmm0") F(sse_cvt, X, "pxor %xmm0, %xmm0; cvtsi2sdq (%rdi), %xmm0") \
	F(mmx_, M, "movq (%rdi), %mm0; movq %mm0, 8(%rdi); emms") F(x87_ild, M, "fildll (%rdi); fistpll 8(%rdi)") \
	F(x87_tb, M, "fildl (%rdi); fstpt (%rdi); fldt (%rdi); fistpll 16(%rdi)") F(stmx, M, "stmxcsr (%rdi)") F(fnstcw_, M, "fnstcw (%rdi)") \
	F(fnstenv_, M, "fninit; fnstenv (%rdi)") F(sgdt_, M, "sgdt (%rdi)") F(smsw_, M, "smsw (%rdi)") F(mov_sreg, M, "mov %ds, (%rdi)")
#define MOVBE_FORMS F(movbe_r, M, "movbe (%rdi), %rax") F(movbe_w, M, "movbe %eax, (%rdi)")
#define AVX_FORMS \
	F(avx_ld32, Y, "vmovups (%rdi), %ymm0") F(avx_st32, Y, "vmovups 32(%r8), %ymm0; vmovups %ymm0, (%rdi)") \
	F(avx_op, Y, "vpxor %ymm0, %ymm0, %ymm0; vpaddd (%rdi), %ymm0, %ymm0") F(avx_bc, Y, "vbroadcastss (%rdi), %ymm0") \
	F(avx_mask, Y, "vpcmpeqd %ymm1, %ymm1, %ymm1; vpsrlq $32, %ymm1, %ymm1; vpmaskmovd (%rdi), %ymm1, %ymm0; vpmaskmovd %ymm0, %ymm1, (%rdi)")
#define ALIGNED_FORMS \
	F(cx16, M, "cmpxchg16b (%rdi)") F(cx16_hit, M, "mov (%rdi), %rax; mov 8(%rdi), %rdx; lock cmpxchg16b (%rdi)") \
	F(movaps_, X, "movaps (%rdi), %xmm0; movaps %xmm0, 16(%rdi)") F(movntdq_, X, "movups 32(%r8), %xmm0; movntdq %xmm0, (%rdi)") \
	F(paddd_m, X, "pxor %xmm0, %xmm0; paddd (%rdi), %xmm0")
#define F(name, kind, code) kind(f_##name, code);
FORMS MOVBE_FORMS AVX_FORMS ALIGNED_FORMS
#undef F
#define F(name, kind, code) { f_##name, #name },
static const struct form { const u8 *fn; const char *name; } forms[] = { FORMS }, movbe_forms[] = { MOVBE_FORMS }, avx_forms[] = { AVX_FORMS }, aligned_forms[] = { ALIGNED_FORMS };
M(f_fxsave, "fxsave (%rdi)");
M(f_fxrstor, "fninit; fxsave (%rdi); fxrstor (%rdi)");

static void map(void)
{
	u64 *pml4 = (u64 *)(RDCR(3) & ~0xffful), *pdpt = (u64 *)(TABLES), *pd = pdpt + 512, *pt = pd + 512, *pd3 = pt + 512;
	u64 *low = (u64 *)(pml4[0] & ~0xfffull);

	pml4[1] = (ul)pdpt | 7;
	pdpt[0] = (ul)pd | 7;
	pd[0] = (ul)pt | 7;
	for (int i = 0; i < 3; i++) {
		pt[i] = RAM(i) | 7;
		pt[16 + i] = RAM(3 + i) | 7;
	}
	pt[1] = DEVICE | 7;
	low[3] = (ul)pd3 | 7;
	pd3[0x80] = DEVICE | 0x87;
	WRCR(3, RDCR(3));
}

static void fill(ul base, ul at)
{
	for (ul a = (at & ~7ul) - 64; a < at + 96; a += 8)
		*(volatile u64 *)(base + a) = (a * 0x9e3779b97f4a7c15) ^ 0x0102030405060708;
}

static void one(const struct form *f, int n, ul at)
{
	for (int k = 0; k < 2; k++) {
		fill(k ? V : REF, at);
		for (int i = 0; i < 32; i++)
			out[k][i] = i * 0x0123456789abcdef;
		EQT(n << 16 | at, try_call(f->fn, (k ? V : REF) + at, (ul)out[k]), -1);
	}
	for (int i = 0; i < 32; i++)
		EQT(n << 16 | i, out[1][i], out[0][i]);
	for (ul a = (at & ~7ul) - 64; a < at + 96; a += 8)
		EQT(n << 16 | a, *(volatile u64 *)(V + a), *(volatile u64 *)(REF + a));
}

static void all(const struct form *f, int n, int base, int aligned)
{
	static const u16 at[] = { 4096 + 128, 4096 + 131, 4096 + 135, 4096 - 1, 4096 - 4, 4096 - 7, 8192 - 1, 8192 - 3, 8192 - 6 };
	static const u16 at_aligned[] = { 4096 + 128, 4096 + 144 };

	for (int i = 0; i < n; i++)
		for (int k = 0; k < (aligned ? 2 : 9); k++)
			one(&f[i], base + i, aligned ? at_aligned[k] : at[k]);
}

static void fx(void)
{
	for (int k = 0; k < 2; k++) {
		ul p = (k ? V : REF) + 4096 + 512;

		EQ(try_call(f_fxsave, p, (ul)out[0]), -1);
		EQ(*(volatile u16 *)p, 0x37f);
		EQ(*(volatile u32 *)(p + 24) & ~0x3fu, 0x1f80);
		EQ(try_call(f_fxrstor, p, (ul)out[0]), -1);
	}
}

/* -- ports -------------------------------------------------------------------------------------- */
static inline void insb(u16 port, ul to, ul n) { __asm__ volatile("rep insb" : "+D"(to), "+c"(n) : "d"(port) : "memory"); }
static inline void outsb(u16 port, ul from, ul n) { __asm__ volatile("rep outsb" : "+S"(from), "+c"(n) : "d"(port) : "memory"); }

static void ports(void)
{
	volatile u8 *dev = (volatile u8 *)(DEVICE + 4096), *m = (volatile u8 *)RAM(0);
	u16 w;
	ul to, n;

	outb(PORT, 0x12);
	__asm__ volatile("outw %0, %1" :: "a"((u16)0x5634), "Nd"((u16)(PORT + 1)));
	outl(PORT + 4, 0x89abcdef);
	EQ(inb(PORT), 0x12);
	EQ(inl(PORT), 0x00563412);
	__asm__ volatile("inw %1, %0" : "=a"(w) : "Nd"((u16)(PORT + 4)));
	EQ(w, 0xcdef);
	EQ(inl(PORT + 4), 0x89abcdef);
	{
		u64 a = ~0ull;

		__asm__ volatile("inb %1, %%al" : "+a"(a) : "d"((u16)PORT)); EQ(a, 0xffffffffffffff12);
		__asm__ volatile("inl %1, %%eax" : "+a"(a) : "d"((u16)PORT)); EQ(a, 0x563412);
	}
	EQ(inb(0x6000), 0xff);
	/* strings over the end of a page */
	for (int i = 0; i < 8192; i++)
		m[i] = 0;
	dev[0x80] = 0;
	insb(PORT + 0x80, RAM(0) + 4090, 12);
	for (int i = 0; i < 12; i++)
		EQT(i, m[4090 + i], i + 1);
	EQ(m[4089] | m[4102], 0);
	dev[0x80] = 0;
	insb(PORT + 0x80, RAM(0), 5000);        /* more than one batch */
	EQ(m[4999], 5000 & 0xff);
	EQ(m[4096], 4097 & 0xff);
	EQ(m[5000], 0);
	dev[0x100] = 0;
	outsb(PORT + 0x10, RAM(0) + 1, 5000);
	EQ(dev[0x100], 5000 & 0xff);
	EQ(dev[0x10], 0);
	outsb(PORT + 0x10, RAM(0), 1);
	EQ(dev[0x10], 1);
	/* downwards, by words, and a word over the end of the page */
	to = RAM(0) + 4097; n = 3;
	dev[0x80] = 0; dev[0x81] = 0xee;
	__asm__ volatile("std; rep insw; cld" : "+D"(to), "+c"(n) : "d"((u16)(PORT + 0x80)) : "memory");
	EQ(to, RAM(0) + 4091); EQ(n, 0);
	EQ(*(volatile u16 *)(RAM(0) + 4097), 0xee01); EQ(*(volatile u16 *)(RAM(0) + 4095), 0xee02); EQ(*(volatile u16 *)(RAM(0) + 4093), 0xee03);
	/* from and to the device's memory */
	dev[0x80] = 0;
	insb(PORT + 0x80, DEVICE + 0x200, 40);
	for (int i = 0; i < 40; i++)
		EQT(i, *(volatile u8 *)(DEVICE + 0x200 + i), i + 1);
	dev[0x100] = 0;
	outsb(PORT + 0x11, DEVICE + 0x200, 40);
	EQ(dev[0x100], 40);
	EQ(dev[0x11], 40);
	/* What a port string read of a device must not answer the next load of the same address. */
	*(volatile u8 *)(DEVICE + 0x300) = 0x11;
	outsb(PORT + 0x12, DEVICE + 0x300, 1);
	outb(PORT + 0x12, 0x22);
	EQ(*(volatile u8 *)(DEVICE + 0x300), 0x11);
	*(volatile u8 *)(DEVICE + 0x300) = 0x33;
	outsb(PORT + 0x12, DEVICE + 0x300, 1);
	EQ(dev[0x12], 0x33);
	EQ(*(volatile u8 *)(DEVICE + 0x300), 0x33);
	insb(PORT, RAM(0), 0);
}

/* A string that faults in its middle leaves the registers at the element. */
SNIP(ins_fault, "mov %rdi, %rdi; mov %rsi, %rcx; mov $0x5080, %edx\n.globl ins_at\nins_at: rep insb");
extern u8 ins_at[];
static void faults(void)
{
	u64 *pt = (u64 *)TABLES + 1024;
	volatile u8 *dev = (volatile u8 *)(DEVICE + 4096);

	pt[3] = 0;
	dev[0x80] = 0;
	EQ(try_call(ins_fault, V + 3 * 4096 - 5, 10), PF);
	EQ(last.ip, (ul)ins_at);
	EQ(last.cr2, V + 3 * 4096);
	for (int i = 0; i < 5; i++)
		EQ(*(volatile u8 *)(V + 3 * 4096 - 5 + i), i + 1);
	if (param[1])           /* KVM reads ahead */
		EQ(dev[0x80], 5);
}

void guest_main(void)
{
	u32 r[4];

	WRCR(4, RDCR(4) | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE);
	WRCR(0, RDCR(0) & ~(ul)(CR0_EM | CR0_TS));
	__asm__ volatile("fninit");
	map();
	ports();
	faults();
	all(forms, sizeof forms / sizeof *forms, 0, 0);
	all(aligned_forms, sizeof aligned_forms / sizeof *aligned_forms, 300, 1);
	fx();
	cpuid(1, 0, r);
	if (r[2] & 1 << 22)
		all(movbe_forms, 2, 250, 0);
	cpuid(7, 0, r);
	if (r[1] & 1 << 5) {
		__asm__ volatile("xsetbv" :: "a"(7), "d"(0), "c"(0));
		all(avx_forms, sizeof avx_forms / sizeof *avx_forms, 200, 0);
	}
}
