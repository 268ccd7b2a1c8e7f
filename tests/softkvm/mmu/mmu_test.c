/*
 * The MMU on its own: page walks against an independent model of the permission rules, TLB, crossings,
 * dirty log, code versions, MMIO log. The rest of the engine is replaced by a few lines at the end.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "softkvm/bus.h"
#include "softkvm/insn.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/sys.h"

#define RAM_SIZE (8u << 20)
#define PT_BASE 0x100000ull             /* PML4, PDPT, PD, PT in four pages */
#define DATA 0x200000ull                /* physical page that LIN maps to */
#define LIN 0x00007f1234567000ull

static struct {
	struct vm vm;
	struct cpu cpu;
	struct kvm_run run;
	uint8_t *ram;
	bool raised;
	unsigned vector;
	uint32_t error;
	uint64_t addr;
	enum unwind unwind;
	unsigned left;          /* cpu_leave_after() calls */
} t;

static const struct cpu_features feat = { .phys_bits = 40, .f80000001_edx = BIT(26) };

static void set_slot(uint32_t id, uint64_t gpa, uint64_t size, uint8_t *host, uint32_t flags, int want)
{
	struct kvm_userspace_memory_region r = { id, flags, gpa, size, (uintptr_t)host };
	assert_int_equal(phys_set_region(&t.vm, &r), want);
}

static int setup(void **state)
{
	memset(&t, 0, sizeof t);
	pthread_mutex_init(&t.vm.lock, NULL);
	t.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	t.cpu.vm = &t.vm;
	t.cpu.run = &t.run;
	t.cpu.feat = &feat;
	atomic_store(&t.vm.cpus[0], &t.cpu);
	atomic_store(&t.vm.ncpus, 1);
	set_slot(0, 0, RAM_SIZE, t.ram, 0, 0);
	assert_int_equal(mmu_cpu_init(&t.cpu), 0);
	t.cpu.efer = EFER_LMA | EFER_LME | EFER_NXE;
	t.cpu.cr0 = CR0_PE | CR0_PG | CR0_WP;
	t.cpu.cr4 = CR4_PAE;
	t.cpu.cr3 = PT_BASE;
	t.cpu.code_bits = 64;
	mmu_select(&t.cpu);
	return 0;
}

static int teardown(void **state)
{
	mmu_cpu_free(&t.cpu);
	phys_free(&t.vm);
	munmap(t.ram, RAM_SIZE);
	return 0;
}

static uint64_t *entry(int level) /* 3 = PML4 .. 0 = PT, for LIN */
{
	uint64_t page = PT_BASE + (uint64_t)(3 - level) * 4096;
	return (uint64_t *)(t.ram + page) + ((LIN >> (12 + 9 * level)) & 511);
}

static void map(uint64_t upper, uint64_t leaf)
{
	for (int l = 3; l > 0; l--)
		*entry(l) = (PT_BASE + (uint64_t)(4 - l) * 4096) | upper;
	*entry(0) = DATA | leaf;
}

/* Run one access; true when it did not fault. */
static bool try_access(enum access acc, uint64_t lin, void *buf, unsigned len)
{
	t.raised = false;
	t.unwind = UNWIND_NONE;
	if (setjmp(t.cpu.unwind))
		return false;
	if (acc == ACC_EXEC) {
		struct code_page p;
		mmu_fetch(&t.cpu, lin, &p);
	} else if (acc == ACC_WRITE) {
		mem_write(&t.cpu, lin, buf, len);
	} else {
		mem_read(&t.cpu, lin, buf, len);
	}
	return true;
}

/* The rules of SDM vol. 3 section 4.6 written down once more, in other words. */
static bool model_allows(uint64_t up, uint64_t leaf, enum access acc, bool user, bool ac)
{
	const struct cpu *c = &t.cpu;
	bool u = (up & PTE_U) && (leaf & PTE_U), w = (up & PTE_W) && (leaf & PTE_W), nx = (up | leaf) & PTE_NX;

	if (!(up & PTE_P) || !(leaf & PTE_P))
		return false;
	if (user)
		return u && !(acc == ACC_WRITE && !w) && !(acc == ACC_EXEC && nx);
	if (acc == ACC_EXEC)
		return !nx && !(u && (c->cr4 & CR4_SMEP));
	if (u && (c->cr4 & CR4_SMAP) && !ac)
		return false;
	return !(acc == ACC_WRITE && !w && (c->cr0 & CR0_WP));
}

static const uint64_t bits[] = { 0, PTE_P, PTE_P | PTE_W, PTE_P | PTE_U, PTE_P | PTE_U | PTE_W,
	PTE_P | PTE_NX, PTE_P | PTE_W | PTE_U | PTE_NX };

static void check_one(uint64_t up, uint64_t leaf, enum access acc, bool user, bool ac)
{
	uint64_t v = 0x1122334455667788;
	struct cpu *c = &t.cpu;

	map(up, leaf);
	c->cpl = user ? 3 : 0;
	c->eflags = ac ? FL_AC : 0;
	mmu_flush_all(c);
	mmu_select(c);
	bool want = model_allows(up, leaf, acc, user, ac && !user);
	for (int twice = 0; twice < 2; twice++) { /* the second time through the TLB */
		assert_int_equal(try_access(acc, LIN + 8, &v, 8), want);
		if (want)
			continue;
		assert_int_equal(t.vector, EXC_PF);
		assert_int_equal(t.addr, LIN + 8);
		uint32_t code = (up & leaf & PTE_P ? PF_P : 0) | (user ? PF_U : 0) | (acc == ACC_WRITE ? PF_W : 0) |
			(acc == ACC_EXEC ? PF_I : 0);
		assert_int_equal(t.error, code);
		assert_false(*entry(0) & (PTE_A | PTE_D));
	}
	if (want) {
		assert_true(*entry(0) & PTE_A);
		assert_int_equal(!!(*entry(0) & PTE_D), acc == ACC_WRITE);
		assert_true(*entry(3) & PTE_A);
	}
}

static void test_permissions(void **state)
{
	static const enum access acc[] = { ACC_READ, ACC_WRITE, ACC_EXEC };

	for (unsigned m = 0; m < 8; m++) {
		t.cpu.cr0 = CR0_PE | CR0_PG | (m & 1 ? CR0_WP : 0);
		t.cpu.cr4 = CR4_PAE | (m & 2 ? CR4_SMEP : 0) | (m & 4 ? CR4_SMAP : 0);
		for (unsigned u = 0; u < ARRAY_SIZE(bits); u++)
			for (unsigned l = 0; l < ARRAY_SIZE(bits); l++)
				for (unsigned k = 0; k < 3 * 4; k++)
					check_one(bits[u], bits[l], acc[k % 3], k / 3 & 1, k / 6);
	}
}

static void test_reserved_and_keys(void **state)
{
	uint64_t v;

	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_U | BIT(41));
	assert_false(try_access(ACC_READ, LIN, &v, 8));
	assert_int_equal(t.error, PF_P | PF_RSVD);
	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_U | 3ull << 59);
	t.cpu.cr4 |= CR4_PKE;
	t.cpu.cpl = 3;
	mmu_select(&t.cpu);
	t.cpu.pkru = 2u << 6;   /* key 3: no writes */
	assert_true(try_access(ACC_READ, LIN, &v, 8));
	assert_false(try_access(ACC_WRITE, LIN, &v, 8));
	assert_int_equal(t.error, PF_P | PF_PK | PF_W | PF_U);
	t.cpu.pkru = 1u << 6;
	mmu_flush_all(&t.cpu);
	assert_false(try_access(ACC_READ, LIN, &v, 8));
	assert_int_equal(t.error, PF_P | PF_PK | PF_U);
}

/* -- fills of translated code ------------------------------------------------------------------- */
static uint64_t rng = 88172645463325252ull;

static uint64_t below(uint64_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return (rng * 0x2545f4914f6cdd1dull >> 16) % n;
}

static uint64_t maybe(uint64_t bit, unsigned of) { return below(of) ? bit : 0; }

static uint64_t some_leaf(void)
{
	return maybe(PTE_P, 16) | maybe(PTE_W, 4) | maybe(PTE_U, 4) | maybe(PTE_A, 4) | maybe(PTE_D, 4) | (below(8) ? 0 : PTE_NX) |
	       (below(4) ? 0 : PTE_G) | (below(32) ? 0 : BIT(41)) | (below(3) ? 0 : below(16) << 59);
}

/* Three pages, or a large one that holds them; some way that rights, A and D may be. */
static void some_mapping(void)
{
	map(PTE_P | maybe(PTE_W, 6) | maybe(PTE_U, 6) | (below(6) ? 0 : PTE_NX), 0);
	for (unsigned n = 0; n < 3; n++)
		entry(0)[n] = (DATA + (n ^ 1) * 0x3000) | some_leaf();
	if (!below(3))
		*entry(1) = 0x400000 | (some_leaf() & ~BIT(41)) | PTE_PS;
}

static void some_cpu(struct cpu *c)
{
	c->cr0 = CR0_PE | CR0_PG | maybe(CR0_WP, 3);
	c->cr4 = CR4_PAE | maybe(CR4_SMAP, 2) | maybe(CR4_PKE, 3) | maybe(CR4_PGE, 2);
	c->efer = EFER_LMA | EFER_LME | maybe(EFER_NXE, 4);
	c->pkru = (uint32_t)below(4) << 2 * below(16);
	c->cpl = below(2) ? 3 : 0;
	c->eflags = maybe(FL_AC, 2);
	mmu_flush_all(c);
	mmu_select(c);
}

/* What a fill gives is what the slow path gives, and where that faults there is none. */
static unsigned fill_once(bool write)
{
	uint64_t size = 1 + below(64), off = below(3) ? below(8192) : 4096 - below(64), lin = LIN + off, gpa;
	bool crosses = (lin & 4095) + size > 4096, w, u;
	struct cpu *c = &t.cpu;
	uint8_t buf[64], *p;

	p = write ? mmu_fill_w(c, lin, size) : mmu_fill_r(c, lin, size);
	if (!p)
		return 0;
	assert_false(crosses && write);
	for (unsigned n = 0; n < size; n++) {
		assert_true(mmu_translate(c, lin + n, &gpa, &w, &u));
		if (crosses)
			assert_int_equal(p[n], t.ram[gpa]);
		else
			assert_ptr_equal(p + n, t.ram + gpa);
	}
	assert_int_equal((uintptr_t)p & 63, lin & 63);
	assert_true((*entry(1) & PTE_PS ? *entry(1) : entry(0)[(lin - LIN) >> 12]) & PTE_A);
	assert_true(!write || (*entry(1) & PTE_PS ? *entry(1) : entry(0)[(lin - LIN) >> 12]) & PTE_D);
	mmu_drop_data(c);
	memcpy(buf, p, size);
	assert_true(try_access(write ? ACC_WRITE : ACC_READ, lin, buf, (unsigned)size));
	return crosses ? 2 : 1;
}

static void test_fill(void **state)
{
	unsigned got[2][3] = { { 0 } };
	uint64_t v = 0;

	for (unsigned n = 0; n < RAM_SIZE - DATA; n++)
		t.ram[DATA + n] = (uint8_t)(n * 7 + n / 251);
	for (unsigned n = 0; n < 100000; n++) {
		bool write = below(2);

		some_mapping();
		some_cpu(&t.cpu);
		/* what lies near by was touched, perhaps the page itself too; the page directory's entry is known then */
		try_access(below(2) ? ACC_WRITE : ACC_READ, LIN + 4096 * below(3) + 128, &v, 8);
		got[write][fill_once(write)]++;
	}
	assert_in_range(got[0][0], 10000, 40000);
	assert_in_range(got[1][0], 10000, 45000);
	assert_true(got[0][1] > 2000 && got[0][2] > 1000 && got[1][1] > 1000);
}

/* Stores beside a page's code need no slow path; those to it, and whatever page tables or the dirty log forbid by now, do. */
static void test_fill_beside_code(void **state)
{
	struct cpu *c = &t.cpu;
	struct slot *s;
	uint8_t *data = phys_ptr(&t.vm, DATA, NULL, NULL, &s);
	struct code_page p = { .gpa = DATA, .host = data, .ver = &s->ver[DATA >> 12], .lines = &s->lines[DATA >> 12] };
	uint64_t v = 7;
	uint32_t ver;

	map(PTE_P | PTE_W, PTE_P | PTE_W);
	assert_true(try_access(ACC_WRITE, LIN, &v, 8));
	assert_non_null(tlb_hit_w(c, LIN, 8));
	ver = mmu_code_mark(c, &p);
	mmu_code_lines(c, &p, 128, 64);
	for (unsigned n = 0; n < 2; n++) {      /* by a walk, and by the entry that it left */
		assert_ptr_equal(mmu_fill_w(c, LIN + 120, 8), data + 120);
		assert_ptr_equal(mmu_fill_w(c, LIN + 192, 64), data + 192);
		assert_null(mmu_fill_w(c, LIN + 121, 8));
		assert_null(mmu_fill_w(c, LIN + 191, 1));
		assert_null(tlb_hit_w(c, LIN + 512, 8));
		assert_null(tlb_hit_w(c, LIN + 4096, 8));
	}
	assert_int_equal(atomic_load(p.ver), ver);
	assert_false(atomic_load(&c->code_store));
	atomic_store(&t.vm.ncpus, 2);           /* somebody may have to wait for it */
	assert_non_null(mmu_fill_w(c, LIN + 1024, 8));
	assert_true(atomic_load(&c->code_store));
	atomic_store(&t.vm.ncpus, 1);
	assert_true(try_access(ACC_WRITE, LIN + 140, &v, 8));
	assert_int_not_equal(atomic_load(p.ver), ver);
	ver = mmu_code_mark(c, &p);
	/* It is data if nothing else happens to it for long. */
	unsigned n = 0;
	while (mmu_fill_w(c, LIN + 8 * (n % 16), 8))
		assert_true(++n < 100000);
	assert_in_range(n, 256, 100000);
	assert_int_equal(atomic_load(p.ver), ver);
	assert_true(try_access(ACC_WRITE, LIN, &v, 8));
	assert_int_not_equal(atomic_load(p.ver), ver);
	assert_non_null(tlb_hit_w(c, LIN, 8));
	/* The entry lives and dies as others. */
	mmu_code_mark(c, &p);
	mmu_code_lines(c, &p, 128, 64);
	assert_non_null(mmu_fill_w(c, LIN, 8));
	*entry(0) &= ~(uint64_t)PTE_W;
	mmu_flush_page(c, LIN);
	try_access(ACC_READ, LIN, &v, 8);
	assert_null(mmu_fill_w(c, LIN, 8));
	*entry(0) |= PTE_W;
	mmu_flush_page(c, LIN);
	try_access(ACC_READ, LIN, &v, 8);
	assert_non_null(mmu_fill_w(c, LIN, 8));
	*entry(0) &= ~(uint64_t)PTE_W;
	mmu_flush_all(c);
	try_access(ACC_READ, LIN, &v, 8);
	assert_null(mmu_fill_w(c, LIN, 8));
}

static void test_crossing(void **state)
{
	uint8_t in[16], out[16] = { 0 };

	for (unsigned i = 0; i < 16; i++)
		in[i] = (uint8_t)(i + 1);
	map(PTE_P | PTE_W, PTE_P | PTE_W);
	entry(0)[1] = (DATA + 0x5000) | PTE_P;
	/* the second page is read-only: nothing of the first is written */
	assert_false(try_access(ACC_WRITE, LIN + 4096 - 8, in, 16));
	assert_int_equal(t.addr, LIN + 4096);
	assert_int_equal(t.ram[DATA + 4095], 0);
	entry(0)[1] |= PTE_W;
	assert_true(try_access(ACC_WRITE, LIN + 4096 - 8, in, 16));
	assert_memory_equal(t.ram + DATA + 4088, in, 8);
	assert_memory_equal(t.ram + DATA + 0x5000, in + 8, 8);
	assert_true(try_access(ACC_READ, LIN + 4096 - 8, out, 16));
	assert_memory_equal(in, out, 16);
}

/*
 * An entry lost its write permission without a flush: a store may go by the old one until some access has met the new one
 * (the user's, who has no entry in the TLB). After that #PF no store may pass.
 */
static void user_writes(uint64_t lin, uint64_t faults_at)
{
	uint64_t two[2] = { 2, 3 };

	t.cpu.cpl = 3;
	mmu_select(&t.cpu);
	assert_false(try_access(ACC_WRITE, lin, two, 16));
	assert_int_equal(t.addr, faults_at);
	t.cpu.cpl = 0;
	mmu_select(&t.cpu);
}

static void test_fault_drops_entry(void **state)
{
	uint64_t v = 1;

	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_U);
	entry(0)[1] = (DATA + 4096) | PTE_P | PTE_W | PTE_U;
	assert_true(try_access(ACC_WRITE, LIN + 4088, &v, 8));
	assert_true(try_access(ACC_WRITE, LIN + 4096, &v, 8));
	*entry(0) &= ~(uint64_t)PTE_W;
	user_writes(LIN + 4088, LIN + 4088);
	assert_false(try_access(ACC_WRITE, LIN + 4088, &v, 8));
	assert_int_equal(ram_ld64(t.ram + DATA + 4088), 1);
	/* And the other page's. */
	*entry(0) |= PTE_W;
	entry(0)[1] &= ~(uint64_t)PTE_W;
	assert_true(try_access(ACC_WRITE, LIN + 4096, &v, 8));
	user_writes(LIN + 4088, LIN + 4096);
	assert_false(try_access(ACC_WRITE, LIN + 4096, &v, 8));
	/* Code: gone by one rule, gone by all. */
	entry(0)[1] |= PTE_W;
	assert_true(try_access(ACC_EXEC, LIN, NULL, 0));
	*entry(0) |= PTE_NX;
	t.cpu.cpl = 3;
	assert_false(try_access(ACC_EXEC, LIN, NULL, 0));
	t.cpu.cpl = 0;
	assert_false(try_access(ACC_EXEC, LIN, NULL, 0));
}

static void test_hostile_addresses(void **state)
{
	static const uint64_t bad[] = { 0x800000000000, 0xffff7fffffffffff, 0x7fffffffffff, 0x8000000000000000 };
	uint64_t v;

	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		assert_false(try_access(ACC_READ, bad[i], &v, 8));
		assert_int_equal(t.vector, EXC_GP);
		assert_null(mem_host(&t.cpu, bad[i], 8, ACC_READ));
	}
	/* empty entries match nothing, whatever the address */
	for (unsigned i = 0; i < 100000; i++) {
		uint64_t a = (uint64_t)random() << 33 ^ (uint64_t)random() << 12 ^ (uint64_t)random();
		assert_null(tlb_hit_r(&t.cpu, a, 1));
		assert_null(tlb_hit_w(&t.cpu, a, 8));
	}
	/* wrapping at the top of the address space */
	assert_false(try_access(ACC_READ, ~0ull - 3, &v, 8));
}

static void test_dirty_log(void **state)
{
	uint64_t bm[RAM_SIZE / 4096 / 64], v = 1;
	struct kvm_dirty_log d = { .slot = 0, .dirty_bitmap = bm };

	assert_int_equal(phys_get_dirty(&t.vm, &d), -ENOENT);
	map(PTE_P | PTE_W, PTE_P | PTE_W);
	assert_true(try_access(ACC_WRITE, LIN, &v, 8));
	set_slot(0, 0, RAM_SIZE, t.ram, KVM_MEM_LOG_DIRTY_PAGES, 0);
	mmu_flush_all(&t.cpu); /* what REQ_TLB asks for */
	for (int round = 0; round < 2; round++) {
		assert_true(try_access(ACC_WRITE, LIN, &v, 8));
		assert_int_equal(phys_get_dirty(&t.vm, &d), 0);
		assert_true(bm[DATA >> 18] >> (DATA >> 12 & 63) & 1);
		mmu_flush_all(&t.cpu);
		assert_int_equal(phys_get_dirty(&t.vm, &d), 0);
		assert_false(bm[DATA >> 18] >> (DATA >> 12 & 63) & 1);
	}
	t.vm.manual_dirty_clear = true;
	assert_true(try_access(ACC_WRITE, LIN, &v, 8));
	assert_int_equal(phys_get_dirty(&t.vm, &d), 0);
	assert_int_equal(phys_get_dirty(&t.vm, &d), 0);
	assert_true(bm[DATA >> 18] >> (DATA >> 12 & 63) & 1);
	struct kvm_clear_dirty_log cl = { .slot = 0, .first_page = 512, .num_pages = 64, .dirty_bitmap = &bm[8] };
	assert_int_equal(phys_clear_dirty(&t.vm, &cl), 0);
	cl.first_page = 63;
	assert_int_equal(phys_clear_dirty(&t.vm, &cl), -EINVAL);
	assert_int_equal(phys_get_dirty(&t.vm, &d), 0);
	assert_false(bm[DATA >> 18] >> (DATA >> 12 & 63) & 1);
}

static void test_code_versions(void **state)
{
	struct code_page p;
	uint64_t v = 1;

	map(PTE_P | PTE_W, PTE_P | PTE_W);
	assert_true(try_access(ACC_WRITE, LIN, &v, 8));
	assert_non_null(tlb_hit_w(&t.cpu, LIN, 8));
	mmu_fetch(&t.cpu, LIN, &p);
	uint32_t ver = mmu_code_mark(&t.cpu, &p);
	assert_int_equal(ver, atomic_load(p.ver));
	assert_null(tlb_hit_w(&t.cpu, LIN, 8));
	assert_int_equal(mmu_code_mark(&t.cpu, &p), ver);
	assert_true(mmu_code_lines(&t.cpu, &p, 100, 29));
	assert_false(mmu_code_lines(&t.cpu, &p, 64, 64));
	/* Beside the code: nothing happens, and there is no write entry. */
	assert_true(try_access(ACC_WRITE, LIN + 56, &v, 8) && try_access(ACC_WRITE, LIN + 192, &v, 8));
	assert_int_equal(ver, atomic_load(p.ver));
	assert_null(tlb_hit_w(&t.cpu, LIN + 192, 8));
	/* On its last byte's line. */
	assert_true(try_access(ACC_WRITE, LIN + 128, &v, 1));
	assert_int_not_equal(ver, atomic_load(p.ver));
	assert_int_not_equal(mmu_code_mark(&t.cpu, &p), ver);
	ver = atomic_load(p.ver);
	phys_code_written(&t.vm, DATA + 4095, 1);
	phys_code_written(&t.vm, DATA + 192, 4096);
	assert_int_equal(ver, atomic_load(p.ver));
	phys_code_written(&t.vm, DATA + 191, 1);
	assert_int_not_equal(ver, atomic_load(p.ver));
	phys_code_written(&t.vm, ~0ull - 10000, 5000); /* no slot there */
}

/* A page that is written and not executed becomes data again, and code again when it is decoded from. */
static void test_code_and_data(void **state)
{
	struct code_page p;
	uint64_t v = 1, alias = LIN + 4096, n;
	uint32_t ver;

	map(PTE_P | PTE_W, PTE_P | PTE_W);
	entry(0)[1] = *entry(0);
	assert_true(try_access(ACC_WRITE, LIN, &v, 8) && try_access(ACC_WRITE, alias, &v, 8));
	mmu_fetch(&t.cpu, LIN, &p);
	for (unsigned stride = 0; stride <= 128; stride += 128) {       /* on the code, beside it */
		ver = mmu_code_mark(&t.cpu, &p);
		mmu_code_lines(&t.cpu, &p, 0, 16);
		assert_null(tlb_hit_w(&t.cpu, LIN, 8));
		assert_null(tlb_hit_w(&t.cpu, alias, 8));
		for (n = 0; n < 1000 && !tlb_hit_w(&t.cpu, alias, 8); n++)
			assert_true(try_access(ACC_WRITE, alias + stride, &v, 8));
		assert_in_range(n, 2, stride ? 300 : 10);
		assert_int_not_equal(ver, atomic_load(p.ver));
		assert_true(try_access(ACC_WRITE, LIN, &v, 8));
		assert_non_null(tlb_hit_w(&t.cpu, LIN, 8));
	}
	/* Executed between the stores, it never gets there. */
	for (n = 0; n < 1000; n++) {
		ver = mmu_code_mark(&t.cpu, &p);
		mmu_code_lines(&t.cpu, &p, 0, 16);
		assert_true(try_access(ACC_WRITE, n & 1 ? LIN : alias, &v, 8));
		assert_null(tlb_hit_w(&t.cpu, LIN, 8));
		assert_int_not_equal(ver, atomic_load(p.ver));
	}
	/* Entries that were evicted and flushed are off the books. */
	for (n = 0; n < 64; n++)
		entry(0)[n] = (DATA + 4096 * (n % 7)) | PTE_P | PTE_W;
	for (n = 0; n < 20000; n++) {
		uint64_t lin = LIN + 4096 * ((uint64_t)random() % 64);

		assert_true(try_access(ACC_WRITE, lin, &v, 8));
		if (n % 50 == 0)
			mmu_flush_page(&t.cpu, lin);
		if (n % 1000 == 0)
			mmu_flush_nonglobal(&t.cpu);
		if (n % 100 == 0) {
			p.ver = &t.vm.slots->s[0]->ver[DATA >> 12];
			mmu_code_mark(&t.cpu, &p);
			for (unsigned k = 0; k < 64; k++)
				assert_true(k % 7 || !tlb_hit_w(&t.cpu, LIN + 4096 * k, 8));
		}
	}
}

/* Whether lookups of code by linear address at this privilege have died since the last call. */
static bool code_lost(unsigned user)
{
	static uint32_t seen[2];        /* a flush always changes the number, so starting anywhere is right */
	bool lost = seen[user] != t.cpu.fetch_gen[user];

	seen[user] = t.cpu.fetch_gen[user];
	return lost;
}

static void fetch_again(unsigned cpl)
{
	t.cpu.cpl = (uint8_t)cpl;
	assert_true(try_access(ACC_EXEC, LIN, NULL, 0));
	t.cpu.cpl = 0;
	code_lost(0);
	code_lost(1);
}

/* A flush must make code be looked up again where it concerns a page that was fetched from, and only there. */
static void test_flush_and_code(void **state)
{
	uint32_t v = 7;

	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_G);
	t.cpu.cr4 |= CR4_PGE;
	mmu_flush_all(&t.cpu);
	fetch_again(0);
	mmu_flush_page(&t.cpu, LIN + 4096);
	assert_false(code_lost(0));
	mmu_flush_nonglobal(&t.cpu);
	assert_false(code_lost(0));             /* all that was fetched is global */
	assert_true(code_lost(1));
	mmu_flush_page(&t.cpu, LIN + 12);
	assert_true(code_lost(0));
	assert_false(code_lost(1));

	*entry(0) &= ~(uint64_t)PTE_G;
	mmu_flush_all(&t.cpu);
	fetch_again(0);
	mmu_flush_nonglobal(&t.cpu);
	assert_true(code_lost(0));
	fetch_again(0);
	mmu_flush_all(&t.cpu);
	assert_true(code_lost(0) && code_lost(1));

	*entry(0) |= PTE_U;
	mmu_flush_all(&t.cpu);
	fetch_again(3);
	mmu_flush_page(&t.cpu, LIN);
	assert_true(code_lost(1));

	/* A 2 MiB page: INVLPG anywhere in it, and not beyond it. */
	*entry(1) = DATA | PTE_P | PTE_W | PTE_PS;
	mmu_flush_all(&t.cpu);
	fetch_again(0);
	assert_true(try_access(ACC_WRITE, LIN, &v, 4) && try_access(ACC_WRITE, LIN + 8192, &v, 4));
	mmu_flush_page(&t.cpu, LIN + BIT(21));
	assert_false(code_lost(0));
	assert_non_null(tlb_hit_w(&t.cpu, LIN, 4));
	mmu_flush_page(&t.cpu, LIN + 4096);
	assert_true(code_lost(0));
	assert_null(tlb_hit_w(&t.cpu, LIN, 4));
	assert_null(tlb_hit_r(&t.cpu, LIN + 8192, 4));
}

/* Code of an address space that the guest left is found again when it comes back with its PCID kept, unless something was flushed. */
static void test_pcids(void **state)
{
	uint64_t a = PT_BASE | 1, b = PT_BASE | 2;
	uint32_t gen, v = 1;

	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_U);
	t.cpu.cr4 |= CR4_PCIDE | CR4_PGE;
	t.cpu.cr3 = a;
	mmu_flush_all(&t.cpu);
	for (unsigned how = 0; how < 8; how++) {
		fetch_again(3);
		gen = t.cpu.fetch_gen[1];
		assert_true(try_access(ACC_WRITE, LIN, &v, 4));
		mmu_switch(&t.cpu, b, true);
		assert_int_equal(t.cpu.cr3, b);
		assert_int_not_equal(t.cpu.fetch_gen[1], gen);
		assert_null(tlb_hit_w(&t.cpu, LIN, 4));         /* the tables have no tags */
		fetch_again(3);
		switch (how) {
		case 0: mmu_switch(&t.cpu, a, false); break;
		case 1: mmu_flush_pcid(&t.cpu, 1); break;
		case 2: mmu_flush_pcids(&t.cpu); break;
		case 3: mmu_flush_all(&t.cpu); break;
		case 4: mmu_flush_pcid(&t.cpu, 2); break;
		case 5: mmu_flush_page(&t.cpu, LIN); break;
		case 6: mmu_switch(&t.cpu, b, false); break;
		default: break;
		}
		mmu_switch(&t.cpu, a, true);
		if (how < 4)
			assert_int_not_equal(t.cpu.fetch_gen[1], gen);
		else
			assert_int_equal(t.cpu.fetch_gen[1], gen);
		/* What came back can be lost like anything else. */
		if (how == 7) {
			mmu_flush_page(&t.cpu, LIN);
			assert_int_not_equal(t.cpu.fetch_gen[1], gen);
		}
	}
	/* A global user page can be flushed from anywhere. */
	*entry(0) |= PTE_G;
	mmu_flush_all(&t.cpu);
	fetch_again(3);
	gen = t.cpu.fetch_gen[1];
	mmu_switch(&t.cpu, b, true);
	mmu_flush_page(&t.cpu, LIN);
	mmu_switch(&t.cpu, a, true);
	assert_int_not_equal(t.cpu.fetch_gen[1], gen);
	/* More address spaces than are remembered. */
	*entry(0) &= ~(uint64_t)PTE_G;
	mmu_flush_all(&t.cpu);
	fetch_again(3);
	gen = t.cpu.fetch_gen[1];
	for (uint64_t p = 3; p < 40; p++) {
		mmu_switch(&t.cpu, PT_BASE | p, true);
		assert_int_not_equal(t.cpu.fetch_gen[1], gen);
	}
	mmu_switch(&t.cpu, a, true);
	assert_int_not_equal(t.cpu.fetch_gen[1], gen);
	/* What came back and then was flushed is gone, also if it is not noted on leaving, as there are global user pages by then. */
	*entry(0) &= ~(uint64_t)PTE_G;
	mmu_flush_all(&t.cpu);
	fetch_again(3);
	gen = t.cpu.fetch_gen[1];
	mmu_switch(&t.cpu, b, true);
	mmu_switch(&t.cpu, a, true);
	assert_int_equal(t.cpu.fetch_gen[1], gen);
	fetch_again(3);
	mmu_flush_page(&t.cpu, LIN);
	*entry(0) |= PTE_G;
	fetch_again(3);
	mmu_switch(&t.cpu, b, true);
	mmu_switch(&t.cpu, a, true);
	assert_int_not_equal(t.cpu.fetch_gen[1], gen);
	*entry(0) &= ~(uint64_t)PTE_G;
	/* Without PCIDs nothing is kept. */
	t.cpu.cr4 &= ~(uint64_t)CR4_PCIDE;
	mmu_flush_all(&t.cpu);
	gen = t.cpu.fetch_gen[1];
	mmu_switch(&t.cpu, PT_BASE, false);
	assert_int_not_equal(t.cpu.fetch_gen[1], gen);
}

/* 1 + the first byte of what `lin` leads to, 0: it faults. */
static unsigned first_byte(enum access acc, uint64_t lin)
{
	uint8_t b = 0;

	if (!try_access(ACC_READ, lin, &b, 1) || (acc == ACC_WRITE && !try_access(ACC_WRITE, lin, &b, 1)))
		return 0;
	return b + 1u;
}

/* What page walks remember of the upper levels goes with every flush that the manual says it goes with. */
static void test_remembered_directories(void **state)
{
	uint64_t *other_table = (uint64_t *)(t.ram + DATA + 0x20000), other = DATA + 0x10000;
	uint64_t idx = LIN >> 12 & 511;

	t.ram[DATA] = 1;
	t.ram[other] = 2;
	map(PTE_P | PTE_W | PTE_U, PTE_P | PTE_W | PTE_U);
	other_table[idx] = other | PTE_P | PTE_W | PTE_U;
	for (unsigned how = 0; how < 3; how++) {
		*entry(1) = (PT_BASE + 3 * 4096) | PTE_P | PTE_W | PTE_U;
		mmu_flush_all(&t.cpu);
		/* The neighbour makes the walk remember the directory's entry. */
		entry(0)[1] = other | PTE_P | PTE_W | PTE_U;
		assert_int_equal(first_byte(ACC_READ, LIN + 4096), 3);
		assert_int_equal(first_byte(ACC_WRITE, LIN), 2);
		*entry(1) = (DATA + 0x20000) | PTE_P | PTE_W | PTE_U;
		if (how == 0)
			mmu_flush_all(&t.cpu);
		else if (how == 1)
			mmu_flush_nonglobal(&t.cpu);
		else
			mmu_flush_page(&t.cpu, LIN);
		assert_int_equal(first_byte(ACC_READ, LIN), 3);
		assert_true(*entry(1) & PTE_A);
	}
	/* Rights of the upper levels hold for every page below, and for new users of what was remembered. */
	*entry(1) = (PT_BASE + 3 * 4096) | PTE_P | PTE_U;
	mmu_flush_all(&t.cpu);
	t.cpu.cr0 |= CR0_WP;
	assert_int_equal(first_byte(ACC_READ, LIN + 4096), 3);
	assert_int_equal(first_byte(ACC_WRITE, LIN), 0);
	*entry(1) |= PTE_W;
	*entry(2) &= ~(uint64_t)PTE_U;
	mmu_flush_all(&t.cpu);
	assert_int_equal(first_byte(ACC_WRITE, LIN + 4096), 3);
	t.cpu.cpl = 3;
	mmu_select(&t.cpu);
	assert_int_equal(first_byte(ACC_READ, LIN), 0);
	t.cpu.cpl = 0;
	mmu_select(&t.cpu);
	/* A dirty bit is set for each page on its own, and for a large one when it is first written. */
	assert_true(!(entry(0)[0] & PTE_D) || first_byte(ACC_WRITE, LIN));
	entry(0)[0] &= ~(uint64_t)(PTE_A | PTE_D);
	mmu_flush_page(&t.cpu, LIN);
	assert_int_equal(first_byte(ACC_READ, LIN + 4096), 3);
	assert_int_equal(first_byte(ACC_READ, LIN), 2);
	assert_true((entry(0)[0] & PTE_A) && !(entry(0)[0] & PTE_D));
	assert_int_equal(first_byte(ACC_WRITE, LIN), 2);
	assert_true(entry(0)[0] & PTE_D);
	*entry(2) |= PTE_U;
	*entry(1) = (DATA & ~(BIT(21) - 1)) | PTE_P | PTE_W | PTE_PS;
	mmu_flush_all(&t.cpu);
	assert_true(first_byte(ACC_READ, LIN) && first_byte(ACC_READ, LIN + 4096));
	assert_false(*entry(1) & PTE_D);
	assert_true(first_byte(ACC_WRITE, LIN + 8192));
	assert_true(*entry(1) & PTE_D);
	/* Removed, and then somebody else's. */
	*entry(1) = 0;
	mmu_flush_page(&t.cpu, LIN);
	assert_int_equal(first_byte(ACC_READ, LIN + 12288), 0);
}

static void test_slot_rules(void **state)
{
	uint8_t *h = t.ram;

	set_slot(1, RAM_SIZE - 4096, 8192, h, 0, -EEXIST);
	set_slot(1, RAM_SIZE, 100, h, 0, -EINVAL);
	set_slot(1, RAM_SIZE, 4096, h + 1, 0, -EINVAL);
	set_slot(1, -4096ull, 8192, h, 0, -EINVAL);
	set_slot(1, RAM_SIZE, 4096, h, 0x80, -EINVAL);
	set_slot(VM_MAX_SLOTS, RAM_SIZE, 4096, h, 0, -EINVAL);
	set_slot(1, 0, 0, NULL, 0, -EINVAL);
	set_slot(1, RAM_SIZE, 4096, h, KVM_MEM_READONLY, 0);
	set_slot(1, RAM_SIZE, 8192, h, KVM_MEM_READONLY, -EINVAL);
	set_slot(1, RAM_SIZE, 4096, h, 0, -EINVAL);
	set_slot(1, RAM_SIZE * 2, 4096, h, KVM_MEM_READONLY, 0);        /* move */
	assert_null(phys_ptr(&t.vm, RAM_SIZE, NULL, NULL, NULL));
	assert_ptr_equal(phys_ptr(&t.vm, RAM_SIZE * 2 + 5, NULL, NULL, NULL), h + 5);
	set_slot(1, 0, 0, NULL, 0, 0);
	assert_null(phys_ptr(&t.vm, RAM_SIZE * 2, NULL, NULL, NULL));
	uint32_t v;
	assert_int_equal(phys_read(&t.vm, RAM_SIZE - 2, &v, 4), -EFAULT);
	assert_int_equal(phys_write(&t.vm, RAM_SIZE - 4, &v, 4), 0);
}

static void test_mmio(void **state)
{
	uint64_t v = 0, gpa = RAM_SIZE + 0x10;

	t.cpu.cr0 = CR0_PE;     /* no paging */
	t.cpu.efer = 0;
	assert_false(try_access(ACC_READ, gpa, &v, 4));
	assert_int_equal(t.unwind, UNWIND_EXIT);
	assert_int_equal(t.run.exit_reason, KVM_EXIT_MMIO);
	assert_int_equal(t.run.mmio.phys_addr, gpa);
	assert_int_equal(t.run.mmio.len, 4);
	st_le32(t.run.mmio.data, 0xcafe);
	assert_false(mmio_complete(&t.cpu));
	assert_true(try_access(ACC_READ, gpa, &v, 4));  /* the instruction again */
	assert_int_equal(v, 0xcafe);
	v = 0x55;
	assert_true(try_access(ACC_WRITE, gpa, &v, 4)); /* posted */
	assert_true(mmio_commit(&t.cpu));
	assert_int_equal(t.run.mmio.is_write, 1);
	assert_int_equal(t.run.mmio.data[0], 0x55);
	assert_false(mmio_complete(&t.cpu));
	assert_false(mmio_pending(&t.cpu));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(test_permissions), T(test_reserved_and_keys), T(test_fill), T(test_fill_beside_code), T(test_crossing), T(test_fault_drops_entry), T(test_hostile_addresses),
		T(test_dirty_log), T(test_code_versions), T(test_code_and_data), T(test_flush_and_code), T(test_pcids), T(test_remembered_directories), T(test_slot_rules), T(test_mmio),
	};
	return cmocka_run_group_tests_name("mmu", tests, NULL, NULL);
}

/* -- what the rest of the engine does, recorded ------------------------------------------------ */

void cpu_unwind(struct cpu *c, enum unwind why) { t.unwind = why; longjmp(c->unwind, 1); }
void cpu_raise_err(struct cpu *c, unsigned vector, uint32_t error)
{
	t.raised = true;
	t.vector = vector;
	t.error = error;
	cpu_unwind(c, UNWIND_EVENT);
}
void cpu_raise(struct cpu *c, unsigned vector) { cpu_raise_err(c, vector, 0); }
void cpu_raise_pf(struct cpu *c, uint64_t addr, uint32_t error) { t.addr = addr; cpu_raise_err(c, EXC_PF, error); }
void cpu_emulation_failed(struct cpu *c) { cpu_unwind(c, UNWIND_EXIT); }
void cpu_leave_after(struct cpu *c) { t.left++; }
void vm_pause_all(struct vm *vm, struct cpu *self) { }
void vm_resume_all(struct vm *vm, struct cpu *self) { }
void vm_request_all(struct vm *vm, uint32_t req, struct cpu *except) { }
void cpu_request(struct cpu *c, uint32_t req) { }
bool bus_mmio(struct cpu *c, uint64_t gpa, unsigned len, bool write, void *data) { return false; }
