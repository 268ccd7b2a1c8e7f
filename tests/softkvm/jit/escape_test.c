/*
 * Hostile guest addresses: instructions of every kind of operand, in every form of address, aimed at the edges of slots, at the
 * holes between them, at the ends of the canonical halves, and around 2^32 and 2^64 by displacements, scaled indexes, segment
 * bases, and 32-bit addresses that wrap. One pass interprets, the others translate. What must hold:
 *
 *   - host memory before and behind each slot, and pages planted beside softkvm's own mappings, keep their contents (0xe7
 *     everywhere), and none of that is found in the guest's memory or registers afterwards;
 *   - every pass ends with the same memory, registers, exceptions with error code and CR2, and MMIO exits as the interpreter's.
 *
 *     escape_test [--random CASES --seed N]
 *
 * That it can fail: docs/engine-translator.md, "Isolation", names changes to the translator that were made for the purpose.
 */
#include <cpuid.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

#define MEM 0x100000u           /* slot 0 */
#define SLOT1 0x300000u         /* three pages, holes around */
#define SLOT1_SIZE 0x3000u
#define GUARD 0x20000u
#define CODE 0x10000u
#define HANDLERS 0x20000u
#define TABLE 0x40000u
#define LOG 0x60000u
#define DATA 0x80000u
#define ENTRIES_MAX 256
#define SECRET 0xe7
#define FS_BASE 0x7fffffff0000ull
#define GS_BASE 0xffff800000001000ull

static uint64_t rng = 88172645463325252ull;
static uint64_t rnd(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng * 0x2545f4914f6cdd1dull;
}

/* -- instructions: what stands before modrm, its reg field, immediate bytes ----------------------------- */
enum ext { EXT_NONE, EXT_AVX, EXT_AVX512 };
/* `unit` is what an EVEX instruction's one-byte displacement counts in. */
struct op { const char *name, *bytes; uint8_t len, reg, imm; enum ext ext; int unit; };
#define O(name, bytes, reg, imm) { name, bytes, sizeof(bytes) - 1, reg, imm, EXT_NONE, 1 }
#define V(name, bytes, reg, imm) { name, bytes, sizeof(bytes) - 1, reg, imm, EXT_AVX, 1 }
#define E(name, bytes, reg, imm, unit) { name, bytes, sizeof(bytes) - 1, reg, imm, EXT_AVX512, unit }
static const struct op ops[] = {
	O("mov r64,m", "\x48\x8b", 0, 0), O("mov m,r64", "\x48\x89", 2, 0), O("mov m,r8", "\x88", 2, 0), O("mov m,r16", "\x66\x89", 2, 0),
	O("mov m,imm32", "\xc7", 0, 4), O("movzx", "\x0f\xb6", 0, 0), O("add m,r32", "\x01", 2, 0), O("adc r64,m", "\x48\x13", 2, 0),
	O("cmp m,imm8", "\x80", 7, 1), O("lock xadd", "\xf0\x48\x0f\xc1", 2, 0), O("lock add", "\xf0\x83", 0, 1), O("xchg", "\x48\x87", 2, 0),
	O("cmpxchg", "\x48\x0f\xb1", 2, 0), O("lock cmpxchg8b", "\xf0\x0f\xc7", 1, 0), O("lock cmpxchg16b", "\xf0\x48\x0f\xc7", 1, 0),
	O("bt m,r64", "\x48\x0f\xa3", 2, 0), O("bts m,r32", "\x0f\xab", 2, 0), O("btc m,imm", "\x48\x0f\xba", 7, 1), O("push m", "\xff", 6, 0),
	O("pop m", "\x8f", 0, 0), O("shl m,cl", "\xd3", 4, 0), O("imul", "\x48\x0f\xaf", 2, 0), O("div", "\x48\xf7", 6, 0), O("div m8", "\xf6", 6, 0), O("idiv m16", "\x66\xf7", 7, 0), O("cmpxchg8b", "\x0f\xc7", 1, 0),
	O("neg", "\x48\xf7", 3, 0),
	O("setz", "\x0f\x94", 0, 0), O("cmovz", "\x48\x0f\x44", 2, 0), O("movsxd", "\x48\x63", 2, 0), O("movbe", "\x48\x0f\x38\xf1", 2, 0),
	O("movnti", "\x48\x0f\xc3", 2, 0), O("popcnt", "\xf3\x48\x0f\xb8", 2, 0), O("crc32", "\xf2\x48\x0f\x38\xf1", 2, 0),
	O("movups load", "\x0f\x10", 0, 0), O("movups store", "\x0f\x11", 3, 0), O("movaps", "\x0f\x28", 0, 0), O("movntdq", "\x66\x0f\xe7", 3, 0),
	O("movq store", "\x66\x0f\xd6", 3, 0), O("addsd", "\xf2\x0f\x58", 3, 0), O("cvtsi2sd", "\xf2\x48\x0f\x2a", 3, 0), O("movhps", "\x0f\x17", 3, 0),
	O("pshufd", "\x66\x0f\x70", 3, 1), O("movq mm", "\x0f\x6f", 1, 0), O("fld m80", "\xdb", 5, 0), O("fstp m80", "\xdb", 7, 0), O("fild", "\xdf", 5, 0),
	O("fstp m64", "\xdd", 3, 0), O("fnstenv", "\xd9", 6, 0), O("fnsave", "\xdd", 6, 0), O("fldcw", "\xd9", 5, 0), O("fnstcw", "\xd9", 7, 0),
	O("fxsave", "\x48\x0f\xae", 0, 0), O("fxrstor", "\x48\x0f\xae", 1, 0), O("stmxcsr", "\x0f\xae", 3, 0), O("clflush", "\x0f\xae", 7, 0),
	O("prefetch", "\x0f\x18", 1, 0), O("sgdt", "\x0f\x01", 0, 0), O("nop m", "\x0f\x1f", 0, 0), O("invlpg", "\x0f\x01", 7, 0),
	V("xsave", "\x48\x0f\xae", 4, 0), V("xsavec", "\x48\x0f\xc7", 4, 0), V("xrstor", "\x48\x0f\xae", 5, 0),
	V("vmovdqu load", "\xc5\xfe\x6f", 0, 0), V("vmovdqu store", "\xc5\xfe\x7f", 3, 0), V("vaddps", "\xc5\xe4\x58", 3, 0),
	V("vmaskmovps load", "\xc4\xe2\x6d\x2c", 3, 0), V("vmaskmovps store", "\xc4\xe2\x6d\x2e", 3, 0), V("vbroadcastsd", "\xc4\xe2\x7d\x19", 3, 0),
	V("vextracti128", "\xc4\xe3\x7d\x39", 3, 1), V("vpgatherdd", "\xc4\xe2\x6d\x90", 0, 0), V("vpgatherqq", "\xc4\xe2\xed\x91", 0, 0),
	E("vmovdqu64 zmm,m", "\x62\xf1\xfe\x48\x6f", 3, 0, 64), E("vmovdqu64 m,zmm", "\x62\xf1\xfe\x48\x7f", 3, 0, 64),
	E("vmovdqu8 zmm{k1}{z},m", "\x62\xf1\x7f\xc9\x6f", 0, 0, 64), E("vmovdqu32 m{k2},ymm", "\x62\xf1\x7e\x2a\x7f", 3, 0, 32),
	E("vmovaps zmm{k3},m", "\x62\xf1\x7c\x4b\x28", 3, 0, 64), E("vaddps zmm{k1},m32bcst", "\x62\xf1\x74\x59\x58", 3, 0, 4),
	E("vpcompressd m{k1},zmm", "\x62\xf2\x7d\x49\x8b", 3, 0, 4), E("vpexpandd zmm{k1},m", "\x62\xf2\x7d\x49\x89", 3, 0, 4),
	E("vextracti32x4 m{k2},zmm", "\x62\xf3\x7d\x4a\x39", 3, 1, 16), E("vpmovdb m{k1},zmm", "\x62\xf2\x7e\x49\x31", 3, 0, 16),
	E("vpcmpub k4{k1},ymm,m", "\x62\xf3\x7d\x29\x3e", 4, 1, 32), E("vpabsd xmm{k4},m", "\x62\xf2\x7d\x0c\x1e", 3, 0, 16),
	E("kmovq k4,m", "\xc4\xe1\xf8\x90", 4, 0, 1), E("kmovq m,k1", "\xc4\xe1\xf8\x91", 1, 0, 1),
	E("vpgatherdd zmm{k1}", "\x62\xf2\x7d\x49\x90", 0, 0, 4), E("vpscatterdd ymm{k2}", "\x62\xf2\x7d\x2a\xa0", 3, 0, 4),
};
#define NOPS (sizeof ops / sizeof *ops)

static bool has(enum ext e)
{
	return e == EXT_AVX512 ? __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") : e == EXT_NONE || __builtin_cpu_supports("avx2");
}
/* Gathers and scatters want an index. */
static bool wants_index(const struct op *o) { return strstr(o->name, "gather") || strstr(o->name, "scatter"); }

/* Without modrm: the address is in rsi, rdi, rbp or rsp. */
static const struct { const char *name, *bytes; uint8_t len; } plain[] = {
#define P(name, bytes) { name, bytes, sizeof(bytes) - 1 }
	P("movsb", "\xa4"), P("rep movsb", "\xf3\xa4"), P("rep movsq", "\xf3\x48\xa5"), P("rep stosb", "\xf3\xaa"), P("rep stosd", "\xf3\xab"),
	P("movsq", "\x48\xa5"), P("stosb", "\xaa"), P("stosq", "\x48\xab"), P("cmpsb", "\xa6"), P("cmpsq", "\x48\xa7"), P("scasb", "\xae"), P("scasw", "\x66\xaf"),
	P("lodsb", "\xac"), P("std; movsd; cld", "\xfd\xa5\xfc"), P("a32 stosd", "\x67\xab"), P("fs lodsd", "\x64\xad"), P("lodsq", "\x48\xad"), P("rep lodsw", "\xf3\x66\xad"), P("repe cmpsb", "\xf3\xa6"), P("repne scasb", "\xf2\xae"),
	P("std; rep movsb; cld", "\xfd\xf3\xa4\xfc"), P("std; rep stosq; cld", "\xfd\xf3\x48\xab\xfc"), P("a32 rep stosb", "\x67\xf3\xaa"),
	P("a32 rep movsd", "\x67\xf3\xa5"), P("fs rep lodsb", "\x64\xf3\xac"), P("xlat", "\xd7"), P("maskmovdqu", "\x66\x0f\xf7\xc1"),
	P("push", "\x50"), P("push imm", "\x6a\x11"), P("pushes", "\x50\x51\x52\x56"), P("pop", "\x58"), P("pops", "\x58\x5a\x5e"), P("leave", "\xc9"),
	P("enter", "\xc8\x20\x00\x02"), P("call", "\xe8\x00\x00\x00\x00"), P("pushf", "\x9c"), P("push fs", "\x0f\xa0"),
};
#define NPLAIN (sizeof plain / sizeof *plain)

/* -- forms of addresses ------------------------------------------------------------------------------------ */
struct form { const char *name; uint8_t seg; bool a32, rip; uint8_t mod, rm; int sib; int32_t disp; uint64_t index; unsigned scale; };
static const struct form forms[] = {
	{ .name = "[rbx]", .mod = 0, .rm = 3, .sib = -1 },
	{ .name = "[rbx-128]", .mod = 1, .rm = 3, .sib = -1, .disp = -128 },
	{ .name = "[rbx+7fffffff]", .mod = 2, .rm = 3, .sib = -1, .disp = INT32_MAX },
	{ .name = "[rbx-80000000]", .mod = 2, .rm = 3, .sib = -1, .disp = INT32_MIN },
	{ .name = "[rbx+rcx]", .mod = 0, .rm = 4, .sib = 0x0b, .index = 0xfffffffffffff123, .scale = 1 },
	{ .name = "[rbx+rcx*8+40]", .mod = 1, .rm = 4, .sib = 0xcb, .disp = 64, .index = 0xe000000000000009, .scale = 8 },
	{ .name = "[rbx+rcx*4-7fffffff]", .mod = 2, .rm = 4, .sib = 0x8b, .disp = -INT32_MAX, .index = 0x123456789abcdef, .scale = 4 },
	{ .name = "[ebx]", .a32 = true, .mod = 0, .rm = 3, .sib = -1 },
	{ .name = "[ebx+ecx*4-80]", .a32 = true, .mod = 1, .rm = 4, .sib = 0x8b, .disp = -128, .index = 0xdeadbeefc0000001, .scale = 4 },
	{ .name = "fs:[rbx]", .seg = 0x64, .mod = 0, .rm = 3, .sib = -1 },
	{ .name = "gs:[rbx+8]", .seg = 0x65, .mod = 1, .rm = 3, .sib = -1, .disp = 8 },
	{ .name = "fs:[ebx]", .seg = 0x64, .a32 = true, .mod = 0, .rm = 3, .sib = -1 },
	{ .name = "[rip]", .rip = true, .mod = 0, .rm = 5, .sib = -1 },
};
#define NFORMS (sizeof forms / sizeof *forms)

static uint64_t seg_base(const struct form *f) { return f->seg == 0x64 ? FS_BASE : f->seg == 0x65 ? GS_BASE : 0; }

/* -- a case ------------------------------------------------------------------------------------------------- */
struct entry { uint64_t rbx, rcx, rsi, rdi, rbp, rsp, pad[2]; };
struct test { char name[96]; uint8_t insn[32]; unsigned len, n; int32_t disp; struct entry e[ENTRIES_MAX]; uint8_t ymm[4][32]; };

static const uint64_t edges[] = { 0, MEM, SLOT1, SLOT1 + SLOT1_SIZE, SLOT1 + 0x1000, 0x40000000, 0x100000000, 0x800000000000, 0xffff800000000000, DATA + 0x1000 };
static const int offsets[] = { -513, -65, -64, -33, -32, -31, -17, -16, -15, -9, -8, -7, -5, -4, -3, -2, -1, 0, 1, 3, 16 };

static unsigned targets(uint64_t *t)
{
	unsigned n = 0;

	for (unsigned e = 0; e < sizeof edges / sizeof *edges; e++)
		for (unsigned o = 0; o < sizeof offsets / sizeof *offsets; o++) {
			if (!edges[e] && offsets[o] > 16)
				continue;
			t[n++] = edges[e] + (uint64_t)(int64_t)offsets[o];
		}
	for (unsigned k = 0; k < 20; k++)
		t[n++] = k & 1 ? DATA + rnd() % 0x7f000 : rnd();
	for (unsigned k = 0; k < n; k++) {      /* in any order */
		unsigned j = (unsigned)(rnd() % n);
		uint64_t v = t[k];

		t[k] = t[j];
		t[j] = v;
	}
	return n;
}

static void vectors(struct test *t)
{
	for (unsigned r = 0; r < 4; r++)
		for (unsigned k = 0; k < 8; k++) {
			uint32_t v = (uint32_t)rnd() | 0x80000000u;

			if (r == 1)             /* indexes: a few small ones */
				v = k & 1 ? (uint32_t)(rnd() % 4096) : (uint32_t)rnd();
			memcpy(t->ymm[r] + 4 * k, &v, 4);
			/* Stores to places that follow each other leave a row of their first bytes. */
			for (unsigned n = 4 * k; n < 4 * k + 4; n++)
				t->ymm[r][n] -= t->ymm[r][n] == SECRET;
		}
}

static void put(struct test *t, const void *p, unsigned n)
{
	memcpy(t->insn + t->len, p, n);
	t->len += n;
}

static void encode(struct test *t, const struct op *o, const struct form *f, uint64_t rip_target)
{
	uint8_t modrm = (uint8_t)(f->mod << 6 | o->reg << 3 | f->rm);
	int32_t disp = f->mod == 1 ? f->disp / o->unit : f->disp;

	memset(t, 0, sizeof *t);
	t->disp = f->mod == 1 ? disp * o->unit : disp;
	snprintf(t->name, sizeof t->name, "%s %s", o->name, f->name);
	if (f->a32)
		put(t, "\x67", 1);
	if (f->seg)
		put(t, &f->seg, 1);
	put(t, o->bytes, o->len);
	put(t, &modrm, 1);
	if (f->sib >= 0)
		put(t, &(uint8_t){ (uint8_t)f->sib }, 1);
	if (f->rip)     /* the instruction's place is known: see load() */
		disp = (int32_t)(rip_target - (CODE + 0x100 + t->len + 4 + o->imm));
	if (f->mod == 1)
		put(t, &(int8_t){ (int8_t)disp }, 1);
	else if (f->mod == 2 || f->rip)
		put(t, &disp, 4);
	put(t, "\x05\x01\x02\x03", o->imm);
	vectors(t);
}

static void aim(struct test *t, const struct form *f)
{
	uint64_t at[ENTRIES_MAX];

	t->n = f->rip ? 3 : targets(at);
	for (unsigned k = 0; k < t->n; k++) {
		struct entry *e = &t->e[k];

		*e = (struct entry){ .rcx = f->index ? f->index : rnd() % 64, .rsi = DATA, .rdi = DATA + 4096, .rbp = DATA + 8192, .rsp = DATA + 0x4000 };
		if (f->rip)
			continue;
		e->rbx = at[k] - (uint64_t)(int64_t)t->disp - f->index * f->scale - seg_base(f);
		if (f->a32)     /* what lies above 32 bits must not count */
			e->rbx = (uint32_t)e->rbx | (k & 1 ? rnd() << 32 : 1ull << 32);
	}
}

static void aim_plain(struct test *t, unsigned which)
{
	uint64_t at[ENTRIES_MAX];

	memset(t, 0, sizeof *t);
	snprintf(t->name, sizeof t->name, "%s", plain[which].name);
	put(t, plain[which].bytes, plain[which].len);
	vectors(t);
	t->n = targets(at);
	for (unsigned k = 0; k < t->n; k++) {
		uint64_t other = DATA + 0x2000 + rnd() % 4096;
		unsigned how = (unsigned)(rnd() % 3);

		t->e[k] = (struct entry){ .rbx = at[k] - 0x41, .rcx = rnd() % 40, .rsi = how == 0 ? other : at[k], .rdi = how == 1 ? other : at[k], .rbp = at[k], .rsp = at[k] };
	}
}

/* -- the guest ------------------------------------------------------------------------------------------------ */
/* loop: registers from the table at r15; the instruction at CODE + 0x100; done: to the log at r14. */
GUEST_ASM(head, 64, "1: mov (%r15), %rbx; mov 8(%r15), %rcx; mov 16(%r15), %rsi; mov 24(%r15), %rdi; mov 32(%r15), %rbp; mov 40(%r15), %rsp;"
	  "mov $0x44434241, %eax; movabs $0x0102030405060708, %rdx; cld; jmp 1b + 0x100");
GUEST_ASM(tail, 64, "mov %rax, (%r14); mov %rcx, 8(%r14); mov %rdx, 16(%r14); mov %rsi, 24(%r14); mov %rdi, 32(%r14); mov %rsp, 40(%r14); mov %rbx, 48(%r14);"
	  "2: add $64, %r14; add $64, %r15; dec %r13; jz 3f; jmp *%r12; 3: out %al, $0xf4; jmp 3b");
/* r11: label 2. The vector comes in al by the stub; IST 1 is the stack. */
GUEST_ASM(handler, 64, "movzbl %al, %eax; mov %rax, 56(%r14); mov (%rsp), %rax; mov %rax, 40(%r14); mov %cr2, %rax; mov %rax, 48(%r14); mov %rcx, 8(%r14);"
	  "mov %rsi, 24(%r14); mov %rdi, 32(%r14); cld; jmp *%r11");
#define TAIL_LABEL 27   /* of 2: in tail */

struct pass {
	struct guest g;
	uint8_t *slot1;         /* with GUARD around */
	uint8_t *planted[256];
	unsigned nplanted;
};
struct end { struct kvm_regs r; uint8_t mem[MEM], slot1[SLOT1_SIZE]; uint64_t mmio, exits; int last; };

static uint8_t image[MEM], image1[SLOT1_SIZE];

/* Pages of ours beside every mapping that there is: softkvm's tables, code areas and context among them. */
static void plant(struct pass *p)
{
	FILE *f = fopen("/proc/self/maps", "r");
	unsigned long from, to;
	char line[512];

	assert_non_null(f);
	while (fgets(line, sizeof line, f) && p->nplanted < 254) {
		unsigned long at[2];

		if (sscanf(line, "%lx-%lx", &from, &to) != 2 || strstr(line, "[stack") || strstr(line, "[v"))
			continue;
		at[0] = from - 4096;
		at[1] = to;
		for (unsigned k = 0; k < 2; k++) {
			uint8_t *q = mmap((void *)at[k], 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

			if (q == MAP_FAILED)
				continue;
			memset(q, SECRET, 4096);
			p->planted[p->nplanted++] = q;
		}
	}
	fclose(f);
	assert_true(p->nplanted > 4);
}

static void start(struct pass *p, const char *mode)
{
	struct kvm_xcrs x = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = has(EXT_AVX512) ? 0xe7 : 7 } } };
	struct kvm_sregs s;

	memset(p, 0, sizeof *p);
	setenv("LODGE_SOFT_MODE", mode, 1);
	guest_create(&p->g, &(struct guest_cfg){ .prov = GUEST_SOFT, .mem_size = MEM, .guard = GUARD });
	memset(p->g.mem - GUARD, SECRET, GUARD);
	memset(p->g.mem + MEM, SECRET, GUARD);
	p->slot1 = mmap(NULL, SLOT1_SIZE + 2 * GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_ptr_not_equal(p->slot1, MAP_FAILED);
	memset(p->slot1, SECRET, SLOT1_SIZE + 2 * GUARD);
	assert_int_equal(gioctl(&p->g.vm, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region){ .slot = 1, .guest_phys_addr = SLOT1,
		.memory_size = SLOT1_SIZE, .userspace_addr = (uintptr_t)p->slot1 + GUARD }, NULL), 0);
	guest_long64(&p->g, 0, CODE);
	guest_get_sregs(&p->g, 0, &s);
	s.cr4 |= 0x40000;
	s.fs.base = FS_BASE;
	s.gs.base = GS_BASE;
	guest_set_sregs(&p->g, 0, &s);
	if (has(EXT_AVX))
		assert_int_equal(gioctl(&p->g.vcpu[0], KVM_SET_XCRS, &x, NULL), 0);
	plant(p);
}

static void finish(struct pass *p)
{
	for (unsigned k = 0; k < p->nplanted; k++)
		munmap(p->planted[k], 4096);
	munmap(p->slot1, SLOT1_SIZE + 2 * GUARD);
	guest_destroy(&p->g);
}

static void entry(struct pass *p, unsigned table, unsigned n, uint64_t v) { memcpy(p->g.mem + table + 8 * n, &v, 8); }

/* At 4 GiB and at the very top of the address space there are other pages: what fails to wrap, or to be cut, finds one of these. */
static void aliases(struct pass *p)
{
	for (unsigned n = 0; n < 512; n++)
		entry(p, 0x9000, n, (uint64_t)((DATA >> 12) + (n + 37) % 128) << 12 | 3);
	entry(p, 0x8000, 0, 0x9000 | 3);
	entry(p, 0x4000, 4, 0x8000 | 3);
	entry(p, 0x3000, 511, 0xa000 | 3);
	entry(p, 0xa000, 511, 0xb000 | 3);
	entry(p, 0xb000, 511, 0x9000 | 3);
}

/* Once, from a pass's set-up: page tables, GDT, gates; data without the secret byte. */
static void make_image(struct pass *p)
{
	for (unsigned v = 0; v < 32; v++) {
		uint8_t stub[16] = { 0xb0, (uint8_t)v, 0xe9 };  /* mov $v, %al ; jmp handler */
		int32_t rel = (int32_t)(HANDLERS + 0x1000) - (int32_t)(HANDLERS + v * 16 + 7);

		memcpy(stub + 3, &rel, 4);
		guest_load(&p->g, HANDLERS + v * 16, stub, sizeof stub);
		guest_gate(&p->g, 64, v, HANDLERS + v * 16, 0);
		p->g.mem[0x2000 + v * 16 + 4] = 1;      /* IST 1 */
	}
	aliases(p);
	memcpy(p->g.mem + 0x1200 + 36, &(uint64_t){ 0x7000 }, 8);
	guest_load(&p->g, HANDLERS + 0x1000, handler, (size_t)(handler_end - handler));
	for (unsigned k = DATA; k < MEM; k++)
		p->g.mem[k] = (uint8_t)(rnd() % 0xe0);
	for (unsigned k = 0; k < SLOT1_SIZE; k++)
		image1[k] = (uint8_t)(rnd() % 0xe0);
	memcpy(image, p->g.mem, MEM);
}

static void load(struct pass *p, const struct test *t)
{
	uint8_t *m = p->g.mem;
	unsigned at = CODE + 0x100;

	memcpy(m, image, MEM);
	memcpy(p->slot1 + GUARD, image1, SLOT1_SIZE);
	memcpy(m + CODE, head, (size_t)(head_end - head));
	memcpy(m + at, t->insn, t->len);
	memcpy(m + at + t->len, tail, (size_t)(tail_end - tail));
	memcpy(m + TABLE, t->e, t->n * sizeof *t->e);
	softkvm_code_written(p->g.vm.f, 0, MEM);
}

static unsigned opmask_offset(void)
{
	unsigned a, b = 0, c, d;

	__get_cpuid_count(0xd, 5, &a, &b, &c, &d);
	return b;
}

static void set_state(struct pass *p, const struct test *t)
{
	struct kvm_fpu f = { .fcw = 0x37f, .mxcsr = 0x1f80 };
	struct kvm_xsave *x = calloc(1, sizeof *x);
	struct kvm_sregs s;

	/* The tables are new: no translation may be left that knows of accessed bits in the old ones. */
	guest_get_sregs(&p->g, 0, &s);
	s.cr2 = 0;
	guest_set_sregs(&p->g, 0, &s);
	assert_int_equal(gioctl(&p->g.vcpu[0], KVM_SET_FPU, &f, NULL), 0);
	assert_int_equal(gioctl(&p->g.vcpu[0], KVM_GET_XSAVE, x, NULL), 0);
	for (unsigned r = 0; r < 4; r++) {
		memcpy((uint8_t *)x + 160 + 16 * r, t->ymm[r], 16);
		if (has(EXT_AVX))
			memcpy((uint8_t *)x + 576 + 16 * r, t->ymm[r] + 16, 16);
	}
	x->region[128] = has(EXT_AVX) ? 7 : 3;
	if (has(EXT_AVX512)) {          /* opmasks: every second, the upper and lower ends, all, none */
		static const uint64_t k[5] = { 0, 0x5555555555555555, 0x8000000000008101, ~0ull, 0 };

		x->region[128] |= 0x20;
		memcpy((uint8_t *)x + opmask_offset(), k, sizeof k);
	}
	assert_int_equal(gioctl(&p->g.vcpu[0], KVM_SET_XSAVE, x, NULL), 0);
	free(x);
	guest_set_regs(&p->g, 0, &(struct kvm_regs){ .rip = CODE, .rflags = 2, .rsp = DATA, .r15 = TABLE, .r14 = LOG, .r13 = t->n, .r12 = CODE,
		.r11 = CODE + 0x100 + t->len + TAIL_LABEL });
}

static uint64_t mix(uint64_t h, uint64_t v) { return (h ^ v) * 0x9e3779b97f4a7c15ull ^ h >> 29; }

static void run(struct pass *p, const struct test *t, struct end *e)
{
	struct kvm_run *r = p->g.run[0];

	memset(e, 0, sizeof *e);
	load(p, t);
	set_state(p, t);
	for (;;) {
		e->last = guest_run(&p->g, 0);
		if (e->last != KVM_EXIT_MMIO)
			break;
		e->exits++;
		e->mmio = mix(mix(mix(e->mmio, r->mmio.phys_addr), r->mmio.len), r->mmio.is_write);
		for (unsigned k = 0; k < r->mmio.len && r->mmio.is_write; k++)
			e->mmio = mix(e->mmio, r->mmio.data[k]);
		if (!r->mmio.is_write)
			memset(r->mmio.data, 0x5a, 8);
	}
	guest_get_regs(&p->g, 0, &e->r);
	memcpy(e->mem, p->g.mem, MEM);
	memcpy(e->slot1, p->slot1 + GUARD, SLOT1_SIZE);
}

/* -- verdicts -------------------------------------------------------------------------------------------------- */
static bool intact(const uint8_t *p, size_t n, const char *what)
{
	for (size_t k = 0; k < n; k++)
		if (p[k] != SECRET) {
			print_message("%s: byte %zx is %02x\n", what, k, p[k]);
			return false;
		}
	return true;
}

static bool canaries(const struct pass *p)
{
	bool ok = intact(p->g.mem - GUARD, GUARD, "before slot 0");

	ok &= intact(p->g.mem + MEM, GUARD, "behind slot 0");
	ok &= intact(p->slot1, GUARD, "before slot 1");
	ok &= intact(p->slot1 + GUARD + SLOT1_SIZE, GUARD, "behind slot 1");
	for (unsigned k = 0; k < p->nplanted; k++)
		ok &= intact(p->planted[k], 4096, "beside softkvm's memory");
	return ok;
}

static bool secret_in(const void *p, size_t n) { return memmem(p, n, "\xe7\xe7\xe7\xe7", 4); }

static bool same(const struct end *a, const struct end *b)
{
	bool ok = !memcmp(&a->r, &b->r, sizeof a->r) && a->mmio == b->mmio && a->exits == b->exits && a->last == b->last;

	for (unsigned k = 0; k < MEM; k++)
		if (a->mem[k] != b->mem[k]) {
			print_message("memory at %x: %02x interpreted, %02x translated\n", k, a->mem[k], b->mem[k]);
			ok = false;
			break;
		}
	return ok && !memcmp(a->slot1, b->slot1, sizeof a->slot1);
}

static struct pass passes[3];
static unsigned done, exceptions;

static bool one(const struct test *t)
{
	static struct end ends[3];
	bool ok = true;

	for (unsigned k = 0; k < 3; k++) {
		run(&passes[k], t, &ends[k]);
		ok &= canaries(&passes[k]) && !secret_in(&ends[k].r, sizeof ends[k].r) && !secret_in(ends[k].mem, MEM) && !secret_in(ends[k].slot1, SLOT1_SIZE);
		ok &= ends[k].last == KVM_EXIT_IO;
		if (k)
			ok &= same(&ends[0], &ends[k]);
		if (!ok) {
			print_message("%s: pass %u, exit %d, %" PRIu64 " MMIO exits, rip %llx\n", t->name, k, ends[k].last, ends[k].exits, ends[k].r.rip);
			return false;
		}
	}
	for (unsigned n = 0; n < t->n; n++)
		exceptions += ends[0].mem[LOG + 64 * n + 56] != 0;
	done += t->n;
	return true;
}

static unsigned directed(void)
{
	static const uint64_t rip[] = { -16ull, -8ull, -3ull, MEM - 8, MEM - 3, SLOT1 - 4, SLOT1 + SLOT1_SIZE - 12, 0x3ffffffc };
	static struct test t;
	unsigned bad = 0;

	for (unsigned o = 0; o < NOPS; o++)
		for (unsigned f = 0; f < NFORMS && has(ops[o].ext); f++) {
			if (wants_index(&ops[o]) && forms[f].sib < 0)
				continue;
			for (unsigned k = 0; k < (forms[f].rip ? sizeof rip / sizeof *rip : 1); k++) {
				encode(&t, &ops[o], &forms[f], rip[k]);
				aim(&t, &forms[f]);
				bad += !one(&t);
			}
		}
	for (unsigned k = 0; k < NPLAIN; k++) {
		aim_plain(&t, k);
		bad += !one(&t);
	}
	return bad;
}

/* Forms that nobody thought of: any displacement, any index. */
static unsigned random_cases(unsigned n)
{
	static struct test t;
	unsigned bad = 0;

	while (n--) {
		const struct op *o = &ops[rnd() % NOPS];
		struct form f = forms[rnd() % (NFORMS - 1)];

		if (!has(o->ext) || (wants_index(o) && f.sib < 0))
			continue;
		if (f.mod == 2)
			f.disp = (int32_t)rnd();
		if (f.index)
			f.index = rnd() & 1 ? rnd() : rnd() >> 32;
		encode(&t, o, &f, 0);
		aim(&t, &f);
		bad += !one(&t);
	}
	return bad;
}

static unsigned nrandom = 150;

static void test_escape(void **st)
{
	static const char *const modes[3] = { "interp", "translate-at-once", "translate" };
	unsigned bad;

	for (unsigned k = 0; k < 3; k++)
		start(&passes[k], modes[k]);
	make_image(&passes[0]);
	bad = directed() + random_cases(nrandom);
	for (unsigned k = 0; k < 3; k++)
		finish(&passes[k]);
	print_message("%u accesses in three passes, %u exceptions in each\n", done, exceptions);
	assert_int_equal(bad, 0);
	assert_true(exceptions > done / 4 && exceptions < done / 4 * 3);
}

int main(int argc, char **argv)
{
	static const struct option long_opts[] = { { "random", 1, 0, 'r' }, { "seed", 1, 0, 's' }, { 0 } };
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_escape) };
	int o;

	while ((o = getopt_long(argc, argv, "", long_opts, NULL)) != -1) {
		if (o == 'r')
			nrandom = (unsigned)strtoul(optarg, NULL, 0);
		else if (o == 's')
			rng ^= strtoull(optarg, NULL, 0) * 0x9e3779b97f4a7c15ull;
		else
			return 2;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
