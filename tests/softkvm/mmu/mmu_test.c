/*
 * The MMU on its own: page walks against an independent model of the permission rules, TLB, crossings,
 * dirty log, code versions, MMIO log. The rest of the engine is guest.c's.
 */
#include "guest.h"

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
		T(test_permissions), T(test_reserved_and_keys), T(test_crossing), T(test_fault_drops_entry), T(test_hostile_addresses),
		T(test_dirty_log), T(test_code_versions), T(test_code_and_data), T(test_flush_and_code), T(test_pcids), T(test_remembered_directories), T(test_slot_rules), T(test_mmio),
	};
	return cmocka_run_group_tests_name("mmu", tests, NULL, NULL);
}
