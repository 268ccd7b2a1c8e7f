/* 8259A, I/O APIC, local APIC (xAPIC and x2APIC), 8254, MSI, irqfd with resampling: as their data sheets and SDM vol. 3 ch. 11. */
#include "rt.h"

#define LAPIC 0xfee00000ul
#define IOAPIC 0xfec00000ul
enum { ID = 0x20, VER = 0x30, TPR = 0x80, PPR = 0xa0, EOI = 0xb0, LDR = 0xd0, DFR = 0xe0, SVR = 0xf0, ISR = 0x100, TMR = 0x180, IRR = 0x200,
       ESR = 0x280, ICR = 0x300, ICR2 = 0x310, LVTT = 0x320, LVT0 = 0x350, LVT1 = 0x360, LVTE = 0x370, TMICT = 0x380, TMCCT = 0x390, TDCR = 0x3e0 };
static u32 ap(u32 r) { return rd32(LAPIC + r); }
static void aw(u32 r, u32 v) { wr32(LAPIC + r, v); }
static int bit(u32 base, u32 v) { return ap(base + (v >> 5) * 0x10) >> (v & 31) & 1; }
static u32 io(u32 r) { wr32(IOAPIC, r); return rd32(IOAPIC + 0x10); }
static void iow(u32 r, u32 v) { wr32(IOAPIC, r); wr32(IOAPIC + 0x10, v); }
static void rte(u32 pin, u64 v) { iow(0x11 + 2 * pin, v >> 32); iow(0x10 + 2 * pin, (u32)v); }

static volatile u32 hits[256], order[64], norder, seen, seen2;
static void sti(void) { __asm__ volatile("sti; nop; nop" ::: "memory"); }
static void cli(void) { __asm__ volatile("cli" ::: "memory"); }
static void window(void) { sti(); cli(); }
static void delay(u64 n) { for (u64 t = rdtsc() + n; rdtsc() < t;) __asm__ volatile("pause"); }
/* What another thread of the host brings takes as long as that host lets it: some ten seconds at most. */
static void await(unsigned vector, u64 n) { for (u64 t = rdtsc() + (30ull << 30); hits[vector] < n && rdtsc() < t;) window(); }
/* HLT until `vec` was seen n times; gives up after a while (host-side test timeout is the last resort). */
static void wait(u32 vec, u32 n) { cli(); while (hits[vec] < n) __asm__ volatile("sti; hlt; cli" ::: "memory"); }

static void note(u32 v) { hits[v]++; if (norder < 64) order[norder++] = v; }
#define APIC_HANDLER(v) static void on_##v(void) { note(0x##v); aw(EOI, 0); }
APIC_HANDLER(41) APIC_HANDLER(45) APIC_HANDLER(52) APIC_HANDLER(61) APIC_HANDLER(62) APIC_HANDLER(70) APIC_HANDLER(71) APIC_HANDLER(fe)
/* Looks at the registers while in service, then lets others in before and after its EOI. */
static void on_51(void)
{
	note(0x51);
	seen = bit(ISR, 0x51) | bit(IRR, 0x51) << 1 | ap(PPR) << 8;
	sti();
	cli();
	note(0x1);
	aw(EOI, 0);
	sti();
	cli();
	note(0x2);
}

static void clear(void) { for (int i = 0; i < 256; i++) hits[i] = 0; norder = 0; }

static void map_chips(void)
{
	u64 *pml4 = (u64 *)(RDCR(3) & ~0xffful), *low = (u64 *)(pml4[0] & ~0xfffull), *pd = (u64 *)TABLES;

	for (u64 i = 0; i < 512; i++)
		pd[i] = (3ull << 30) + (i << 21) + 0x9f;
	low[3] = TABLES | 7;
	WRCR(3, RDCR(3));
}

static void ipis(void)
{
	EQ(ap(ID), 0);
	EQ(ap(VER) & 0xff, 0x14);
	EQ(ap(VER) >> 16 & 0xff, 5);
	EQ(ap(SVR), 0xff);
	EQ(ap(LVTT), 0x10000);
	EQ(ap(DFR), 0xffffffff);
	aw(SVR, 0x1ff);
	EQ(ap(SVR), 0x1ff);
	aw(ICR, 0x40041);
	EQ(bit(IRR, 0x41), 1);
	EQ(hits[0x41], 0);
	window();
	EQ(hits[0x41], 1);
	EQ(bit(IRR, 0x41) | bit(ISR, 0x41), 0);
	aw(ICR, 0x40041); aw(ICR, 0x40041);     /* one bit holds one request */
	window();
	EQ(hits[0x41], 2);
	aw(ICR2, 0); aw(ICR, 0x4041); window(); EQ(hits[0x41], 3);              /* physical */
	aw(ICR2, 0xff000000); aw(ICR, 0x4041); window(); EQ(hits[0x41], 4);     /* broadcast */
	aw(ICR2, 0x05000000); aw(ICR, 0x4041); window(); EQ(hits[0x41], 4);     /* nobody */
	aw(ICR, 0x84041); window(); EQ(hits[0x41], 5);                          /* all */
	aw(ICR, 0xc4041); window(); EQ(hits[0x41], 5);                          /* all but self */
	aw(LDR, 0x02000000);
	aw(ICR2, 0x03000000); aw(ICR, 0x4841); window(); EQ(hits[0x41], 6);     /* flat logical */
	aw(ICR2, 0x05000000); aw(ICR, 0x4841); window(); EQ(hits[0x41], 6);
	aw(ICR2, 0x03000000); aw(ICR, 0x4941); window(); EQ(hits[0x41], 7);     /* lowest priority */
	aw(DFR, 0x0fffffff); aw(LDR, 0x12000000);
	aw(ICR2, 0x13000000); aw(ICR, 0x4841); window(); EQ(hits[0x41], 8);     /* cluster */
	aw(ICR2, 0x23000000); aw(ICR, 0x4841); window(); EQ(hits[0x41], 8);
	aw(ICR2, 0x11000000); aw(ICR, 0x4841); window(); EQ(hits[0x41], 8);
	aw(DFR, 0xffffffff);
	EQ(ap(ICR) & 1 << 12, 0);
	/* errors */
	aw(ESR, 0); aw(ESR, 0);
	EQ(ap(ESR), 0);
	aw(LVTE, 0xfe);
	aw(ICR, 0x40005);
	EQ(ap(ESR), 0);
	aw(ESR, 0);
	EQ(ap(ESR) & 0x20, 0x20);
	window();
	EQ(hits[0xfe], 1);
	aw(LVTE, 0x100fe);
	aw(ESR, 0); aw(ESR, 0);
	(void)ap(0x3f0 + 0x10 - 0x20 * 0 - 0x10);       /* 3F0H is no register here */
	aw(ESR, 0);
	EQ(ap(ESR) & 0x80, 0x80);
	aw(ESR, 0); aw(ESR, 0);
	aw(EOI, 0);
}

static void priorities(void)
{
	clear();
	aw(TPR, 0x50);
	EQ(RDCR(8), 5);
	aw(ICR, 0x40051); aw(ICR, 0x40061);
	window();
	EQ(norder, 1); EQ(order[0], 0x61);
	WRCR(8, 4);
	EQ(ap(TPR), 0x40);
	window();
	EQ(hits[0x51], 1);
	EQ(seen & 0xff, 1);
	EQ(seen >> 8, 0x50);
	aw(TPR, 0);
	/* 61 breaks into 51, 52 waits for its EOI */
	clear();
	aw(ICR, 0x40051);
	window();
	clear();
	handlers[0x41] = on_41;
	aw(ICR, 0x40052); aw(ICR, 0x40051); aw(ICR, 0x40041); aw(ICR, 0x40062);
	window();
	EQ(norder, 6); EQ(order[0], 0x62); EQ(order[1], 0x52); EQ(order[2], 0x51); EQ(order[3], 1); EQ(order[4], 0x41); EQ(order[5], 2);
	aw(TPR, 0xf0);
	aw(ICR, 0x40062);
	window();
	EQ(hits[0x62], 1);
	aw(TPR, 0);
	window();
	EQ(hits[0x62], 2);
	EQ(ap(PPR), 0);
	aw(TPR, 0x53);
	EQ(ap(PPR), 0x53);
	aw(TPR, 0);
}

static void timer(void)
{
	u64 t;

	clear();
	aw(TDCR, 0xb);
	aw(LVTT, 0x45);
	t = rdtsc();
	aw(TMICT, 200000);
	CHECK(ap(TMCCT) <= 200000);
	wait(0x45, 1);
	CHECK(rdtsc() - t < 4000000000ull);
	EQ(ap(TMCCT), 0);
	delay(3000000);
	window();
	EQ(hits[0x45], 1);
	aw(TMICT, 2000000000);          /* counts down, and stops with 0 */
	t = ap(TMCCT);
	delay(100000);
	CHECK(ap(TMCCT) < t && ap(TMCCT));
	aw(TMICT, 0);
	EQ(ap(TMCCT), 0);
	aw(LVTT, 0x20045);
	aw(TMICT, 500000);
	wait(0x45, 4);
	CHECK(ap(TMCCT) <= 500000);
	aw(LVTT, 0x30045);
	window();                       /* one that came just before */
	clear();
	delay(4000000);
	window();
	EQ(hits[0x45], 0);
	aw(TMICT, 0);
	/* TSC deadline */
	aw(LVTT, 0x40045);
	EQ(rdmsr(0x6e0), 0);
	wrmsr(0x6e0, rdtsc() + 1000000);
	wait(0x45, 1);
	EQ(rdmsr(0x6e0), 0);
	t = rdtsc() + 1000000000000ull;
	wrmsr(0x6e0, t);
	EQ(rdmsr(0x6e0), t);
	wrmsr(0x6e0, 0);
	EQ(rdmsr(0x6e0), 0);
	wrmsr(0x6e0, 1);                /* long ago: at once */
	window();
	delay(1000);
	window();
	EQ(hits[0x45], 2);
	aw(TMICT, 1000);                /* not in this mode */
	EQ(ap(TMCCT), 0);
	wrmsr(0x6e0, t);
	aw(LVTT, 0x45);                 /* leaving the mode disarms */
	EQ(rdmsr(0x6e0), 0);
	wrmsr(0x6e0, rdtsc());          /* no effect here */
	EQ(rdmsr(0x6e0), 0);
	aw(LVTT, 0x10045);
}

static volatile u32 nmis, nmi_depth, nmi_max;
static void on_nmi(void)
{
	nmis++;
	if (++nmi_depth > nmi_max)
		nmi_max = nmi_depth;
	if (nmis == 1) {
		outl(ORDER_NMI, 0);     /* waits for the IRET of this one */
		__asm__ volatile("nop; nop");
	}
	nmi_depth--;
}

static void nmi(void)
{
	handlers[NMI] = on_nmi;
	aw(ICR2, 0); aw(ICR, 0x4400);
	__asm__ volatile("nop; nop");
	EQ(nmis, 2);
	EQ(nmi_max, 1);
	/* LINT1 as NMI is the way of old boards; the runner's KVM_NMI does not ask it */
	outl(ORDER_NMI, 0);
	__asm__ volatile("nop; nop");
	EQ(nmis, 3);
	/* through the I/O APIC: delivery mode 4 */
	rte(12, 0x400);
	line(12, 1); line(12, 0);
	__asm__ volatile("nop; nop");
	EQ(nmis, 4);
	rte(12, 0x10000);
	handlers[NMI] = 0;
}

static u32 level_left;
static void on_63(void)
{
	note(0x63);
	seen = io(0x10 + 2 * 11);
	seen2 = bit(TMR, 0x63);
	if (level_left && !--level_left)
		line(11, 0);
	aw(EOI, 0);
}

static void ioapic(void)
{
	clear();
	EQ(io(1), 0x170011);
	iow(0, 0x05000000); EQ(io(0), 0x05000000); iow(0, 0);
	EQ(io(0x10), 0x10000);
	rte(10, 0x61);
	line(10, 1); window(); EQ(hits[0x61], 1);
	line(10, 1); window(); EQ(hits[0x61], 1);       /* no new edge */
	line(10, 0); line(10, 1); window(); EQ(hits[0x61], 2);
	line(10, 0);
	rte(10, 0x10061);
	line(10, 1); line(10, 0);
	rte(10, 0x61); window(); EQ(hits[0x61], 2);     /* an edge on a masked pin is gone */
	rte(10, 0x61 | 5ull << 56); line(10, 1); line(10, 0); window(); EQ(hits[0x61], 2);      /* not to us */
	rte(10, 0x961 | 2ull << 56); aw(LDR, 0x02000000); line(10, 1); line(10, 0); window(); EQ(hits[0x61], 3);
	rte(10, 0x10000);
	/* level */
	rte(11, 0x8063);
	level_left = 3;
	line(11, 1);
	sti(); delay(1000); cli();
	EQ(hits[0x63], 3);
	EQ(seen & 0x4000, 0x4000);
	EQ(seen2, 1);
	EQ(io(0x10 + 2 * 11), 0x8063);
	rte(11, 0x18063);
	line(11, 1); window(); EQ(hits[0x63], 3);
	level_left = 1;
	rte(11, 0x8063); sti(); delay(1000); cli(); EQ(hits[0x63], 4);          /* still up when unmasked */
	line(11, 1); line(11, 0); window(); EQ(hits[0x63], 5);                  /* sent before it fell */
	/* Remote IRR holds a second message back; turning to edge clears it. */
	line(11, 1);
	EQ(io(0x10 + 2 * 11) & 0x4000, 0x4000);
	line(11, 0);
	rte(11, 0x63); EQ(io(0x10 + 2 * 11) & 0x4000, 0);
	window();
	rte(11, 0x10000);
	/* MSI */
	msi(0xfee00000, 0x70); window(); EQ(hits[0x70], 1);
	msi(0xfee05000, 0x70); window(); EQ(hits[0x70], 1);
	msi(0xfee0200c, 0x170); window(); EQ(hits[0x70], 2);    /* logical, lowest priority */
	msi(0xfeeff000, 0x70); window(); EQ(hits[0x70], 3);
	/* irqfd that is resampled: the level falls with our EOI and its owner hears of it */
	rte(13, 0x8071);
	EQ(inl(ORDER_ACKS), 0);
	outl(ORDER_FD, 0);
	await(0x71, 1);
	EQ(hits[0x71], 1);
	EQ(inl(ORDER_ACKS), 1);
	window();
	EQ(hits[0x71], 1);
	outl(ORDER_FD, 0);
	await(0x71, 2);
	EQ(hits[0x71], 2);
	EQ(inl(ORDER_ACKS), 1);
	rte(13, 0x10000);
}

SNIP(rd_, "mov %edi, %ecx\n.globl rd_at\nrd_at: rdmsr");
SNIP(wr_, "mov %edi, %ecx; mov %esi, %eax; mov %rsi, %rdx; shr $32, %rdx; wrmsr");
static void x2_41(void) { note(0x41); wrmsr(0x80b, 0); }

static void x2apic(void)
{
	u64 base = rdmsr(0x1b);

	EQ(base, 0xfee00900);
	EQ(try_call(rd_, 0x802, 0), GP);
	EQ(try_call(wr_, 0x1b, (base & ~0x800ul) | 0x400), GP);
	EQ(try_call(wr_, 0x1b, base | 0x400), -1);
	clear();
	handlers[0x41] = x2_41;
	EQ(rdmsr(0x802), 0);
	EQ(rdmsr(0x803) & 0xff, 0x14);
	EQ(rdmsr(0x80d), 1);
	wrmsr(0x80f, 0x1ff);
	wrmsr(0x83f, 0x41); window(); EQ(hits[0x41], 1);
	wrmsr(0x830, 0x40041); window(); EQ(hits[0x41], 2);
	wrmsr(0x830, 0x4041); window(); EQ(hits[0x41], 3);
	wrmsr(0x830, 0xffffffff00004041); window(); EQ(hits[0x41], 4);
	wrmsr(0x830, 0x100004841); window(); EQ(hits[0x41], 5);         /* logical: cluster 0, member 0 */
	wrmsr(0x830, 0x200004841); window(); EQ(hits[0x41], 5);
	EQ(rdmsr(0x830), 0x200004841);
	wrmsr(0x808, 0x40);
	EQ(RDCR(8), 4);
	wrmsr(0x83f, 0x41); window(); EQ(hits[0x41], 5);
	wrmsr(0x808, 0); window(); EQ(hits[0x41], 6);
	EQ(try_call(wr_, 0x80b, 1), GP);
	EQ(try_call(rd_, 0x80b, 0), GP);
	EQ(try_call(rd_, 0x80e, 0), GP);
	EQ(try_call(rd_, 0x831, 0), GP);
	EQ(try_call(wr_, 0x802, 0), GP);
	EQ(try_call(wr_, 0x80d, 0), GP);
	EQ(try_call(wr_, 0x808, 0x100), GP);
	EQ(try_call(rd_, 0x840, 0), GP);
	EQ(try_call(wr_, 0x83f, 0x100), GP);
	EQ(try_call(wr_, 0x80f, 1ul << 32), GP);
	EQ(try_call(rd_, 0x83f, 0), GP);
	EQ(try_call(wr_, 0x1b, base), GP);      /* not straight back */
	EQ(try_call(wr_, 0x1b, base & ~0x800ul), -1);
	{ u32 r[4]; cpuid(1, 0, r); EQ(r[3] >> 9 & 1, 0); }
	EQ(try_call(wr_, 0x1b, base), -1);
	EQ(ap(ID), 0);
	EQ(ap(SVR), 0xff);
	handlers[0x41] = on_41;
	aw(SVR, 0x1ff);
	EQ(try_call(wr_, 0x1b, base | 1ul << 52), GP);
}

/* -- 8259A: ExtINT by LINT0, which is how the boot CPU starts ------------------------------------ */
static u8 ocw3(u16 port, u8 v) { outb(port, v); return inb(port); }
static void pic_init(u8 icw4)
{
	outb(0x20, 0x11); outb(0x21, 0x20); outb(0x21, 4); outb(0x21, icw4);
	outb(0xa0, 0x11); outb(0xa1, 0x28); outb(0xa1, 2); outb(0xa1, icw4);
	outb(0x21, 0); outb(0xa1, 0);
}
static int eoi_kind;
static void pic_done(int irq)
{
	seen = ocw3(0x20, 0x0b);
	seen2 = ocw3(0xa0, 0x0b);
	outb(0x20, 0x0a);
	outb(0xa0, 0x0a);
	if (eoi_kind == 1) {
		if (irq > 7)
			outb(0xa0, 0x20);
		outb(0x20, 0x20);
	} else if (eoi_kind == 2) {
		if (irq > 7)
			outb(0xa0, 0x60 | (irq & 7));
		outb(0x20, 0x60 | (irq > 7 ? 2 : irq));
	} else if (eoi_kind == 3) {
		outb(0x20, 0xa0);       /* and rotate */
	}
}
#define PIC_HANDLER(n, v) static void irq##n(void) { note(v); if (n == 5 && level_left && !--level_left) line(5, 0); pic_done(n); }
PIC_HANDLER(1, 0x21) PIC_HANDLER(3, 0x23) PIC_HANDLER(4, 0x24) PIC_HANDLER(5, 0x25) PIC_HANDLER(6, 0x26) PIC_HANDLER(10, 0x2a)
static void pulse(u32 n) { line(n, 1); line(n, 0); }

static void pic(void)
{
	handlers[0x21] = irq1; handlers[0x23] = irq3; handlers[0x24] = irq4; handlers[0x25] = irq5; handlers[0x26] = irq6; handlers[0x2a] = irq10;
	clear();
	pic_init(1);
	aw(LVT0, 0x700);
	eoi_kind = 1;
	line(4, 1);
	EQ(ocw3(0x20, 0x0a), 0x10);
	window(); EQ(hits[0x24], 1); EQ(seen, 0x10); EQ(ocw3(0x20, 0x0b), 0);
	window(); EQ(hits[0x24], 1);            /* edge: up is not enough */
	line(4, 0); line(4, 1); window(); EQ(hits[0x24], 2);
	line(4, 0);
	eoi_kind = 2;
	pulse(10); window(); EQ(hits[0x2a], 1); EQ(seen, 4); EQ(seen2, 4);
	EQ(ocw3(0x20, 0x0b) | ocw3(0xa0, 0x0b), 0);
	/* in service: lower and equal wait, higher comes */
	eoi_kind = 0;
	pulse(3); window(); EQ(hits[0x23], 1);
	pulse(4); window(); EQ(hits[0x24], 2);
	pulse(1); window(); EQ(hits[0x21], 1); EQ(seen, 0x0a);
	outb(0x20, 0x20);                       /* ends 1, the highest */
	EQ(ocw3(0x20, 0x0b), 8);
	window(); EQ(hits[0x24], 2);
	outb(0x20, 0x63);
	window(); EQ(hits[0x24], 3);
	outb(0x20, 0x20);
	EQ(ocw3(0x20, 0x0b), 0);
	/* special mask mode: a masked level in service lets lower ones through */
	pulse(3); window(); EQ(hits[0x23], 2);
	outb(0x21, 8);
	outb(0x20, 0x68);
	pulse(6); window(); EQ(hits[0x26], 1);
	outb(0x20, 0x66); outb(0x20, 0x63);
	outb(0x20, 0x48);
	outb(0x21, 0);
	EQ(ocw3(0x20, 0x0b), 0);
	/* rotation: after 3's EOI with rotation, 3 is the last */
	eoi_kind = 3;
	pulse(3); window();
	eoi_kind = 1;
	clear();
	pulse(3); pulse(4); pulse(1);
	window(); window(); window(); window();
	EQ(norder, 3); EQ(order[0], 0x24); EQ(order[1], 0x21); EQ(order[2], 0x23);
	outb(0x20, 0xc7);                       /* 7 the last again */
	clear();
	pulse(4); pulse(1);
	window(); window(); window();
	EQ(order[0], 0x21); EQ(order[1], 0x24);
	/* mask */
	outb(0x21, 0x10);
	EQ(inb(0x21), 0x10);
	pulse(4); window(); EQ(hits[0x24], 1);
	outb(0x21, 0); window(); EQ(hits[0x24], 2);
	/* poll */
	pulse(6);
	outb(0x20, 0x0c); EQ(inb(0x20), 0x86);
	EQ(ocw3(0x20, 0x0b), 0x40);
	outb(0x20, 0x20);
	outb(0x20, 0x0c); EQ(inb(0x20) & 0x80, 0);
	/* level by ELCR */
	outb(0x4d0, 0xff); EQ(inb(0x4d0), 0xf8);
	outb(0x4d0, 0x20); outb(0x4d1, 0);
	clear();
	level_left = 3;
	line(5, 1);
	sti(); delay(1000); cli();
	EQ(hits[0x25], 3);
	line(5, 1); line(5, 0); window(); EQ(hits[0x25], 3);   /* gone before anybody looked */
	outb(0x4d0, 0);
	/* automatic EOI */
	pic_init(3);
	eoi_kind = 0;
	clear();
	pulse(4); window(); EQ(hits[0x24], 1); EQ(seen, 0);
	pulse(4); window(); EQ(hits[0x24], 2);
	pic_init(1);
	/* nothing without LINT0 */
	aw(LVT0, 0x10700);
	eoi_kind = 1;
	pulse(4); window(); EQ(hits[0x24], 2);
	aw(LVT0, 0x700);
	window(); EQ(hits[0x24], 3);
	outb(0x21, 0xff); outb(0xa1, 0xff);
	aw(LVT0, 0x10000);
}

/* -- 8254 ------------------------------------------------------------------------------------------ */
static u32 latch(int ch) { u32 v; outb(0x43, ch << 6); v = inb(0x40 + ch); return v | inb(0x40 + ch) << 8; }
static u8 status(int ch) { outb(0x43, 0xe0 | 2 << ch); return inb(0x40 + ch); }
static void on_46(void) { note(0x46); aw(EOI, 0); }

static void pit(void)
{
	u32 a, b, tries;
	u64 t;

	clear();
	outb(0x61, 0);                          /* gate of channel 2 down */
	outb(0x43, 0xb0);                       /* mode 0 */
	outb(0x42, 0x00); outb(0x42, 0x40);
	EQ(inb(0x61) & 0x21, 0);
	EQ(status(2) & 0xbf, 0x30);
	EQ(latch(2), 0x4000);                   /* waits for its gate */
	delay(100000);
	EQ(latch(2), 0x4000);
	/* A host that is busy with others may let 14 ms pass between two of these lines: once more then. */
	for (tries = 0; tries < 100; tries++) {
		outb(0x61, 0);
		outb(0x42, 0x00); outb(0x42, 0x40);
		outb(0x61, 1);
		a = latch(2); delay(200000); b = latch(2);
		if (a <= 0x4000 && b < a)
			break;
	}
	CHECK(tries < 100);
	outb(0x61, 0);
	a = latch(2); delay(200000);
	EQ(latch(2), a);                        /* stopped where it was */
	outb(0x43, 0xb0);
	outb(0x42, 0x64); outb(0x42, 0x00);
	outb(0x61, 1);
	for (t = rdtsc() + 1000000000; !(inb(0x61) & 0x20) && rdtsc() < t;)
		;
	EQ(inb(0x61) & 0x20, 0x20);
	EQ(status(2) & 0x80, 0x80);
	/* one byte each, while the count stands still */
	outb(0x61, 0);
	outb(0x43, 0x90); outb(0x42, 0x20);
	EQ(inb(0x42), 0x20);
	outb(0x43, 0xa0); outb(0x42, 0x20);
	EQ(inb(0x42), 0x20);
	outb(0x61, 1);
	/* a latched count stays until read */
	outb(0x43, 0xb4); outb(0x42, 0xff); outb(0x42, 0xff);
	for (tries = 0; tries < 100; tries++) {
		outb(0x43, 0x80);
		a = inb(0x42) | inb(0x42) << 8;
		outb(0x43, 0x80); delay(300000); outb(0x43, 0x80);
		b = inb(0x42) | inb(0x42) << 8;
		if (a >= b && a - b < 0x4000)
			break;
	}
	CHECK(tries < 100);
	/* BCD, mode 2 */
	outb(0x43, 0xb5); outb(0x42, 0x00); outb(0x42, 0x10);
	for (int i = 0; i < 20; i++) {
		a = latch(2);
		CHECK((a & 15) < 10 && (a >> 4 & 15) < 10 && (a >> 8 & 15) < 10 && a <= 0x1000);
	}
	outb(0x43, 0xb6); outb(0x42, 0x00); outb(0x42, 0x10);
	for (int i = 0; i < 20; i++)
		EQ(latch(2) & 1, 0);            /* mode 3 counts by twos */
	/* channel 0 through the I/O APIC: rate generator, then once */
	handlers[0x46] = on_46;
	rte(0, 0x46);
	outb(0x43, 0x34); outb(0x40, 0xa9); outb(0x40, 0x04);    /* 1 kHz */
	wait(0x46, 3);
	outb(0x43, 0x30); outb(0x40, 0xa9); outb(0x40, 0x04);
	delay(250000000);                       /* its interrupt has come, and the last of the others */
	window();
	clear();
	outb(0x43, 0x30); outb(0x40, 0xa9); outb(0x40, 0x04);
	wait(0x46, 1);
	delay(5000000);
	window();
	EQ(hits[0x46], 1);
	rte(0, 0x10000);
}

static void tsc(void)
{
	u64 a, b;
	u32 r[4];

	cpuid(7, 0, r);
	if (r[1] & 2) {
		EQ(rdmsr(0x3b), 0);
		a = rdtsc();
		wrmsr(0x3b, 1ull << 40);
		b = rdtsc();
		CHECK(b - a > 1ull << 40 && b - a < (1ull << 40) + 4000000000ull);
		wrmsr(0x3b, 0);
		CHECK(rdtsc() - a < 4000000000ull);
		a = rdtsc();
		wrmsr(0x10, a + (1ull << 41));  /* shows in the adjustment */
		CHECK(rdmsr(0x3b) - (1ull << 41) + 4000000000ull < 8000000000ull);
		wrmsr(0x3b, 0);
	}
	wrmsr(0xc0000103, 0x12345678);
	__asm__ volatile("rdtscp" : "=a"(r[0]), "=d"(r[3]), "=c"(r[2]));
	EQ(r[2], 0x12345678);
	__asm__ volatile("rdpid %0" : "=r"(a));
	EQ(a, 0x12345678);
}

void guest_main(void)
{
	map_chips();
#define H(v) handlers[0x##v] = on_##v
	H(41); H(45); H(51); H(52); H(61); H(62); H(63); H(70); H(71); H(fe);
	outb(0x21, 0xff); outb(0xa1, 0xff);
	ipis();
	priorities();
	timer();
	ioapic();
	nmi();
	x2apic();
	pic();
	pit();
	tsc();
}
