/*
 * What the API does around a guest, with tiny guests: dirty logs, read-only and moving slots, code that changes in every way,
 * ioeventfds, coalesced MMIO, split irqchip, MSR filters, clocks, and a whole machine moved into a second VM in its middle.
 * Expected results are those of Linux Documentation/virt/kvm/api.rst and the SDM, on softkvm and, where it can, on /dev/kvm.
 */
#include <errno.h>
#include <linux/kvm_para.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

static enum guest_prov prov;
static void open_guest(struct guest *g, const uint8_t *code, const uint8_t *end, struct guest_cfg cfg)
{
	cfg.prov = prov;
	guest_create(g, &cfg);
	guest_load(g, 0x10000, code, (size_t)(end - code));
	guest_long64(g, 0, 0x10000);
}
#define OPEN(g, code, ...) open_guest(g, code, code##_end, (struct guest_cfg){ __VA_ARGS__ })

static void need_real(void)
{
	if (prov == GUEST_SOFT || !guest_kvm_is_emulation())
		return;
	print_message("this /dev/kvm is an emulation: skipped\n");
	skip();
}

static uint32_t ld32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static uint64_t ld64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static uint64_t out_data(struct guest *g)
{
	uint64_t v = 0;

	memcpy(&v, (uint8_t *)g->run[0] + g->run[0]->io.data_offset, g->run[0]->io.size);
	return v;
}

static void expect_out(struct guest *g, unsigned port, uint64_t v)
{
	assert_int_equal(guest_run(g, 0), KVM_EXIT_IO);
	assert_int_equal(g->run[0]->io.port, port);
	assert_int_equal(out_data(g), v);
}

static long region(struct guest *g, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, void *host)
{
	return gioctl(&g->vm, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region){ .slot = slot, .flags = flags,
		.guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host }, NULL);
}

static void *pages(size_t n)
{
	void *p = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	assert_true(p != MAP_FAILED);
	return p;
}

/* -- dirty log ------------------------------------------------------------------------------------ */
GUEST_ASM(dirty_code, 64, "1: movb $1, 0x200123; movl $1, 0x203ffe; mov 0x206000, %al; lock incl 0x208000; out %al, $0x80; jmp 1b");

static void dirty_log(void **state)
{
	uint64_t map[16] = { 0 };
	uint64_t want = 1ull << 0 | 1ull << 3 | 1ull << 4 | 1ull << 8;
	struct guest g;

	OPEN(&g, dirty_code, .log_dirty = true);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	for (int i = 0; i < 3; i++) {
		struct kvm_dirty_log d = { .slot = 0, .dirty_bitmap = map };

		assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
		assert_int_equal(map[8], want);         /* page 0x200 */
		assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
		assert_int_equal(map[8], 0);
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	}
	guest_destroy(&g);
}

static void dirty_manual(void **state)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { 1 } };
	uint64_t map[16] = { 0 }, want = 1ull << 0 | 1ull << 3 | 1ull << 4 | 1ull << 8, some = 1ull << 3;
	struct kvm_dirty_log d = { .slot = 0, .dirty_bitmap = map };
	struct kvm_clear_dirty_log c = { .slot = 0, .first_page = 0x200, .num_pages = 64, .dirty_bitmap = &some };
	struct guest g;

	OPEN(&g, dirty_code, .log_dirty = true);
	if (gioctl(&g.vm, KVM_ENABLE_CAP, &cap, NULL)) {
		guest_destroy(&g);
		skip();
	}
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
	assert_int_equal(map[8], want);
	assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
	assert_int_equal(map[8], want);
	assert_int_equal(gioctl(&g.vm, KVM_CLEAR_DIRTY_LOG, &c, NULL), 0);
	assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
	assert_int_equal(map[8], want & ~some);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
	assert_int_equal(map[8], want);
	c.first_page = 1;
	assert_int_equal(gioctl(&g.vm, KVM_CLEAR_DIRTY_LOG, &c, NULL), -EINVAL);
	guest_destroy(&g);
}

static void dirty_initially_set(void **state)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = { 3 } };
	uint64_t map[2] = { 0 };
	struct kvm_dirty_log d = { .slot = 3, .dirty_bitmap = map };
	void *m = pages(70);
	struct guest g;

	OPEN(&g, dirty_code, 0);
	if (gioctl(&g.vm, KVM_ENABLE_CAP, &cap, NULL)) {
		guest_destroy(&g);
		skip();
	}
	assert_int_equal(region(&g, 3, KVM_MEM_LOG_DIRTY_PAGES, 0x10000000, 70 * 4096, m), 0);
	assert_int_equal(gioctl(&g.vm, KVM_GET_DIRTY_LOG, &d, NULL), 0);
	assert_true(map[0] == ~0ull && map[1] == 0x3f);
	guest_destroy(&g);
	munmap(m, 70 * 4096);
}

/* -- slots ------------------------------------------------------------------------------------------ */
GUEST_ASM(ro_code, 64, "mov $0x10000000, %rbx; mov (%rbx), %eax; out %eax, $0x80; movl $5, 4(%rbx); lock incl 8(%rbx);"
	  "mov 4(%rbx), %eax; out %eax, $0x80; call *%rcx; out %eax, $0x80; hlt");

static void read_only(void **state)
{
	uint8_t *m = pages(1);
	struct kvm_regs r;
	struct guest g;

	OPEN(&g, ro_code, 0);
	assert_int_equal(region(&g, 1, KVM_MEM_READONLY, 0x10000000, 4096, m), 0);
	memcpy(m, "\x11\x22\x33\x44", 4);
	memcpy(m + 64, "\xb8\x78\x56\x34\x12\xc3", 6);
	guest_get_regs(&g, 0, &r);
	r.rcx = 0x10000040;
	guest_set_regs(&g, 0, &r);
	expect_out(&g, 0x80, 0x44332211);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_MMIO);
	assert_true(g.run[0]->mmio.is_write && g.run[0]->mmio.phys_addr == 0x10000004 && ld32(g.run[0]->mmio.data) == 5);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_MMIO);
	assert_true(g.run[0]->mmio.is_write && g.run[0]->mmio.phys_addr == 0x10000008 && ld32(g.run[0]->mmio.data) == 1);
	expect_out(&g, 0x80, 0);                /* nothing reached it */
	expect_out(&g, 0x80, 0x12345678);       /* code runs from it */
	guest_destroy(&g);
	munmap(m, 4096);
}

GUEST_ASM(slot_code, 64, "mov $0x10000000, %ebx; 1: call *%rbx; out %eax, $0x80; jmp 1b");

static void slot_changes(void **state)
{
	uint8_t *a = pages(2), *b = pages(2);
	struct guest g;

	OPEN(&g, slot_code, 0);
	memcpy(a, "\xb8\x01\0\0\0\xc3", 6);
	memcpy(b, "\xb8\x02\0\0\0\xc3", 6);
	memcpy(a + 4096, "\xb8\x03\0\0\0\xc3", 6);
	assert_int_equal(region(&g, 1, 0, 0x10000000, 4096, a), 0);
	expect_out(&g, 0x80, 1);
	assert_int_equal(region(&g, 1, 0, 0x10000000, 0, a), 0);        /* gone, and another in its place */
	assert_int_equal(region(&g, 1, 0, 0x10000000, 4096, b), 0);
	expect_out(&g, 0x80, 2);
	assert_int_equal(region(&g, 1, 0, 0x10004000, 4096, b), 0);     /* moved away */
	assert_int_equal(region(&g, 2, 0, 0x10000000, 4096, a + 4096), 0);
	expect_out(&g, 0x80, 3);
	assert_int_equal(region(&g, 3, 0, 0x10000000, 4096, b), -EEXIST);
	assert_int_equal(region(&g, 2, 0, 0x10000000, 0, NULL), 0);     /* no code there now */
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_INTERNAL_ERROR);
	guest_destroy(&g);
	munmap(a, 8192);
	munmap(b, 8192);
}

/* -- code that changes ------------------------------------------------------------------------------ */
GUEST_ASM(smc_code, 64,
	/* the next instruction, in the same block */
	"mov $7, %ecx; movl $0x22222222, 1f+1(%rip); 1: mov $0x11111111, %eax; out %eax, $0x80\n"
	/* a loop that patches itself each time round */
	"xor %ebx, %ebx; 2: incl 3f+1(%rip); 3: mov $0, %eax; inc %ebx; cmp $5, %ebx; jne 2b; out %eax, $0x80\n"
	/* over the end of a page, each half */
	"movabs $0x0000000000c3b8, %rax; mov $0x20ffe, %edi; movb $0xb8, (%rdi); movl $0x01020304, 1(%rdi); movb $0xc3, 5(%rdi)\n"
	"call *%rdi; out %eax, $0x80; movb $0x55, 4(%rdi); call *%rdi; out %eax, $0x80; movb $0x66, 1(%rdi); call *%rdi; out %eax, $0x80\n"
	/* through another mapping of the page: 0x40000000 is 0x20000 */
	"mov $0x40000ffe, %esi; movb $0x77, 2(%rsi); call *%rdi; out %eax, $0x80; call *%rsi; out %eax, $0x80\n"
	/* by a string, and by a locked and a vector store */
	"mov %rdi, %rsi; mov $0x21100, %edi; mov $6, %ecx; rep movsb; mov $0x21100, %esi; call *%rsi; out %eax, $0x80\n"
	"mov $0x99, %al; mov $0x21101, %edi; mov $4, %ecx; rep stosb; call *%rsi; out %eax, $0x80\n"
	"lock incl 1(%rsi); call *%rsi; out %eax, $0x80\n"
	"mov $0x21200, %ebx; movups (%rsi), %xmm0; movups %xmm0, (%rbx); call *%rbx; out %eax, $0x80; movl $0x31313131, 1(%rsi); movups (%rsi), %xmm0; movups %xmm0, (%rbx); call *%rbx; out %eax, $0x80\n"
	/* shorter, longer: NOPs become something else */
	"4: mov $0x21300, %ebx; movl $0x90909090, (%rbx); movb $0xc3, 4(%rbx); xor %eax, %eax; call *%rbx; movw $0xc0ff, 1(%rbx); call *%rbx; movw $0xc0ff, (%rbx); movw $0xc0ff, 2(%rbx); call *%rbx; out %eax, $0x80\n"
	"5: in $0x81, %al; call *%rsi; out %eax, $0x80; jmp 5b");

static void self_modifying(void **state)
{
	struct kvm_sregs s;
	struct guest g;
	uint64_t e;

	OPEN(&g, smc_code, 0);
	/* PDPT[1] -> page directory at 0x30000 -> page table at 0x31000 -> 0x20000.. */
	e = 0x30007; memcpy(g.mem + 0x4000 + 8, &e, 8);
	e = 0x31007; memcpy(g.mem + 0x30000, &e, 8);
	for (uint64_t i = 0; i < 4; i++) {
		e = (0x20000 + i * 4096) | 7;
		memcpy(g.mem + 0x31000 + 8 * i, &e, 8);
	}
	guest_get_sregs(&g, 0, &s);
	s.cr4 |= 0x600;
	guest_set_sregs(&g, 0, &s);
	expect_out(&g, 0x80, 0x22222222);
	expect_out(&g, 0x80, 5);
	expect_out(&g, 0x80, 0x01020304);
	expect_out(&g, 0x80, 0x55020304);
	expect_out(&g, 0x80, 0x55020366);
	expect_out(&g, 0x80, 0x55027766);
	expect_out(&g, 0x80, 0x55027766);
	expect_out(&g, 0x80, 0x55027766);
	expect_out(&g, 0x80, 0x99999999);
	expect_out(&g, 0x80, 0x9999999a);
	expect_out(&g, 0x80, 0x9999999a);
	expect_out(&g, 0x80, 0x31313131);
	expect_out(&g, 0x80, 3);
	/* by the client while the guest waits: announced where there is a way to, and not */
	for (uint32_t i = 0; i < 6; i++) {
		uint32_t v = 0x41000000 + i;

		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
		assert_int_equal(g.run[0]->io.direction, KVM_EXIT_IO_IN);
		memcpy(g.mem + 0x21101, &v, 4);
		if (i & 1 && prov == GUEST_SOFT)
			softkvm_code_written(g.vm.f, 0x21101, 4);
		v = 0x41000000 + i;
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
		assert_int_equal(out_data(&g) & ~0u, v);
	}
	guest_destroy(&g);
}

/* -- ioeventfd, coalesced MMIO ------------------------------------------------------------------------ */
GUEST_ASM(io_code, 64, "mov $0x30000000, %rbx; 1: mov $7, %eax; out %al, $0x90; out %ax, $0x90; mov $8, %eax; out %al, $0x90;"
	  "movl $1, (%rbx); movw $2, (%rbx); movb $3, 8(%rbx); movl $4, 0x100(%rbx); movq $5, 0x108(%rbx); movl $6, 0x110(%rbx); out %al, $0x92; hlt");

static uint64_t count(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, 8) == 8 ? n : 0;
}

static void eventfds(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), b = eventfd(0, EFD_NONBLOCK), w = eventfd(0, EFD_NONBLOCK);
	struct kvm_ioeventfd ea = { .addr = 0x90, .len = 1, .fd = a, .datamatch = 7, .flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH },
		eb = { .addr = 0x30000000, .len = 4, .fd = b }, ew = { .addr = 0x30000008, .len = 0, .fd = w };
	struct kvm_coalesced_mmio_zone z = { .addr = 0x30000100, .size = 0x10 };
	const struct kvm_coalesced_mmio_ring *ring;
	struct guest g;
	long at;

	OPEN(&g, io_code, 0);
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &ea, NULL), 0);
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &ea, NULL), -EEXIST);
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &eb, NULL), 0);
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &ew, NULL), 0);
	at = gioctl_val(&g.sys, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
	assert_int_equal(gioctl(&g.vm, KVM_REGISTER_COALESCED_MMIO, &z, NULL), 0);
	ring = (const void *)((uint8_t *)g.run[0] + at * 4096);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);        /* 16 bits: another width */
	assert_true(g.run[0]->io.size == 2 && out_data(&g) == 7);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);        /* 8: another value */
	assert_true(g.run[0]->io.size == 1 && out_data(&g) == 8);
	assert_int_equal(count(a), 1);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_MMIO);
	assert_true(g.run[0]->mmio.len == 2 && g.run[0]->mmio.data[0] == 2);
	assert_int_equal(count(b), 1);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_MMIO);      /* 0x110: outside the zone */
	assert_int_equal(count(w), 1);
	assert_int_equal(g.run[0]->mmio.phys_addr, 0x30000110);
	assert_int_equal(ring->last - ring->first, 2);
	assert_true(ring->coalesced_mmio[0].phys_addr == 0x30000100 && ring->coalesced_mmio[0].len == 4 && ring->coalesced_mmio[0].data[0] == 4);
	assert_true(ring->coalesced_mmio[1].phys_addr == 0x30000108 && ring->coalesced_mmio[1].len == 8 && ring->coalesced_mmio[1].data[0] == 5);
	ea.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &ea, NULL), 0);
	assert_int_equal(gioctl(&g.vm, KVM_IOEVENTFD, &ea, NULL), -ENOENT);
	guest_destroy(&g);
	close(a);
	close(b);
	close(w);
}

/* -- split irqchip -------------------------------------------------------------------------------------- */
GUEST_ASM(split_code, 64, "mov $0xfee00000, %ebx; movl $0x1ff, 0xf0(%rbx); out %al, $0x80; sti; 1: hlt; jmp 1b\n"
	  ".globl split_irq\nsplit_irq: push %rax; mov $0x55, %al; out %al, $0x81; movl $0, 0xb0(%rbx); mov $0x66, %al; out %al, $0x82; pop %rax; iretq");
extern const uint8_t split_irq[];

static void map_high(struct guest *g)
{
	uint64_t e = 0x30007;

	memcpy(g->mem + 0x4000 + 24, &e, 8);
	for (uint64_t i = 0; i < 512; i++) {
		e = (3ull << 30) + (i << 21) + 0x9f;
		memcpy(g->mem + 0x30000 + 8 * i, &e, 8);
	}
}

static void split(void **state)
{
	struct { struct kvm_irq_routing h; struct kvm_irq_routing_entry e[2]; } r = { .h.nr = 2 };
	struct guest g;

	need_real();
	OPEN(&g, split_code, .split_routes = 24);
	map_high(&g);
	guest_gate(&g, 64, 0x61, 0x10000 + (uint64_t)(split_irq - split_code), 0);
	guest_gate(&g, 64, 0x62, 0x10000 + (uint64_t)(split_irq - split_code), 0);
	for (unsigned i = 0; i < 2; i++)
		r.e[i] = (struct kvm_irq_routing_entry){ .gsi = i, .type = KVM_IRQ_ROUTING_MSI, .u.msi = {
			.address_lo = 0xfee00000, .data = 0x61 + i + (i ? 0 : 0x8000) } };
	assert_int_equal(gioctl(&g.vm, KVM_SET_GSI_ROUTING, &r, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(gioctl(&g.vm, KVM_SIGNAL_MSI, &(struct kvm_msi){ .address_lo = 0xfee00000, .data = 0x8061 }, NULL), 1);
	expect_out(&g, 0x81, 0x55);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IOAPIC_EOI);        /* a level vector of the table */
	assert_int_equal(g.run[0]->eoi.vector, 0x61);
	expect_out(&g, 0x82, 0x66);
	assert_int_equal(gioctl(&g.vm, KVM_SIGNAL_MSI, &(struct kvm_msi){ .address_lo = 0xfee00000, .data = 0x62 }, NULL), 1);
	expect_out(&g, 0x81, 0x55);
	expect_out(&g, 0x82, 0x66);                                     /* an edge: nobody asks */
	guest_destroy(&g);
}

/* -- MSRs, CPUID, hypercalls ------------------------------------------------------------------------------ */
GUEST_ASM(filter_code, 64, "mov $0x174, %ecx; mov $5, %eax; xor %edx, %edx; wrmsr; rdmsr; out %eax, $0x80; mov $0x175, %ecx; rdmsr; out %eax, $0x81;"
	  "mov $12, %eax; mov $0x100000, %ebx; mov $2, %ecx; mov $1, %edx; vmmcall; out %eax, $0x82; mov $12, %eax; mov $0x100001, %ebx; vmmcall; out %eax, $0x82; hlt");

static void msr_filter(void **state)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_FILTER } },
		hc = { .cap = KVM_CAP_EXIT_HYPERCALL, .args = { 1 << KVM_HC_MAP_GPA_RANGE } };
	uint8_t bits = 0xfe;            /* 0x174 refused, 0x175 allowed */
	struct kvm_msr_filter f = { .ranges = { { .flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .base = 0x174, .nmsrs = 8, .bitmap = &bits } } };
	struct kvm_regs regs;
	struct guest g;

	need_real();
	OPEN(&g, filter_code, 0);
	if (gioctl(&g.vm, KVM_ENABLE_CAP, &cap, NULL) || gioctl(&g.vm, KVM_X86_SET_MSR_FILTER, &f, NULL) || gioctl(&g.vm, KVM_ENABLE_CAP, &hc, NULL)) {
		guest_destroy(&g);
		skip();
	}
	guest_set_msr(&g, 0, 0x174, 0x99);      /* the host is not filtered */
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_X86_WRMSR);
	assert_true(g.run[0]->msr.index == 0x174 && g.run[0]->msr.data == 5 && g.run[0]->msr.reason == KVM_MSR_EXIT_REASON_FILTER);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_X86_RDMSR);
	g.run[0]->msr.data = 0x1234;
	expect_out(&g, 0x80, 0x1234);
	expect_out(&g, 0x81, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HYPERCALL);
	assert_true(g.run[0]->hypercall.nr == 12 && g.run[0]->hypercall.args[0] == 0x100000 && g.run[0]->hypercall.args[1] == 2 &&
		    g.run[0]->hypercall.args[2] == 1 && g.run[0]->hypercall.longmode == 1);
	g.run[0]->hypercall.ret = 0x77;
	expect_out(&g, 0x82, 0x77);
	expect_out(&g, 0x82, (uint32_t)-KVM_EINVAL);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	guest_get_regs(&g, 0, &regs);
	guest_destroy(&g);
}

/* -- clocks ----------------------------------------------------------------------------------------------- */
GUEST_ASM(clock_code, 64, "mov $0x4b564d01, %ecx; mov $0x200001, %eax; xor %edx, %edx; wrmsr; mov $0x4b564d03, %ecx; mov $0x201001, %eax; wrmsr;"
	  "mov $0x4b564d00, %ecx; mov $0x202000, %eax; wrmsr; 1: rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, %rbx; out %al, $0x80; jmp 1b");

static uint64_t pvclock(const uint8_t *p, uint64_t tsc)
{
	struct pvclock { uint32_t version, pad; uint64_t tsc, ns; uint32_t mul; int8_t shift; uint8_t flags, pad2[2]; } c;
	uint64_t d;

	memcpy(&c, p, sizeof c);
	assert_true(c.version && !(c.version & 1));
	d = tsc - c.tsc;
	d = c.shift < 0 ? d >> -c.shift : d << c.shift;
	return c.ns + (uint64_t)((unsigned __int128)d * c.mul >> 32);
}

static void clocks(void **state)
{
	struct kvm_clock_data d = { 0 };
	uint64_t a, b, tsc;
	struct kvm_regs r;
	struct guest g;
	long khz;

	OPEN(&g, clock_code, 0);
	khz = gioctl_val(&g.vcpu[0], KVM_GET_TSC_KHZ, 0);
	assert_true(khz > 100000);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	a = pvclock(g.mem + 0x200000, r.rbx);
	tsc = r.rbx;
	usleep(20000);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	b = pvclock(g.mem + 0x200000, r.rbx);
	assert_true(b - a >= 20000000 && b - a < 2000000000);
	assert_true((r.rbx - tsc) / (uint64_t)khz >= 19);
	/* the VM's clock is the same clock */
	assert_int_equal(gioctl(&g.vm, KVM_GET_CLOCK, &d, NULL), 0);
	assert_true(d.clock >= b && d.clock - b < 2000000000);
	/* wall clock plus system time is now */
	assert_true((uint64_t)time(NULL) - (ld32(g.mem + 0x202004) + b / 1000000000) + 3 < 6);
	d = (struct kvm_clock_data){ .clock = 1000000000000ull };
	assert_int_equal(gioctl(&g.vm, KVM_SET_CLOCK, &d, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	b = pvclock(g.mem + 0x200000, r.rbx);
	assert_true(b >= 1000000000000ull && b < 1002000000000ull);
	guest_destroy(&g);
}

GUEST_ASM(steal_code, 64, "mov $0x4b564d03, %ecx; mov $0x201001, %eax; xor %edx, %edx; wrmsr; 1: out %al, $0x80; jmp 1b");
static void steal(void **state)
{
	uint64_t tsc;
	struct guest g;

	OPEN(&g, steal_code, 0);
	for (int i = 0; i < 5; i++)
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(ld32(g.mem + 0x201008) & 1, 0);        /* version is even */
	assert_true(ld64(g.mem + 0x201000) < 10000000000ull);
	assert_int_equal(guest_set_msr(&g, 0, 0x3b, 1ull << 40), 1);
	assert_int_equal(guest_get_msr(&g, 0, 0x3b, &tsc), 1);
	assert_int_equal(tsc, 1ull << 40);
	guest_destroy(&g);
}

/* -- the debugger holds interrupts back ------------------------------------------------------------------- */
GUEST_ASM(block_code, 64, "sti; nop; nop; nop; nop; hlt\n.globl block_irq\nblock_irq: out %al, $0x80; iretq");
extern const uint8_t block_irq[];
static void block(void **state)
{
	struct kvm_guest_debug d = { .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ };
	struct kvm_interrupt irq = { .irq = 0x35 };
	struct guest g;

	need_real();
	OPEN(&g, block_code, 0);
	guest_gate(&g, 64, 0x35, 0x10000 + (uint64_t)(block_irq - block_code), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_GUEST_DEBUG, &d, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_DEBUG);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &irq, NULL), 0);
	for (uint64_t pc = 0x10002; pc < 0x10005; pc++) {
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_DEBUG);
		assert_int_equal(g.run[0]->debug.arch.pc, pc);
	}
	d.control = 0;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_GUEST_DEBUG, &d, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(g.run[0]->io.port, 0x80);
	guest_destroy(&g);
}

/* -- a machine that moves --------------------------------------------------------------------------------- */
/* Computes with integer, x87 and vector registers while its LAPIC timer and PIT interrupt it; reports a checksum at the end. */
GUEST_ASM(move_code, 64,
	"mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp); movl $0xb, 0x3e0(%rbp); movl $0x20060, 0x320(%rbp); movl $300000, 0x380(%rbp)\n"
	"movl $0x80070, 0x350(%rbp); mov %cr4, %rax; or $0x600, %eax; mov %rax, %cr4; fninit; fldpi; fld1; pcmpeqd %xmm1, %xmm1; pxor %xmm2, %xmm2\n"
	"mov $0x1234567, %eax; mov $0x9e3779b97f4a7c15, %rbx; xor %ecx, %ecx; xor %r8d, %r8d; xor %r9d, %r9d; movq %rbx, %xmm3; sti\n"
	"1: imul %rbx, %rax; rol $13, %rax; add %rcx, %rax; movq %rax, %xmm0; psubq %xmm1, %xmm2; paddq %xmm3, %xmm2; pxor %xmm0, %xmm2\n"
	"fxch; faddp %st, %st(1); fldpi; inc %ecx; test $0xfff, %ecx; jnz 2f; out %al, $0x80\n"
	"2: cmp $200000, %ecx; jb 1b; 3: cmp $20, %r9d; jb 3b; cli\n"
	"movq %xmm2, %rdx; xor %rdx, %rax; out %eax, $0x81; shr $32, %rax; out %eax, $0x81; fstp %st; fstpt 0x200000; mov 0x200000, %eax; out %eax, $0x81; mov %r9d, %eax; cmp $20, %eax; setae %al; out %al, $0x82; hlt\n"
	".globl move_irq\nmove_irq: inc %r9d; movl $0, 0xb0(%rbp); iretq");
extern const uint8_t move_irq[];

struct machine {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xsave xsave;
	struct kvm_xcrs xcrs;
	struct kvm_vcpu_events events;
	struct kvm_debugregs debug;
	struct kvm_lapic_state lapic;
	struct kvm_mp_state mp;
	struct kvm_irqchip chip[3];
	struct kvm_pit_state2 pit;
	struct kvm_clock_data clock;
	uint64_t tsc;
};
#define DO(f, req, p) assert_int_equal(gioctl(f, req, p, NULL), 0)

static void save(struct guest *g, struct machine *m)
{
	struct gfile *v = &g->vcpu[0];

	g->run[0]->immediate_exit = 1;          /* the open port exit is completed first */
	assert_int_equal(guest_run(g, 0), -EINTR);
	g->run[0]->immediate_exit = 0;
	DO(v, KVM_GET_REGS, &m->regs);
	DO(v, KVM_GET_SREGS, &m->sregs);
	DO(v, KVM_GET_XSAVE, &m->xsave);
	DO(v, KVM_GET_XCRS, &m->xcrs);
	DO(v, KVM_GET_VCPU_EVENTS, &m->events);
	DO(v, KVM_GET_DEBUGREGS, &m->debug);
	DO(v, KVM_GET_LAPIC, &m->lapic);
	DO(v, KVM_GET_MP_STATE, &m->mp);
	for (uint32_t i = 0; i < 3; i++) {
		m->chip[i].chip_id = i;
		DO(&g->vm, KVM_GET_IRQCHIP, &m->chip[i]);
	}
	DO(&g->vm, KVM_GET_PIT2, &m->pit);
	DO(&g->vm, KVM_GET_CLOCK, &m->clock);
	guest_get_msr(g, 0, 0x10, &m->tsc);
}

static void restore(struct guest *g, struct machine *m)
{
	struct gfile *v = &g->vcpu[0];

	for (uint32_t i = 0; i < 3; i++)
		DO(&g->vm, KVM_SET_IRQCHIP, &m->chip[i]);
	DO(&g->vm, KVM_SET_PIT2, &m->pit);
	m->clock.flags = 0;
	DO(&g->vm, KVM_SET_CLOCK, &m->clock);
	/* events before the registers: nothing may get lost by the order */
	DO(v, KVM_SET_VCPU_EVENTS, &m->events);
	DO(v, KVM_SET_XCRS, &m->xcrs);
	DO(v, KVM_SET_SREGS, &m->sregs);
	DO(v, KVM_SET_REGS, &m->regs);
	DO(v, KVM_SET_XSAVE, &m->xsave);
	DO(v, KVM_SET_DEBUGREGS, &m->debug);
	guest_set_msr(g, 0, 0x10, m->tsc);
	DO(v, KVM_SET_LAPIC, &m->lapic);
	DO(v, KVM_SET_MP_STATE, &m->mp);
}

/* `every`: move after so many exits of the loop, 0: never. */
static void run_moving(unsigned every, uint32_t result[3])
{
	struct machine *m = calloc(1, sizeof *m);
	unsigned n = 0, k = 0;
	struct guest g, next;

	OPEN(&g, move_code, .irqchip = true, .pit = true);
	map_high(&g);
	guest_gate(&g, 64, 0x60, 0x10000 + (uint64_t)(move_irq - move_code), 0);
	for (;;) {
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
		if (g.run[0]->io.port == 0x81)
			result[k++] = (uint32_t)out_data(&g);
		if (g.run[0]->io.port == 0x82)
			break;
		if (!every || ++n % every)
			continue;
		save(&g, m);
		guest_create(&next, &(struct guest_cfg){ .prov = prov, .irqchip = true, .pit = true });
		memcpy(next.mem, g.mem, g.mem_size);
		guest_destroy(&g);
		restore(&next, m);
		g = next;
	}
	assert_int_equal(out_data(&g), 1);
	assert_int_equal(k, 3);
	guest_destroy(&g);
	free(m);
}

static void moving(void **state)
{
	uint32_t want[3], got[3];

	need_real();
	run_moving(0, want);
	run_moving(7, got);
	assert_memory_equal(want, got, sizeof want);
	run_moving(1, got);
	assert_memory_equal(want, got, sizeof want);
}

/* -- what is claimed ----------------------------------------------------------------------------------------- */
static void claims(void **state)
{
	struct kvm_vcpu_events e = { 0 };
	struct guest g;

	if (prov == GUEST_KVM)
		skip();         /* softkvm's own */
	OPEN(&g, steal_code, 0);
	assert_int_equal(gioctl_val(&g.sys, KVM_CHECK_EXTENSION, KVM_CAP_X86_SMM), 0);
	assert_int_equal(gioctl_val(&g.vcpu[0], KVM_SMI, 0), -ENOTTY);
	assert_int_equal(gioctl_val(&g.sys, KVM_CHECK_EXTENSION, KVM_CAP_X86_DISABLE_EXITS) & KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_MWAIT);
	e.flags = KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
	e.triple_fault.pending = 1;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), -EINVAL);
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){ .cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT, .args = { 1 } }, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_SHUTDOWN);
	guest_destroy(&g);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest t[] = {
		cmocka_unit_test(dirty_log), cmocka_unit_test(dirty_manual), cmocka_unit_test(dirty_initially_set), cmocka_unit_test(read_only),
		cmocka_unit_test(slot_changes), cmocka_unit_test(self_modifying), cmocka_unit_test(eventfds), cmocka_unit_test(split),
		cmocka_unit_test(msr_filter), cmocka_unit_test(clocks), cmocka_unit_test(steal), cmocka_unit_test(block), cmocka_unit_test(moving),
		cmocka_unit_test(claims),
	};

	prov = argc > 1 && !strcmp(argv[1], "kvm") ? GUEST_KVM : GUEST_SOFT;
	if (!guest_have(prov))
		return 77;
	return cmocka_run_group_tests(t, NULL, NULL);
}
