/* 32-bit, PSE and PAE paging: permissions at both levels, 4 MiB and 2 MiB pages, PSE-36, reserved bits, PDPTEs, A and D bits. */
#include "paging.h"

#define TEST 0x30345000u
#define DIR(i) ((volatile u32 *)TABLES)[i]
#define TAB(i) ((volatile u32 *)(TABLES + 0x1000))[i]
#define PDPT ((volatile u64 *)(TABLES + 0x8000))
#define PD64(n) ((volatile u64 *)(TABLES + 0x9000 + 0x1000 * (n)))
#define PT64 ((volatile u64 *)(TABLES + 0xd000))
#define ALIAS 0x20000000u
static struct rules now;

SNIP(k_rd, "mov (%eax), %cl");
SNIP(k_wr, "mov %cl, (%eax)");
SNIP(k_ex, "call *%eax");
SNIP(u_rd, "mov (%eax), %cl; int $0x80");
SNIP(u_wr, "mov %cl, (%eax); int $0x80");
SNIP(u_ex, "jmp *%eax");

static int acc(int how, int user, ul at)
{
	static u8 *const k[] = { k_rd, k_wr, k_ex }, *const u[] = { u_rd, u_wr, u_ex };
	int v = user ? try_user((ul)u[how] + ALIAS, at + (how == EX ? 16 : how == WR ? 32 : 0), 0) :
		try_call(k[how], at + (how == WR ? 32 : 0), 0);

	if (v != -1 && v != PF)
		return 0x1000 + v;
	return v == -1 ? -1 : (int)last.err;
}

static void code(ul at)
{
	volatile u8 *c = (volatile u8 *)at;

	c[0] = 0xc3;
	c[16] = 0xcd;
	c[17] = 0x80;
}

static void try_all(int w, int u, int nx, int tag)
{
	for (int user = 0; user < 2; user++)
		for (int how = RD; how <= EX; how++)
			EQT(tag | how << 8 | user << 10 | now.smep << 12 | now.wp << 13 | now.smap << 14, (u32)acc(how, user, TEST),
			    (u32)expect(&now, 1, 0, w, u, nx, how, user));
}

static void switches(int s)
{
	now.wp = s & 1;
	now.smep = s >> 1 & 1;
	now.smap = s >> 2 & 1;
	WRCR(0, (RDCR(0) & ~(ul)CR0_WP) | (now.wp ? CR0_WP : 0));
	WRCR(4, (RDCR(4) & ~(ul)(CR4_SMEP | CR4_SMAP)) | (now.smep ? CR4_SMEP : 0) | (now.smap ? CR4_SMAP : 0));
}

static void two_level(void)
{
	for (u32 i = 0; i < 1024; i++)
		DIR(i) = TAB(i) = 0;
	for (u32 i = 0; i < 4; i++) {
		DIR(i) = i << 22 | P | W | PS;
		DIR(i + (ALIAS >> 22)) = i << 22 | P | W | U | PS;
	}
	code(SCRATCH);
	WRCR(4, (RDCR(4) & ~(ul)CR4_PAE) | CR4_PSE);
	WRCR(3, TABLES);
	WRCR(0, RDCR(0) | CR0_PG);
	for (int s = 0; s < 8; s++) {
		switches(s);
		for (int leaf = 0; leaf < 4; leaf++) {
			for (int up = 0; up < 4; up++) {
				DIR(TEST >> 22) = (TABLES + 0x1000) | P | (up & 1 ? W : 0) | (up & 2 ? U : 0);
				TAB(TEST >> 12 & 1023) = SCRATCH | P | (leaf & 1 ? W : 0) | (leaf & 2 ? U : 0);
				invlpg(TEST);
				try_all(leaf & up & 1, (leaf & up & 2) >> 1, 0, leaf | up << 4);
			}
			DIR(TEST >> 22) = (SCRATCH & 0xffc00000) | P | PS | (leaf & 1 ? W : 0) | (leaf & 2 ? U : 0);
			invlpg(TEST);
			code((SCRATCH & 0xffc00000) | (TEST & 0x3fffff));
			try_all(leaf & 1, leaf >> 1 & 1, 0, leaf | 0x80);
		}
	}
	switches(0);
	/* absent at each level */
	DIR(TEST >> 22) = 0;
	invlpg(TEST);
	EQ(acc(WR, 1, TEST), 6);
	DIR(TEST >> 22) = (TABLES + 0x1000) | P | W | U;
	TAB(TEST >> 12 & 1023) = 0xfffffffe;
	EQ(acc(RD, 0, TEST), 0);
	/* A and D */
	TAB(TEST >> 12 & 1023) = SCRATCH | P | W | U;
	invlpg(TEST);
	EQ(acc(RD, 0, TEST), -1);
	EQ(TAB(TEST >> 12 & 1023), SCRATCH | P | W | U | A);
	EQ(DIR(TEST >> 22) & (A | D), A);
	EQ(acc(WR, 0, TEST), -1);
	EQ(TAB(TEST >> 12 & 1023), SCRATCH | P | W | U | A | D);
	/* PSE: bit 21 must be clear; bits 20:13 are address bits 39:32 */
	DIR(TEST >> 22) = P | W | U | PS | 1 << 21;
	invlpg(TEST);
	EQ(acc(RD, 0, TEST), 9);
	/* without CR4.PSE the bit means nothing */
	for (u32 i = 0; i < 1024; i++)
		((volatile u32 *)(TABLES + 0x2000))[i] = i << 12 | P | W;
	DIR(0) = (TABLES + 0x2000) | P | W | U;
	for (u32 k = 1; k < 4; k++) {
		for (u32 i = 0; i < 1024; i++)
			((volatile u32 *)(TABLES + 0x2000 + 0x1000 * k))[i] = (i << 12 | k << 22) | P | W | U;
		DIR(k) = (TABLES + 0x2000 + 0x1000 * k) | P | W | U;
	}
	DIR(TEST >> 22) = (TABLES + 0x1000) | P | W | U | PS;
	WRCR(4, RDCR(4) & ~(ul)CR4_PSE);
	EQ(acc(RD, 0, TEST), -1);
	WRCR(0, RDCR(0) & ~CR0_PG);
}

SNIP(set_cr3, "mov %eax, %cr3");
static void pae(void)
{
	u32 r[4], bits;

	for (int n = 0; n < 4; n++) {
		for (int i = 0; i < 512; i++)
			PD64(n)[i] = 0;
		PDPT[n] = (ul)PD64(n) | P;
	}
	for (u64 i = 0; i < 8; i++) {
		PD64(0)[i] = i << 21 | P | W | PS;
		PD64(0)[i + (ALIAS >> 21)] = i << 21 | P | W | U | PS;
	}
	wrmsr(0xc0000080, 0x800);
	now.nxe = 1;
	WRCR(4, (RDCR(4) & ~(ul)CR4_PSE) | CR4_PAE);
	WRCR(3, TABLES + 0x8000);
	WRCR(0, RDCR(0) | CR0_PG);
	code(SCRATCH);
	for (int s = 0; s < 8; s++) {
		switches(s);
		for (int leaf = 0; leaf < 8; leaf++) {
			u64 f = (leaf & 1 ? W : 0) | (leaf & 2 ? U : 0) | (leaf & 4 ? NX : 0);

			for (int up = 0; up < 8; up++) {
				PD64(0)[TEST >> 21] = (TABLES + 0xd000) | P | (up & 1 ? W : 0) | (up & 2 ? U : 0) | (up & 4 ? NX : 0);
				PT64[TEST >> 12 & 511] = SCRATCH | P | f;
				invlpg(TEST);
				try_all(leaf & up & 1, (leaf & up & 2) >> 1, (leaf | up) & 4, leaf | up << 4);
			}
			PD64(0)[TEST >> 21] = (SCRATCH & ~0x1fffffu) | P | PS | f;
			invlpg(TEST);
			code((SCRATCH & ~0x1fffffu) | (TEST & 0x1fffff));
			try_all(leaf & 1, leaf >> 1 & 1, leaf & 4, leaf | 0x80);
		}
	}
	switches(0);
	PD64(0)[TEST >> 21] = (TABLES + 0xd000) | P | W | U;
	PT64[TEST >> 12 & 511] = SCRATCH | P | W | U;
	invlpg(TEST);
	EQ(acc(WR, 1, TEST), -1);
	/* bits 62:52 and those beyond MAXPHYADDR are reserved here */
	PT64[TEST >> 12 & 511] = SCRATCH | P | W | U | 1ull << 52;
	invlpg(TEST);
	EQ(acc(RD, 0, TEST), 9);
	PT64[TEST >> 12 & 511] = SCRATCH | P | W | U | 1ull << 62;
	EQ(acc(WR, 1, TEST), 0xf);
	cpuid(0x80000008, 0, r);
	bits = r[0] & 0xff;
	if (bits < 52) {
		PT64[TEST >> 12 & 511] = SCRATCH | P | W | U | 1ull << bits;
		EQ(acc(EX, 1, TEST), 0x1d);
	}
	PT64[TEST >> 12 & 511] = SCRATCH | P | W | U;
	/* PDPTEs are loaded with CR3, not walked; reserved bits there are #GP */
	PDPT[3] = 0;
	EQ(acc(RD, 0, 0xc0000000), 0);
	WRCR(3, TABLES + 0x8000);
	PD64(3)[0] = SCRATCH | P | W | U;
	PDPT[3] = (ul)PD64(3) | P;
	EQ(acc(RD, 0, 0xc0000000), 0);          /* not yet */
	WRCR(3, TABLES + 0x8000);
	PD64(3)[0] = (SCRATCH & ~0x1fffffu) | P | W | U | PS;
	EQ(acc(RD, 0, 0xc0000000), -1);
	PDPT[3] = (ul)PD64(3) | P | W;
	EXC(set_cr3, TABLES + 0x8000, 0, GP, 0);
	PDPT[3] = (ul)PD64(3) | P | 1ull << 63;
	EXC(set_cr3, TABLES + 0x8000, 0, GP, 0);
	PDPT[3] = ((ul)PD64(3) | W) & ~(ul)P;   /* absent: nothing else is looked at */
	EQ(try_call(set_cr3, TABLES + 0x8000, 0), -1);
	EQ(acc(RD, 0, 0xc0000000), 0);
	EQ(PDPT[0] & A, 0);
	WRCR(0, RDCR(0) & ~CR0_PG);
	WRCR(4, RDCR(4) & ~(ul)CR4_PAE);
}

void guest_main(void)
{
	user_sp |= ALIAS;
	two_level();
	now = (struct rules){ 0 };
	pae();
}
