/* What privileged instructions and events show user space: port strings, debug exits, NMI, interrupt window, shutdown. */
#include <errno.h>
#include <stdlib.h>

#include "guest.h"
#include "handlers.h"

static void start64(struct guest *g, const uint8_t *code, const uint8_t *end)
{
	guest_create(g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_load(g, 0x10000, code, (size_t)(end - code));
	guest_load(g, HANDLERS, h64, (size_t)(h64_end - h64));
	guest_long64(g, 0, 0x10000);
	for (unsigned v = 0; v < 0x40; v++)
		guest_gate(g, 64, v, HANDLERS + 16 * v, 0);
}

static uint8_t *io_data(struct guest *g) { return (uint8_t *)g->run[0] + g->run[0]->io.data_offset; }

/* -- port strings ----------------------------------------------------------------------------- */
GUEST_ASM(strings, 64,
	"mov $0x30000, %esi; mov $5, %ecx; mov $0x55, %edx; cld; rep outsw\n"
	"mov $0x31ffc, %edi; mov $3, %ecx; rep insl\n"
	"std; mov $0x31003, %edi; mov $4, %ecx; rep insb; cld\n"
	"xor %ecx, %ecx; rep insb; mov $0x41, %al; out %al, $0xf4");

/* Serve one exit; returns elements moved. */
static unsigned serve_string(struct guest *g, bool in, unsigned size, uint8_t *buf)
{
	assert_int_equal(guest_run(g, 0), KVM_EXIT_IO);
	assert_int_equal(g->run[0]->io.port, 0x55);
	assert_int_equal(g->run[0]->io.direction, in ? KVM_EXIT_IO_IN : KVM_EXIT_IO_OUT);
	assert_int_equal(g->run[0]->io.size, size);
	if (in)
		memcpy(io_data(g), buf, g->run[0]->io.count * size);
	else
		memcpy(buf, io_data(g), g->run[0]->io.count * size);
	return g->run[0]->io.count;
}

static void test_strings(void **state)
{
	uint8_t out[10], in[12];
	struct kvm_regs r;
	struct guest g;

	start64(&g, strings, strings_end);
	memcpy(g.mem + 0x30000, "0123456789", 10);
	for (unsigned n = 0; n < 5;)
		n += serve_string(&g, false, 2, out + 2 * n);
	assert_memory_equal(out, "0123456789", 10);
	memcpy(in, "abcdefghijkl", 12);
	for (unsigned n = 0; n < 3;)
		n += serve_string(&g, true, 4, in + 4 * n);
	for (unsigned n = 0; n < 4;)
		n += serve_string(&g, true, 1, in + n);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(g.run[0]->io.port, 0xf4);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rdi, 0x30fff);
	assert_int_equal(r.rcx, 0);
	assert_memory_equal(g.mem + 0x31ffc, "abcdefghijkl", 12);
	assert_memory_equal(g.mem + 0x31000, "dcba", 4);
	guest_destroy(&g);
}

/* User space that moves RIP while a port exit is open gets that RIP, as after a reset through a port. */
GUEST_ASM(moved, 64, "in $0x60, %al; hlt; nop; nop; out %al, $0x61; hlt");

static void test_moved_rip(void **state)
{
	struct kvm_regs r;
	struct guest g;

	start64(&g, moved, moved_end);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rip, 0x10000);
	r.rip = 0x10003;
	r.rax = 0x77;
	guest_set_regs(&g, 0, &r);
	*io_data(&g) = 0x99;
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(g.run[0]->io.port, 0x61);
	assert_int_equal(*io_data(&g), 0x77);
	guest_destroy(&g);
}

/* -- guest debugging -------------------------------------------------------------------------- */
GUEST_ASM(debugged, 64, "nop; mov $1, %eax; int3; nop; mov %eax, 0x9000; nop; hlt");

static void guest_debug(struct guest *g, uint32_t control, uint64_t addr, uint64_t dr7)
{
	struct kvm_guest_debug d = { .control = control };

	d.arch.debugreg[0] = addr;
	d.arch.debugreg[7] = dr7;
	assert_int_equal(gioctl(&g->vcpu[0], KVM_SET_GUEST_DEBUG, &d, NULL), 0);
}

static void expect_debug(struct guest *g, uint64_t pc, unsigned exception)
{
	assert_int_equal(guest_run(g, 0), KVM_EXIT_DEBUG);
	assert_int_equal(g->run[0]->debug.arch.pc, pc);
	assert_int_equal(g->run[0]->debug.arch.exception, exception);
}

static void test_guest_debug(void **state)
{
	struct kvm_regs r;
	struct guest g;

	start64(&g, debugged, debugged_end);
	guest_debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP, 0, 0);
	expect_debug(&g, 0x10001, 1);
	expect_debug(&g, 0x10006, 1);
	assert_true(g.run[0]->debug.arch.dr6 & 1 << 14);
	expect_debug(&g, 0x10006, 3);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rip, 0x10006);
	assert_int_equal(r.rflags & 0x100, 0);
	r.rip++;
	guest_set_regs(&g, 0, &r);
	guest_debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, 0x10008, 2 | 1 << 10);
	expect_debug(&g, 0x10008, 1);
	assert_true(g.run[0]->debug.arch.dr6 & 1);
	guest_debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, 0x9000, 0xd0002 | 1 << 10);
	expect_debug(&g, 0x1000f, 1);
	guest_debug(&g, 0, 0, 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	guest_destroy(&g);
}

/* -- interrupts with the chips in user space -------------------------------------------------- */
GUEST_ASM(irqs, 64,
	"xor %r13d, %r13d; lea 1f(%rip), %r14; mov %r14, %r15; nop; hlt\n"
	"sti; 1: nop; nop; hlt; hlt");

static void expect_out(struct guest *g, unsigned port, uint64_t data)
{
	uint64_t v = 0;

	assert_int_equal(guest_run(g, 0), KVM_EXIT_IO);
	memcpy(&v, io_data(g), g->run[0]->io.size);
	assert_int_equal(g->run[0]->io.port, port);
	assert_int_equal(v, data);
}

static void test_window(void **state)
{
	struct kvm_interrupt irq = { .irq = 0x35 };
	struct guest g;

	start64(&g, irqs, irqs_end);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	assert_int_equal(g.run[0]->if_flag, 0);
	assert_int_equal(g.run[0]->ready_for_interrupt_injection, 0);
	g.run[0]->request_interrupt_window = 1;
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IRQ_WINDOW_OPEN);
	assert_int_equal(g.run[0]->ready_for_interrupt_injection, 1);
	g.run[0]->request_interrupt_window = 0;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &irq, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &irq, NULL), -EEXIST);
	expect_out(&g, 0x80, 0x35);
	expect_out(&g, 0x86, 1);        /* the shadow of STI covers one NOP */
	guest_destroy(&g);
}

/* An interrupt in the middle of a repeated instruction pushes RF (SDM vol. 3 17.3.1.1), at its end not. */
GUEST_ASM(rep_irq, 64, "mov $1, %r13d; lea 2f(%rip), %r14; mov %r14, %r15; mov $0x30000, %esi; mov $8192, %ecx; mov $0x55, %edx; sti\n"
	  "2: rep outsb; nop; hlt");

static void test_rep_interrupted(void **state)
{
	struct kvm_interrupt irq = { .irq = 0x35 };
	struct guest g;

	for (unsigned batches = 1; batches <= 2; batches++) {
		unsigned n = 0;

		start64(&g, rep_irq, rep_irq_end);
		for (unsigned want = batches * 4096; n < want; n += g.run[0]->io.count)
			assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
		assert_int_equal(n, batches * 4096);
		assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &irq, NULL), 0);
		expect_out(&g, 0x80, 0x35);
		expect_out(&g, 0x86, batches == 1 ? 0 : 2);
		expect_out(&g, 0x88, 0x18);
		expect_out(&g, 0x8a, batches == 1 ? 0x10200 : 0x200);
		guest_destroy(&g);
	}
}

GUEST_ASM(nmis, 64,
	"1: hlt; nop; hlt\n"
	".skip 60\n"
	".globl nmis_handler\nnmis_handler: mov $1, %al; out %al, $0x70; nop; mov $2, %al; out %al, $0x70; iretq");
extern const uint8_t nmis_handler[];

static void test_nmi(void **state)
{
	struct kvm_vcpu_events e;
	struct guest g;

	start64(&g, nmis, nmis_end);
	guest_gate(&g, 64, 2, 0x10000 + (uint64_t)(nmis_handler - nmis), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_NMI, NULL, NULL), 0);
	expect_out(&g, 0x70, 1);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_NMI, NULL, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(e.nmi.masked, 1);
	expect_out(&g, 0x70, 2);        /* the second one waits for IRET */
	expect_out(&g, 0x70, 1);
	expect_out(&g, 0x70, 2);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(e.nmi.masked, 0);
	guest_destroy(&g);
}

/* -- events that wait where the structure has no field of its own -------------------------------- */
GUEST_ASM(traps, 64, "pushfq; orl $0x100, (%rsp); popfq; out %al, $0x55; hlt");

static void trap_saved(bool payload)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_EXCEPTION_PAYLOAD, .args = { 1 } };
	struct kvm_vcpu_events e;
	struct kvm_debugregs d;
	struct guest g;

	start64(&g, traps, traps_end);
	if (payload)
		assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &cap, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	g.run[0]->immediate_exit = 1;
	assert_int_equal(guest_run(&g, 0), -EINTR);     /* the OUT is complete, its single-step trap is due */
	g.run[0]->immediate_exit = 0;
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_DEBUGREGS, &d, NULL), 0);
	assert_int_equal(e.exception.injected, !payload);
	assert_int_equal(e.exception.pending, payload);
	assert_int_equal(e.exception.nr, 1);
	assert_int_equal(payload ? e.exception_payload : d.dr6 & 0x4000, 0x4000);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), 0);
	expect_out(&g, 0x80, 1);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_DEBUGREGS, &d, NULL), 0);
	assert_int_equal(d.dr6 & 0xe00f, 0x4000);
	guest_destroy(&g);
}

static void test_saved_events(void **state)
{
	struct kvm_msi nmi = { .address_lo = 0xfee00000, .data = 4 << 8 };
	struct kvm_vcpu_events e;
	struct guest g;

	trap_saved(false);
	trap_saved(true);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true });
	assert_int_equal(gioctl(&g.vm, KVM_SIGNAL_MSI, &nmi, NULL), 1);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(e.nmi.pending, 1);
	guest_destroy(&g);
}

/* -- injected exceptions, shutdown -------------------------------------------------------------- */
GUEST_ASM(quiet, 64, "hlt; hlt");

static void test_inject(void **state)
{
	struct kvm_vcpu_events e = { .exception = { .injected = 1, .nr = 13, .has_error_code = 1, .error_code = 0x1234 } };
	struct kvm_sregs s;
	struct guest g;

	start64(&g, quiet, quiet_end);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), 0);
	expect_out(&g, 0x80, 13);
	expect_out(&g, 0x84, 0x1234);
	guest_get_sregs(&g, 0, &s);
	s.idt.limit = 0;
	guest_set_sregs(&g, 0, &s);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), 0);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_SHUTDOWN);
	guest_destroy(&g);
}

/* -- what cannot be emulated: code that is not in memory ------------------------------------ */
static void run_nowhere(struct guest *g, bool enable, unsigned cpl)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = { enable } };
	struct kvm_sregs s;
	struct kvm_regs r;

	start64(g, quiet, quiet_end);
	assert_int_equal(gioctl(&g->vm, KVM_ENABLE_CAP, &cap, NULL), 0);
	guest_get_regs(g, 0, &r);
	guest_get_sregs(g, 0, &s);
	r.rip = r.r14 = 0x30000000;
	if (cpl) {
		s.cs.selector = 0x23;
		s.ss.selector = 0x2b;
		s.cs.dpl = s.ss.dpl = 3;
		guest_set_sregs(g, 0, &s);
	}
	guest_set_regs(g, 0, &r);
}

static void expect_failure(struct guest *g)
{
	assert_int_equal(guest_run(g, 0), KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(g->run[0]->emulation_failure.suberror, KVM_INTERNAL_ERROR_EMULATION);
	assert_true(g->run[0]->emulation_failure.ndata >= 1);
	assert_int_equal(g->run[0]->emulation_failure.flags, 0);        /* there are no bytes to show */
}

static void test_emulation_failure(void **state)
{
	struct kvm_vcpu_events e;
	struct kvm_regs r;
	struct guest g;

	for (unsigned cpl = 0; cpl <= 3; cpl += 3) {
		run_nowhere(&g, true, cpl);
		for (int i = 0; i < 2; i++) {   /* nothing has changed: again the same */
			expect_failure(&g);
			guest_get_regs(&g, 0, &r);
			assert_int_equal(r.rip, 0x30000000);
			assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
			assert_int_equal(e.exception.injected | e.exception.pending, 0);
		}
		guest_destroy(&g);
		run_nowhere(&g, false, cpl);
		if (!cpl)
			expect_failure(&g);
		expect_out(&g, 0x80, 6);
		expect_out(&g, 0x86, 0);
		expect_out(&g, 0x88, cpl ? 0x23 : 0x18);
		guest_destroy(&g);
	}
}

/* -- stack, IDT and far pointers in a device ---------------------------------------------------- */
#define DEVICE 0x10000000

/* Serve the device until something else happens: the exit's reason. */
static int run_device(struct guest *g, uint8_t dev[4096], unsigned *writes)
{
	struct kvm_run *r = g->run[0];
	int why;

	*writes = 0;
	while ((why = guest_run(g, 0)) == KVM_EXIT_MMIO) {
		uint64_t off = r->mmio.phys_addr - DEVICE;

		assert_true(off + r->mmio.len <= 4096);
		memcpy(r->mmio.is_write ? dev + off : r->mmio.data, r->mmio.is_write ? r->mmio.data : dev + off, r->mmio.len);
		*writes += r->mmio.is_write;
	}
	return why;
}

static void device_out(struct guest *g, uint8_t *dev, unsigned port, uint64_t data, unsigned want_writes)
{
	unsigned writes;
	uint64_t v = 0;

	assert_int_equal(run_device(g, dev, &writes), KVM_EXIT_IO);
	memcpy(&v, io_data(g), g->run[0]->io.size);
	assert_int_equal(g->run[0]->io.port, port);
	assert_int_equal(v, data);
	assert_int_equal(writes, want_writes);
}

/* Each handler begins with an instruction that must not see, nor lose, what its delivery has pushed. */
GUEST_ASM(dev_stack, 64,
	"mov $0x10001000, %rsp; mov $0x55aa, %ebx; ud2; mov $0x5a, %al; out %al, $0x70; int $0x31; out %al, $0x71; hlt\n"
	".globl dev_ud, dev_bp, dev_int\n"
	"dev_ud: int3; addq $2, (%rsp); iretq\n"
	"dev_bp: movl $0x77, 0x10000010; mov (%rsp), %rax; out %eax, $0x80; iretq\n"
	"dev_int: mov 0x10000010, %eax; iretq");
extern const uint8_t dev_ud[], dev_bp[], dev_int[];

static void device_gate(struct guest *g, unsigned vector, const uint8_t *at)
{
	guest_gate(g, 64, vector, 0x10000 + (uint64_t)(at - dev_stack), 0);
}

static void test_device_stack(void **state)
{
	uint8_t dev[4096] = { 0 };
	uint64_t frame[5];
	struct guest g;

	start64(&g, dev_stack, dev_stack_end);
	device_gate(&g, 6, dev_ud);
	device_gate(&g, 3, dev_bp);
	device_gate(&g, 0x31, dev_int);
	/* two frames, and the handler's own store */
	device_out(&g, dev, 0x80, 0x10001 + (uint64_t)(dev_ud - dev_stack), 11);
	memcpy(frame, dev + 4096 - 40, 40);
	assert_int_equal(frame[0], 0x1000c);    /* UD2 */
	assert_int_equal(frame[1], 0x18);
	assert_int_equal(frame[2] & 0x10fff, 0x10002);
	assert_int_equal(frame[3], DEVICE + 4096);
	assert_int_equal(frame[4], 0x10);
	device_out(&g, dev, 0x70, 0x5a, 1);
	device_out(&g, dev, 0x71, 0x77, 5);
	guest_destroy(&g);
}

/* INT n, a fault and an interrupt from outside through an IDT whose gates are a device's; one that is not present. */
GUEST_ASM(dev_idt, 64,
	"mov $0x8000, %esp; lidt 1f(%rip); int $0x31; out %al, $0x70; ud2; out %al, $0x71; int $0x32; out %al, $0x72\n"
	"hlt; 1: .word 0xfff; .quad 0x10000000\n"
	".globl idt_int, idt_ud, idt_np, idt_loop, idt_load\n"
	"idt_loop: jmp idt_loop; idt_load: mov 0x10000310, %eax; out %eax, $0x82; hlt\n"
	"idt_int: mov (%rsp), %rax; out %eax, $0x80; iretq\n"
	"idt_ud: addq $2, (%rsp); iretq\n"
	"idt_np: pop %rax; out %eax, $0x81; mov (%rsp), %rax; out %eax, $0x80; addq $2, (%rsp); iretq");
extern const uint8_t idt_int[], idt_ud[], idt_np[], idt_loop[], idt_load[];

static void test_device_idt(void **state)
{
	struct kvm_interrupt irq = { .irq = 0x31 };
	struct kvm_vcpu_events e;
	uint8_t dev[4096] = { 0 };
	struct kvm_regs r;
	struct guest g;

	start64(&g, dev_idt, dev_idt_end);
	guest_gate(&g, 64, 0x31, 0x10000 + (uint64_t)(idt_int - dev_idt), 0);
	guest_gate(&g, 64, 6, 0x10000 + (uint64_t)(idt_ud - dev_idt), 0);
	guest_gate(&g, 64, 11, 0x10000 + (uint64_t)(idt_np - dev_idt), 0);
	memcpy(dev, g.mem + 0x2000, 4096);
	dev[0x32 * 16 + 5] = 0xe;
	device_out(&g, dev, 0x80, 0x1000e, 0);
	device_out(&g, dev, 0x70, 0xe, 0);
	device_out(&g, dev, 0x71, 0xe, 0);
	device_out(&g, dev, 0x81, 0x32 * 8 + 2, 0);
	device_out(&g, dev, 0x80, 0x10014, 0);
	device_out(&g, dev, 0x72, 0x14, 0);
	/* From outside; it can be seen, and taken back, while its gate is being read. */
	for (int k = 0; k < 2; k++) {
		g.run[0]->immediate_exit = 1;
		assert_int_equal(guest_run(&g, 0), -EINTR);
		g.run[0]->immediate_exit = 0;
		guest_get_regs(&g, 0, &r);
		r.rip = 0x10000 + (uint64_t)(idt_loop - dev_idt);
		r.rflags |= 0x200;
		guest_set_regs(&g, 0, &r);
		assert_int_equal(gioctl(&g.vcpu[0], KVM_INTERRUPT, &irq, NULL), 0);
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_MMIO);
		assert_int_equal(g.run[0]->mmio.phys_addr, DEVICE + 0x310);
		assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_VCPU_EVENTS, &e, NULL), 0);
		assert_true(e.interrupt.injected && e.interrupt.nr == 0x31);
		memcpy(g.run[0]->mmio.data, dev + 0x310, 8);
		e.interrupt.injected = !k;
		assert_int_equal(gioctl(&g.vcpu[0], KVM_SET_VCPU_EVENTS, &e, NULL), 0);
		if (!k)
			device_out(&g, dev, 0x80, r.rip, 0);
	}
	r.rip = 0x10000 + (uint64_t)(idt_load - dev_idt);
	guest_set_regs(&g, 0, &r);
	memcpy(dev + 0x310, "\x78\x56\x34\x12", 4);
	device_out(&g, dev, 0x82, 0x12345678, 0);
	guest_destroy(&g);
}

/*
 * Far branches with REX.W: offsets of 64 bits on Intel processors, of 32 on AMD's; loaded from a device they are KVM's emulator's
 * affair, which knows the former only.
 */
GUEST_ASM(far_w, 64,
	"rex64 ljmp *(%rdi); hlt; .globl far_jumped, far_called\n"
	"far_jumped: out %al, $0x70; rex64 lcall *10(%rdi); out %al, $0x72; hlt\n"
	"far_called: mov (%rsp), %rax; out %al, $0x71; mov 8(%rsp), %rax; out %eax, $0x73; rex64 lret");
extern const uint8_t far_jumped[], far_called[];

/* Another vendor's name, if any, and a processor with or without addresses of 57 bits. */
static void set_cpuid(struct guest *g, const char *name, bool la57)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof *c + 128 * sizeof c->entries[0]);

	c->nent = 128;
	assert_int_equal(gioctl(&g->sys, KVM_GET_SUPPORTED_CPUID, c, NULL), 0);
	for (unsigned i = 0; i < c->nent; i++) {
		struct kvm_cpuid_entry2 *e = &c->entries[i];

		if (name && !(e->function & 0x7fffffff)) {
			memcpy(&e->ebx, name, 4);
			memcpy(&e->edx, name + 4, 4);
			memcpy(&e->ecx, name + 8, 4);
		}
		if (e->function == 7 && !e->index)
			e->ecx = (e->ecx & ~(1u << 16)) | (uint32_t)la57 << 16;
		if (e->function == 0x80000008)
			e->eax = (e->eax & ~0xff00u) | (la57 ? 57 : 48) << 8;
	}
	assert_int_equal(gioctl(&g->vcpu[0], KVM_SET_CPUID2, c, NULL), 0);
	free(c);
}

static void far_rexw(bool intel, bool device)
{
	uint64_t jump = 0x10000 + (uint64_t)(far_jumped - far_w), call = 0x10000 + (uint64_t)(far_called - far_w);
	uint8_t dev[4096] = { 0 }, *p;
	struct kvm_regs r;
	struct guest g;

	start64(&g, far_w, far_w_end);
	set_cpuid(&g, intel ? "GenuineIntel" : "AuthenticAMD", false);
	p = device ? dev : g.mem + 0x30000;
	memcpy(p, &jump, 8);
	memcpy(p + 10, &call, 8);
	p[8] = p[18] = 0x18;
	guest_get_regs(&g, 0, &r);
	r.rdi = device ? DEVICE : 0x30000;
	guest_set_regs(&g, 0, &r);
	if (intel || device) {
		device_out(&g, dev, 0x70, 0, 0);
		device_out(&g, dev, 0x71, (0x10000 + (uint64_t)(far_jumped - far_w) + 6) & 0xff, 0);
		device_out(&g, dev, 0x73, 0x18, 0);
		device_out(&g, dev, 0x72, 0x18, 0);
	} else {
		expect_out(&g, 0x80, 13);
		expect_out(&g, 0x84, 0);        /* the null selector behind the 32 bits */
	}
	guest_destroy(&g);
}

static void test_far_rexw(void **state)
{
	for (int k = 0; k < 4; k++)
		far_rexw(k & 1, k & 2);
}

/* -- TF and SYSCALL, SYSRET ---------------------------------------------------------------------- */
/* SYSRET traps by the TF it loads, before the next instruction; SYSCALL by what the mask leaves of it. */
GUEST_ASM(tf_code, 64,
	"xor %r13d, %r13d; mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x00180018, %edx; wrmsr\n"
	"inc %ecx; lea tf_target(%rip), %rax; xor %edx, %edx; wrmsr; mov $0xc0000084, %ecx; mov $0x100, %eax; wrmsr\n"
	"lea 1f(%rip), %rcx; mov %rcx, %r14; lea 2f(%rip), %r15; mov $0x102, %r11d; sysretq; 1: ud2\n"
	"2: lea 3f(%rip), %rcx; mov $2, %r11d; sysretq; 3: pushq $0x102; popfq; syscall\n"
	".globl tf_target, tf_step\n"
	"tf_target: mov %r11d, %eax; out %eax, $0x70; hlt; tf_step: syscall; hlt");
extern const uint8_t tf_target[], tf_step[];

static void test_syscall_tf(void **state)
{
	struct kvm_regs r;
	struct guest g;

	start64(&g, tf_code, tf_code_end);
	expect_out(&g, 0x80, 1);
	expect_out(&g, 0x86, 0);
	expect_out(&g, 0x88, 0x2b);
	for (int k = 0; k < 4; k++)     /* flags, DR6, SS, stack */
		assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	expect_out(&g, 0x70, 0x102);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	/* A debugger steps over it, whatever the mask says. */
	guest_get_regs(&g, 0, &r);
	r.rip = 0x10000 + (uint64_t)(tf_step - tf_code);
	guest_set_regs(&g, 0, &r);
	guest_debug(&g, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, 0, 0);
	expect_debug(&g, 0x10000 + (uint64_t)(tf_target - tf_code), 1);
	guest_destroy(&g);
}

/* -- addresses of 57 bits ------------------------------------------------------------------------- */
/* What registers take is for the processor's width to say, not for CR4.LA57. */
GUEST_ASM(wide, 64,
	"lgdt (%rdi); out %al, $0x70; .org wide + 16; lidt (%rdi); out %al, $0x70; .org wide + 32; mov $0x30, %eax; ltr %ax; out %al, $0x70\n"
	".org wide + 48; mov $0x30, %eax; lldt %ax; out %al, $0x70; .org wide + 64; xor %eax, %eax; invpcid (%rsi), %rax; out %al, $0x70\n"
	".org wide + 80; mov %cr4, %rax; or $0x10000, %eax; mov %rax, %cr4; mov 2(%rdi), %rax; wrfsbase %rax; out %al, $0x70");

static void wide_one(unsigned n, bool la57, uint64_t addr, bool ok)
{
	struct { uint64_t pcid, addr; } inv = { .addr = addr };
	uint64_t desc[2] = { 0x67 | (addr & 0xffffff) << 16 | (n == 3 ? 0x82ull : 0x89ull) << 40 | (addr >> 24 & 0xff) << 56, addr >> 32 };
	uint64_t base[6];
	struct kvm_sregs s;
	struct kvm_regs r;
	struct guest g;

	start64(&g, wide, wide_end);
	set_cpuid(&g, NULL, la57);
	memcpy(g.mem + 0x1030, desc, 16);
	g.mem[0x30000] = g.mem[0x30001] = 0x7f;
	memcpy(g.mem + 0x30002, &addr, 8);
	memcpy(g.mem + 0x30010, &inv, 16);
	guest_get_regs(&g, 0, &r);
	r.rip = 0x10000 + 16 * n;
	r.rdi = 0x30000;
	r.rsi = 0x30010;
	guest_set_regs(&g, 0, &r);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_IO);
	assert_int_equal(g.run[0]->io.port, ok ? 0x70 : 0x80);
	if (!ok)
		assert_int_equal(*io_data(&g), 13);
	guest_get_sregs(&g, 0, &s);
	base[0] = s.gdt.base, base[1] = s.idt.base, base[2] = s.tr.base, base[3] = s.ldt.base, base[5] = s.fs.base;
	if (n != 4)
		assert_int_equal(base[n] == addr, ok);
	guest_destroy(&g);
}

static void test_wide(void **state)
{
	for (unsigned n = 0; n < 6; n++)
		for (int la57 = 0; la57 < 2; la57++) {
			wide_one(n, la57, 0xffffaaaaaaaaa000, true);
			wide_one(n, la57, 0xffaaaaaaaaaaa000, la57);
			wide_one(n, la57, 0x0055555555555000, la57);
			wide_one(n, la57, 0xfaaaaaaaaaaaa000, false);
		}
}

int main(void)
{
	const struct CMUnitTest t[] = {
		cmocka_unit_test(test_strings), cmocka_unit_test(test_moved_rip), cmocka_unit_test(test_guest_debug),
		cmocka_unit_test(test_window), cmocka_unit_test(test_nmi), cmocka_unit_test(test_inject),
		cmocka_unit_test(test_emulation_failure), cmocka_unit_test(test_saved_events), cmocka_unit_test(test_rep_interrupted),
		cmocka_unit_test(test_device_stack), cmocka_unit_test(test_device_idt), cmocka_unit_test(test_far_rexw),
		cmocka_unit_test(test_syscall_tf), cmocka_unit_test(test_wide),
	};

	return cmocka_run_group_tests(t, NULL, NULL);
}
