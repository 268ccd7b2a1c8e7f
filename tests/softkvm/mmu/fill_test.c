/* TLB fills of translated code (mmu/fill.c) against the slow path, and beside code. */
#include "guest.h"
#include "softkvm/mmu/tlb.h"

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

/* Three pages, side by side in memory or not, or a large one that holds them; some way that rights, A and D may be. */
static void some_mapping(void)
{
	map(PTE_P | maybe(PTE_W, 6) | maybe(PTE_U, 6) | (below(6) ? 0 : PTE_NX), 0);
	uint64_t apart = below(2) ? 0x3000 : 0, swap = apart ? 1 : 0;

	for (unsigned n = 0; n < 3; n++)
		entry(0)[n] = (DATA + (n ^ swap) * (0x1000 + apart)) | some_leaf();
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

static uint64_t leaf_of(uint64_t lin) { return *entry(1) & PTE_PS ? *entry(1) : entry(0)[(lin - LIN) >> 12]; }

/* The memory of [p, p + size) is what the page tables say, or a copy of it. */
static bool same_memory(const uint8_t *p, uint64_t lin, uint64_t size)
{
	bool same = true, w, u;
	uint64_t gpa;

	for (unsigned n = 0; n < size; n++) {
		assert_true(mmu_translate(&t.cpu, lin + n, &gpa, &w, &u));
		assert_int_equal(p[n], t.ram[gpa]);
		same &= p + n == t.ram + gpa;
	}
	return same;
}

/* What a fill gives is what the slow path gives, and where that faults there is none. */
enum { NONE, ONE, COPY, TWO, GOTS };
static unsigned fill_once(bool write)
{
	uint64_t size = 1 + below(64), off = below(3) ? below(8192) : 4096 - below(64), lin = LIN + off, last = lin + size - 1;
	bool crosses = (lin & 4095) + size > 4096, same;
	struct cpu *c = &t.cpu;
	uint8_t buf[64], *p;

	p = write ? mmu_fill_w(c, lin, size) : mmu_fill_r(c, lin, size);
	if (!p)
		return NONE;
	same = same_memory(p, lin, size);
	assert_true(same || (crosses && !write));
	assert_int_equal((uintptr_t)p & 63, lin & 63);
	assert_true(leaf_of(lin) & leaf_of(last) & PTE_A);
	assert_true(!write || (leaf_of(lin) & leaf_of(last) & PTE_D));
	mmu_drop_data(c);
	memcpy(buf, p, size);
	assert_true(try_access(write ? ACC_WRITE : ACC_READ, lin, buf, (unsigned)size));
	return !crosses ? ONE : same ? TWO : COPY;
}

static void test_fill(void **state)
{
	unsigned got[2][GOTS] = { { 0 } };
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
	assert_in_range(got[0][NONE], 10000, 40000);
	assert_in_range(got[1][NONE], 10000, 45000);
	assert_true(got[0][ONE] > 2000 && got[0][COPY] > 500 && got[0][TWO] > 500 && got[1][ONE] > 1000 && got[1][TWO] > 300);
	assert_int_equal(got[1][COPY], 0);
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

/* A store to two pages side by side. Where the second has code: not to its lines. Nor where that is read-only, or its dirty bit is wanted. */
static void test_fill_two_pages(void **state)
{
	struct kvm_userspace_memory_region r = { 0, KVM_MEM_LOG_DIRTY_PAGES, 0, RAM_SIZE, (uintptr_t)t.ram };
	const uint64_t second = DATA + 4096, lin = LIN + 4090;
	struct cpu *c = &t.cpu;
	struct slot *s;
	uint8_t *data = phys_ptr(&t.vm, second, NULL, NULL, &s), buf[64] = { 0 };
	struct code_page p = { .gpa = second, .host = data, .ver = &s->ver[second >> 12], .lines = &s->lines[second >> 12] };

	map(PTE_P | PTE_W, PTE_P | PTE_W);
	entry(0)[1] = second | PTE_P | PTE_W;
	try_access(ACC_WRITE, LIN, buf, 8);
	try_access(ACC_WRITE, LIN + 4096, buf, 8);
	assert_ptr_equal(mmu_fill_w(c, lin, 16), data - 6);
	entry(0)[1] &= ~(uint64_t)PTE_W;
	mmu_flush_all(c);
	try_access(ACC_WRITE, LIN, buf, 8);
	assert_null(mmu_fill_w(c, lin, 16));
	assert_non_null(mmu_fill_r(c, lin, 16));
	entry(0)[1] |= PTE_W;
	mmu_flush_all(c);
	assert_int_equal(phys_set_region(&t.vm, &r), 0);                /* from here on pages are logged */
	mmu_flush_all(c);
	try_access(ACC_WRITE, LIN, buf, 8);
	assert_null(mmu_fill_w(c, lin, 16));
	assert_true(try_access(ACC_WRITE, LIN + 4096, buf, 8));
	assert_ptr_equal(mmu_fill_w(c, lin, 16), data - 6);
	mmu_code_mark(c, &p);
	mmu_code_lines(c, &p, 64, 8);
	assert_ptr_equal(mmu_fill_w(c, lin, 16), data - 6);
	assert_ptr_equal(mmu_fill_w(c, lin + 5, 64), data - 1);         /* up to that line */
	mmu_code_lines(c, &p, 0, 8);
	assert_null(mmu_fill_w(c, lin, 16));
	assert_ptr_equal(mmu_fill_r(c, lin, 16), data - 6);
	entry(0)[1] = (DATA + 0x5000) | PTE_P | PTE_W | PTE_A | PTE_D;  /* elsewhere */
	mmu_flush_all(c);
	try_access(ACC_WRITE, LIN, buf, 8);
	try_access(ACC_WRITE, LIN + 4096, buf, 8);
	assert_null(mmu_fill_w(c, lin, 16));
	assert_ptr_not_equal(mmu_fill_r(c, lin, 16), data - 6);
	assert_null(mmu_fill_r(c, lin, 16 | MMU_FILL_ITSELF));
	assert_null(mmu_fill_r(c, lin, 65));
}

/* A page of its own, at `gpa`, of which the books on write entries cannot tell the host's page at `other`. */
#define FAR (512u << 20)
static uint8_t *same_hash(uint64_t gpa, const uint8_t *other)
{
	uint8_t *far = mmap(NULL, FAR, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), *p = far;

	assert_ptr_not_equal(far, MAP_FAILED);
	while (tlb_writer_hash((uintptr_t)p) != tlb_writer_hash((uintptr_t)other))
		assert_true((p += 4096) < far + FAR);
	set_slot(1, gpa, 4096, p, 0, 0);
	return far;
}

/* Code in one of two pages with the same hash: write entries that lead to it go, those of the other stay, whatever came and went before. */
static void test_revoked(void **state)
{
	enum { PAGES = 8 };
	const uint64_t gpa[2] = { DATA, 1ull << 30 };
	uint8_t buf[8] = { 0 }, *far = same_hash(gpa[1], t.ram + DATA);
	struct cpu *c = &t.cpu;
	unsigned had = 0;

	map(PTE_P | PTE_W, PTE_P | PTE_W);
	for (unsigned n = 0; n < PAGES; n++)
		entry(0)[n] = gpa[n % 2] | PTE_P | PTE_W;
	for (unsigned k = 0; k < 20000; k++) {
		unsigned n = (unsigned)below(PAGES), which = n % 2;
		struct code_page p = { .gpa = gpa[which] };
		bool hit[PAGES];
		struct slot *s;

		for (unsigned m = 0; m < 5; m++)        /* data now, if it was code */
			assert_true(try_access(ACC_WRITE, LIN + 4096 * n, buf, 8));
		if (below(16) == 0)
			below(2) ? mmu_flush_all(c) : mmu_flush_page(c, LIN + 4096 * below(PAGES));
		if (below(3))
			continue;
		for (unsigned m = 0; m < PAGES; m++)
			hit[m] = tlb_hit_w(c, LIN + 4096 * m, 8);
		p.host = phys_ptr(&t.vm, p.gpa, NULL, NULL, &s);
		p.ver = &s->ver[(p.gpa - s->gpa) >> 12];
		p.lines = &s->lines[(p.gpa - s->gpa) >> 12];
		mmu_code_mark(c, &p);
		mmu_code_lines(c, &p, 0, 8);
		for (unsigned m = 0; m < PAGES; m++) {
			assert_int_equal(!!tlb_hit_w(c, LIN + 4096 * m, 8), m % 2 != which && hit[m]);
			had += hit[m];
		}
	}
	assert_in_range(had, 5000, 50000);
	mmu_flush_all(c);
	assert_int_equal((uint32_t)atomic_load(tlb_writers_of(c, (uintptr_t)far)), 0);
	assert_int_equal((uint32_t)atomic_load(tlb_writers_of(c, (uintptr_t)t.ram + DATA)), 0);
	munmap(far, FAR);
}

/* A run of up to a page: the memory itself or nothing. */
static void test_fill_run(void **state)
{
	const uint64_t flags = PTE_P | PTE_W, lin = LIN + 100;
	struct cpu *c = &t.cpu;
	uint8_t buf[8] = { 0 };

	for (unsigned apart = 0; apart < 2; apart++) {
		map(flags, flags);
		entry(0)[1] = (DATA + 4096 + 4096 * apart) | flags;
		mmu_flush_all(c);
		try_access(ACC_WRITE, LIN, buf, 8);
		try_access(ACC_WRITE, LIN + 4096, buf, 8);
		assert_ptr_equal(mmu_fill_r(c, LIN, 4096 | MMU_FILL_ITSELF), t.ram + DATA);
		assert_ptr_equal(mmu_fill_w(c, LIN, 4096 | MMU_FILL_ITSELF), t.ram + DATA);
		assert_ptr_equal(mmu_fill_r(c, lin, 4096 | MMU_FILL_ITSELF), apart ? NULL : t.ram + DATA + 100);
		assert_ptr_equal(mmu_fill_w(c, lin, 4096 | MMU_FILL_ITSELF), apart ? NULL : t.ram + DATA + 100);
		assert_null(mmu_fill_w(c, LIN + 4096 + 100, 4096 | MMU_FILL_ITSELF));   /* nothing behind */
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(test_fill), T(test_fill_beside_code), T(test_fill_two_pages), T(test_revoked), T(test_fill_run),
	};
	return cmocka_run_group_tests_name("fill", tests, NULL, NULL);
}
