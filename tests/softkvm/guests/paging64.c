/*
 * 4- and 5-level paging in the guest: every permission combination at the leaf and above, in both rings, under every switch;
 * reserved bits; accessed and dirty bits; what the TLB may and may not keep.
 *
 * The tables are our own: the first 16 MiB identity mapped as supervisor memory, the same again for ring 3 at ALIAS, the pages
 * under test at TEST in an address region of their own.
 */
#include "paging.h"

#define ALIAS 0x40000000ul
#define TEST (0x23ul << 39 | 0x45ul << 30 | 0x67ul << 21 | 0x89ul << 12)
static int la57;
static u64 *root, *pml4, *pdpt, *pd, *pt;
static struct rules now;

static u64 *page(int n) { return (u64 *)(TABLES + 0x1000ul * n); }

/* Ends with RET or INT 80H as the ring needs. */
SNIP(k_rd, "mov (%rdi), %al");
SNIP(k_wr, "mov %al, (%rdi)");
SNIP(k_ex, "call *%rdi");
SNIP(u_rd, "mov (%rdi), %al; int $0x80");
SNIP(u_wr, "mov %al, (%rdi); int $0x80");
SNIP(u_ex, "jmp *%rdi");
SNIP(k_rd_ac, "stac; mov (%rdi), %al; clac");
SNIP(k_wr_ac, "stac; mov %al, (%rdi); clac");

static void build(void)
{
	ul old4 = RDCR(4);

	la57 = !!(old4 & CR4_LA57);
	for (int n = 0; n < 16; n++)
		for (int i = 0; i < 512; i++)
			page(n)[i] = 0;
	root = page(0);
	pml4 = la57 ? page(1) : root;
	if (la57)
		root[0] = (ul)pml4 | P | W | U;
	pml4[0] = (ul)page(2) | P | W | U;
	page(2)[0] = (ul)page(3) | P | W;               /* identity, supervisor */
	page(2)[1] = (ul)page(4) | P | W | U;           /* alias, user */
	for (int i = 0; i < 8; i++) {
		page(3)[i] = (ul)i << 21 | P | W | PS;
		page(4)[i] = (ul)i << 21 | P | W | U | PS;
	}
	pdpt = page(5), pd = page(6), pt = page(7);
	pml4[0x23] = (ul)pdpt | P | W | U;
	pdpt[0x45] = (ul)pd | P | W | U;
	pd[0x67] = (ul)pt | P | W | U;
	for (int i = 0; i < 4; i++) {   /* SCRATCH pages: RET, and INT 80H at 16 */
		u8 *c = (u8 *)(SCRATCH + 0x1000ul * i);

		c[0] = 0xc3;
		c[16] = 0xcd;
		c[17] = 0x80;
	}
	WRCR(3, (ul)root);
	user_sp |= ALIAS;
}

/* One access: -1 or the error code of its #PF. */
static int do_access(int how, int user, ul at)
{
	static u8 *const k[] = { k_rd, k_wr, k_ex }, *const kac[] = { k_rd_ac, k_wr_ac, k_ex }, *const u[] = { u_rd, u_wr, u_ex };
	int v;

	if (user)
		v = try_user((ul)u[how] + ALIAS, at + (how == EX ? 16 : how == WR ? 32 : 0), 0);
	else
		v = try_call(now.ac ? kac[how] : k[how], at + (how == WR ? 32 : 0), 0);
	if (v != -1 && v != PF)
		return 0x1000 + v;
	return v == -1 ? -1 : (int)last.err;
}

static void set_switches(int smep, int smap, int wp, int nxe)
{
	WRCR(4, (RDCR(4) & ~(ul)(CR4_SMEP | CR4_SMAP)) | (smep ? CR4_SMEP : 0) | (smap ? CR4_SMAP : 0));
	WRCR(0, (RDCR(0) & ~(ul)CR0_WP) | (wp ? CR0_WP : 0));
	wrmsr(0xc0000080, (rdmsr(0xc0000080) & ~0x800ul) | (nxe ? 0x800 : 0));
	now.smep = smep;
	now.smap = smap;
	now.wp = wp;
	now.nxe = nxe;
}

static u64 bits_of(int m, int nxe) { return (m & 1 ? W : 0) | (m & 2 ? U : 0) | (m & 4 && nxe ? NX : 0); }

/* Leaf rights times rights one level up; one invalidation per combination, so that the TLB is used between accesses. */
static void one_page(int leaf, int up, u64 extra, u64 *upper, u64 table)
{
	int w = leaf & up & 1, u = (leaf & up & 2) >> 1, nx = ((leaf | up) & 4) && now.nxe, tag = leaf | up << 4;

	*upper = table | P | bits_of(up, now.nxe);
	pt[0x89] = (SCRATCH | P | extra) + bits_of(leaf, now.nxe);
	invlpg(TEST);
	for (int user = 0; user < 2; user++)
		for (int how = RD; how <= EX; how++) {
			tag = leaf | up << 4 | how << 8 | user << 10 | now.smep << 12 | now.smap << 13 | now.wp << 14 | now.nxe << 15 |
				now.ac << 16 | now.ad << 17 | now.wd << 18;
			EQT(tag, (u32)do_access(how, user, TEST), (u32)expect(&now, 1, 0, w, u, nx, how, user));
		}
	/* Once more in the other order: entries that the first round left must not let more through. */
	EQT(tag, (u32)do_access(WR, 0, TEST), (u32)expect(&now, 1, 0, w, u, nx, WR, 0));
	EQT(tag, (u32)do_access(RD, 1, TEST), (u32)expect(&now, 1, 0, w, u, nx, RD, 1));
}

static void matrix(void)
{
	u64 *const uppers[] = { &pd[0x67], &pdpt[0x45], &pml4[0x23] };
	u64 *const tables[] = { pt, pd, pdpt };

	for (int s = 0; s < 16; s++) {
		set_switches(s & 1, s >> 1 & 1, s >> 2 & 1, s >> 3 & 1);
		for (int ac = 0; ac <= now.smap; ac++) {
			now.ac = ac;
			for (int leaf = 0; leaf < 8; leaf++)
				for (int up = 0; up < 8; up++) {
					int l = (leaf + up + s) % 3;

					one_page(leaf, up, 0, uppers[l], (u64)tables[l]);
					*uppers[l] = (u64)tables[l] | P | W | U;
				}
		}
		now.ac = 0;
	}
	set_switches(0, 0, 1, 1);
}

static void keys(void)
{
	u32 r[4];

	cpuid(7, 0, r);
	if (!(r[2] & 8))
		return;
	WRCR(4, RDCR(4) | CR4_PKE);
	now.pke = 1;
	for (int s = 0; s < 4; s++) {
		set_switches(0, s & 1, s >> 1, 1);
		for (int k = 0; k < 4; k++) {
			now.ad = k & 1;
			now.wd = k >> 1;
			/* key 5 as wanted, the others the opposite */
			__asm__ volatile("wrpkru" :: "a"((u32)(k << 10 | (k ? 0 : 0xfffff3ff))), "c"(0), "d"(0));
			for (int leaf = 0; leaf < 8; leaf++)
				one_page(leaf, 7 & ~4, 5ull << 59, &pd[0x67], (u64)pt);
		}
	}
	__asm__ volatile("wrpkru" :: "a"(0), "c"(0), "d"(0));
	/* Key rights change without any invalidation. */
	set_switches(0, 0, 1, 1);
	pt[0x89] = SCRATCH | P | W | U | 5ull << 59;
	invlpg(TEST);
	EQ(do_access(WR, 1, TEST), -1);
	__asm__ volatile("wrpkru" :: "a"(8 << 8), "c"(0), "d"(0));
	EQ(do_access(RD, 1, TEST), -1);
	EQ(do_access(WR, 1, TEST), 0x27);
	EQ(do_access(WR, 0, TEST), 0x23);
	__asm__ volatile("wrpkru" :: "a"(4 << 8), "c"(0), "d"(0));
	EQ(do_access(RD, 0, TEST), 0x21);
	EQ(do_access(EX, 1, TEST), -1);
	__asm__ volatile("wrpkru" :: "a"(0), "c"(0), "d"(0));
	EQ(do_access(WR, 1, TEST), -1);
	WRCR(4, RDCR(4) & ~(ul)CR4_PKE);
	now.pke = now.ad = now.wd = 0;
}

/* Not present and reserved bits at every level. */
static void absent(void)
{
	struct { u64 *e, good, rsvd; } l[5] = {
		{ &pt[0x89], SCRATCH | P | W | U, 0 }, { &pd[0x67], (u64)pt | P | W | U, 0 }, { &pdpt[0x45], (u64)pd | P | W | U, 0 },
		{ &pml4[0x23], (u64)pdpt | P | W | U, PS }, { root, (u64)pml4 | P | W | U, PS },
	};
	u32 r[4], bits;

	cpuid(0x80000008, 0, r);
	bits = r[0] & 0xff;
	for (int k = 0; k < 4; k++)
		*l[k].e = l[k].good;
	invlpg(TEST);
	for (int k = 0; k < 4; k++) {
		for (int user = 0; user < 2; user++)
			for (int how = RD; how <= EX; how++) {
				*l[k].e = l[k].good & ~(u64)P;
				invlpg(TEST);
				EQT(k, do_access(how, user, TEST), expect(&now, 0, 0, 0, 0, 0, how, user));
				*l[k].e = ~(u64)P;              /* nothing else counts then */
				EQT(k, do_access(how, user, TEST), expect(&now, 0, 0, 0, 0, 0, how, user));
				if (bits < 52) {
					*l[k].e = l[k].good | 1ull << 51;
					EQT(k, do_access(how, user, TEST), expect(&now, 1, 1, 0, 0, 0, how, user));
					*l[k].e = l[k].good | 1ull << bits;
					EQT(k, do_access(how, user, TEST), expect(&now, 1, 1, 0, 0, 0, how, user));
				}
				if (l[k].rsvd) {
					*l[k].e = l[k].good | l[k].rsvd;
					EQT(k, do_access(how, user, TEST), expect(&now, 1, 1, 0, 0, 0, how, user));
				}
				*l[k].e = l[k].good;
				EQT(k, do_access(how, user, TEST), -1);
			}
	}
	/* NX is reserved without EFER.NXE; large pages have address bits that must be clear. */
	set_switches(0, 0, 1, 0);
	for (int k = 0; k < 4; k++) {
		*l[k].e = l[k].good | NX;
		invlpg(TEST);
		EQT(k, do_access(RD, 0, TEST), 9);
		EQT(k, do_access(EX, 1, TEST), 0xd);
		*l[k].e = l[k].good;
	}
	set_switches(0, 0, 1, 1);
	pd[0x67] = SCRATCH | P | W | U | PS | 1 << 13;
	invlpg(TEST);
	EQ(do_access(RD, 0, TEST), 9);
	pd[0x67] = SCRATCH | P | W | U | PS | 1 << 20;
	EQ(do_access(WR, 1, TEST), 0xf);
	pd[0x67] = SCRATCH | P | W | U | PS | 1 << 12;          /* PAT: allowed */
	EQ(do_access(RD, 0, TEST), -1);
	pd[0x67] = l[1].good;
	pdpt[0x45] = P | W | U | PS | 1 << 29;
	invlpg(TEST);
	EQ(do_access(RD, 0, TEST), 9);
	pdpt[0x45] = l[2].good;
	invlpg(TEST);
}

/* Accessed and dirty bits: set when and only when. */
static void accessed(void)
{
	u64 base = SCRATCH | P | W | U;

	pt[0x89] = base;
	pd[0x67] &= ~(u64)A;
	pdpt[0x45] &= ~(u64)A;
	pml4[0x23] &= ~(u64)A;
	invlpg(TEST);
	EQ(do_access(RD, 0, TEST), -1);
	EQ(pt[0x89], base | A);
	EQ(pd[0x67] & (A | D), A);
	EQ(pdpt[0x45] & A, A);
	EQ(pml4[0x23] & A, A);
	EQ(do_access(WR, 0, TEST), -1);         /* the entry in the TLB must not hide the first write */
	EQ(pt[0x89], base | A | D);
	pt[0x89] = base & ~(u64)W;
	invlpg(TEST);
	EQ(do_access(WR, 1, TEST), 7);
	EQ(pt[0x89] & D, 0);
	pt[0x89] = base & ~(u64)P;
	invlpg(TEST);
	EQ(do_access(RD, 0, TEST), 0);
	EQ(pt[0x89] & (A | D), 0);
	pt[0x89] = base | NX;
	pd[0x67] &= ~(u64)A;
	invlpg(TEST);
	EQ(do_access(EX, 0, TEST), 0x11);
	EQ(pt[0x89] & (A | D), 0);
	pt[0x89] = base;
	invlpg(TEST);
	EQ(do_access(EX, 1, TEST), -1);
	EQ(pt[0x89], base | A);
	/* large: the leaf has D, no level below is looked at */
	pd[0x67] = SCRATCH | P | W | U | PS;
	invlpg(TEST);
	EQ(do_access(WR, 1, TEST), -1);
	EQ(pd[0x67], SCRATCH | P | W | U | PS | A | D);
	pd[0x67] = (u64)pt | P | W | U;
	invlpg(TEST);
	/* locked read-modify-write that only reads back: still a write */
	pt[0x89] = base;
	invlpg(TEST);
	__asm__ volatile("lock cmpxchg %1, (%0)" :: "r"(TEST + 64), "r"(0), "a"(0x55) : "memory");
	EQ(pt[0x89], base | A | D);
}

/* A page number written to each SCRATCH page tells which one a mapping leads to. */
static u8 which(ul at) { return *(volatile u8 *)(at + 64); }

static void invpcid(u64 type, u64 pcid, u64 a)
{
	struct { u64 pcid, a; } d = { pcid, a };

	__asm__ volatile("invpcid %0, %1" :: "m"(d), "r"(type) : "memory");
}

SNIP(invpcid_, "invpcid (%rdi), %rsi");

static void tlb(void)
{
	u64 e[4];
	ul cr3 = RDCR(3), cr4 = RDCR(4);
	u32 r[4];

	for (int i = 0; i < 4; i++) {
		*(volatile u8 *)(SCRATCH + 0x1000ul * i + 64) = i;
		e[i] = (SCRATCH + 0x1000ul * i) | P | W | U;
	}
	pd[0x67] = (u64)pt | P | W | U;
	pt[0x89] = e[0]; pt[0x8a] = e[1];
	WRCR(3, cr3);
	EQ(which(TEST), 0); EQ(which(TEST + 4096), 1);
	pt[0x89] = e[2]; pt[0x8a] = e[3];
	invlpg(TEST);
	EQ(which(TEST), 2);
	WRCR(3, cr3);
	EQ(which(TEST + 4096), 3);
	/* global entries outlive CR3 loads, not INVLPG, nor a change of PGE */
	WRCR(4, cr4 | CR4_PGE);
	pt[0x89] = e[0] | G;
	invlpg(TEST);
	EQ(which(TEST), 0);
	pt[0x89] = e[1] | G;
	invlpg(TEST);
	EQ(which(TEST), 1);
	pt[0x89] = e[2] | G;
	WRCR(4, cr4 & ~(ul)CR4_PGE);
	EQ(which(TEST), 2);
	WRCR(4, cr4 | CR4_PGE);
	EQ(which(TEST), 2);
	pt[0x89] = e[0];
	invlpg(TEST);
	EQ(which(TEST), 0);
	pt[0x89] = e[3];        /* not global: CR3 ends it */
	WRCR(3, cr3);
	EQ(which(TEST), 3);
	/* a large page: INVLPG of any of its addresses ends all of it */
	pd[0x67] = (SCRATCH & ~0x1ffffful) | P | W | U | PS;
	invlpg(TEST);
	for (int i = 0; i < 4; i++)
		EQ(which((TEST & ~0x1ffffful) + (SCRATCH & 0x1fffff) + 0x1000 * i), i);
	pd[0x67] = ((SCRATCH + 0x200000) & ~0x1ffffful) | P | W | U | PS;
	for (int i = 0; i < 4; i++)
		*(volatile u8 *)(SCRATCH + 0x200000 + 0x1000ul * i + 64) = 0x80 + i;
	invlpg((TEST & ~0x1ffffful) + 0x1ff000);
	for (int i = 0; i < 4; i++)
		EQ(which((TEST & ~0x1ffffful) + (SCRATCH & 0x1fffff) + 0x1000 * i), 0x80 + i);
	pdpt[0x45] = P | W | U | PS;    /* 1 GiB */
	invlpg(TEST);
	EQ(which((TEST & ~0x3ffffffful) + SCRATCH + 0x1000), 1);
	pdpt[0x45] = (u64)pd | P | W | U;
	pd[0x67] = (u64)pt | P | W | U;
	pd[SCRATCH >> 21] = (u64)pt | P | W | U;
	pt[1] = e[3];
	invlpg((TEST & ~0x3ffffffful) + 0x3ffff000);
	EQ(which((TEST & ~0x3ffffffful) + (SCRATCH & ~0x1ffffful) + 0x1000), 3);
	pd[SCRATCH >> 21] = 0;
	WRCR(3, cr3);
	/* code: the instruction TLB follows too */
	pt[0x89] = e[0];
	*(volatile u8 *)SCRATCH = 0xc3;
	*(volatile u16 *)(SCRATCH + 0x1000) = 0x0b0f;
	invlpg(TEST);
	EQ(try_call((void *)TEST, 0, 0), -1);
	pt[0x89] = e[1];
	invlpg(TEST);
	EQ(try_call((void *)TEST, 0, 0), UD);
	EQ(last.ip, TEST);
	pt[0x89] = e[0];
	WRCR(3, cr3);
	EQ(try_call((void *)TEST, 0, 0), -1);
	*(volatile u8 *)(SCRATCH + 0x1000) = 0xc3;
	/* PCID */
	cpuid(1, 0, r);
	if (!(r[2] & 1 << 17))
		return;
	EQ(try_call(invpcid_, 0, 0) == -1 || last.vec == GP || last.vec == UD || last.vec == PF, 1);
	WRCR(4, RDCR(4) | CR4_PCIDE);
	WRCR(3, cr3 | 5);
	EQ(RDCR(3), cr3 | 5);
	pt[0x89] = e[0];
	invlpg(TEST);
	EQ(which(TEST), 0);
	WRCR(3, cr3 | 6);
	pt[0x89] = e[1];
	invlpg(TEST);
	EQ(which(TEST), 1);
	WRCR(3, cr3 | 5);               /* without bit 63: nothing of PCID 5 may stay */
	EQ(which(TEST), 1);
	WRCR(3, cr3 | 6 | 1ul << 63);
	EQ(RDCR(3), cr3 | 6);
	EQ(which(TEST), 1);
	cpuid(7, 0, r);
	if (r[1] & 1 << 10) {
		struct { u64 pcid, a; } d = { 6, TEST };

		for (u64 type = 0; type < 4; type++) {
			pt[0x89] = e[type] | G * (type == 2);
			invlpg(TEST);
			EQ(which(TEST), type);
			pt[0x89] = e[3 - type];
			invpcid(type, type < 2 ? 6 : 0, type ? 0 : TEST);
			EQT(type, which(TEST), 3 - type);
		}
		EXC(invpcid_, &d, 4, GP, 0);
		d.pcid = 0x1000;
		EXC(invpcid_, &d, 0, GP, 0);
		EXC(invpcid_, &d, 1, GP, 0);
		EQ(try_call(invpcid_, (ul)&d, 2), -1);
		d.pcid = 6;
		d.a = 1ull << 63;
		EXC(invpcid_, &d, 0, GP, 0);
		EQ(try_call(invpcid_, (ul)&d, 1), -1);
	}
	WRCR(3, cr3);
	WRCR(4, RDCR(4) & ~(ul)CR4_PCIDE);
	WRCR(4, cr4);
	/* PCIDE cannot be set with a PCID in CR3's place */
	{ extern u8 set_cr4[]; WRCR(3, cr3 | 8); EXC(set_cr4, RDCR(4) | CR4_PCIDE, 0, GP, 0); WRCR(3, cr3); }
}
SNIP(set_cr4, "mov %rdi, %cr4");

/* An access over two pages faults at the first byte that is not there, and changes nothing. */
SNIP(wr8, "mov %rsi, (%rdi)");
SNIP(rd8, "mov (%rdi), %rax");
static void crossing(void)
{
	u64 e0 = SCRATCH | P | W | U, e1 = (SCRATCH + 0x1000) | P | W | U;

	pt[0x89] = e0;
	pt[0x8a] = 0;
	WRCR(3, RDCR(3));
	*(volatile u64 *)(SCRATCH + 4092) = 0x1111111111111111;
	EQ(try_call(wr8, TEST + 4092, 0x2222222222222222), PF);
	EQ(last.cr2, TEST + 4096);
	EQ(last.err, 2);
	EQ(*(volatile u32 *)(SCRATCH + 4092), 0x11111111);
	EQ(try_call(rd8, TEST + 4092, 0), PF);
	EQ(last.cr2, TEST + 4096);
	pt[0x89] = 0;
	pt[0x8a] = e1;
	WRCR(3, RDCR(3));
	EQ(try_call(wr8, TEST + 4092, 0x2222222222222222), PF);
	EQ(last.cr2, TEST + 4092);
	pt[0x89] = e1;          /* pages that are not neighbours */
	pt[0x8a] = e0;
	WRCR(3, RDCR(3));
	EQ(try_call(wr8, TEST + 4092, 0x3333333344444444), -1);
	EQ(*(volatile u32 *)(SCRATCH + 0x1ffc), 0x44444444);
	EQ(*(volatile u32 *)SCRATCH, 0x33333333);
	EQ(try_call(rd8, TEST + 4092, 0), -1);
	EQ(ret_val, 0x3333333344444444);
	*(volatile u8 *)SCRATCH = 0xc3;
}

void guest_main(void)
{
	build();
	matrix();
	keys();
	absent();
	accessed();
	tlb();
	crossing();
}
