/*
 * Four vCPUs at once, the others started by INIT and SIPI: locked arithmetic (also across pages), IPIs, page tables
 * changed with shoot-down, code changed under the feet of who runs it, while the host reads the dirty log.
 * Everything the guest found wrong is counted in its memory; under TSan this is the test of the engine's own locking.
 */
#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "guest.h"

#define CPUS 4
#define TRAMPOLINE 0x9000       /* SIPI vector 9 */
#define VARS 0x60000            /* what each word is: enum var */
#define LOCKS 4000
#define SPLITS 200
#define IPIS 25
#define REMAPS 40
#define PATCHES 100

enum var { V_ID, V_ARRIVED, V_SUM, V_CAS, V_ACK, V_TURN, V_GEN, V_WRONG, V_PATCH, V_OVER, V_COUNT };

/* An AP's way from real mode to the common code at 0x10000; descriptors of GDT and IDT lie behind the variables. */
GUEST_ASM(trampoline, 16,
	"cli; xor %ax, %ax; mov %ax, %ds; mov $0x6000, %bx; mov %bx, %ds; lgdtl 0x800; lidtl 0x808\n"
	"mov $0x620, %eax; mov %eax, %cr4; mov $0x3000, %eax; mov %eax, %cr3\n"
	"mov $0xc0000080, %ecx; rdmsr; or $0x900, %eax; wrmsr\n"
	"mov %cr0, %eax; or $0x80010001, %eax; mov %eax, %cr0; ljmpl $0x18, $0x10000");

#define STR2(x) #x
#define STR(x) STR2(x)
#define VAR(n) "0x60000+8*" #n
#define ID VAR(0)
#define ARRIVED VAR(1)
#define SUM VAR(2)
#define CAS VAR(3)
#define ACK VAR(4)
#define TURN VAR(5)
#define GEN VAR(6)
#define WRONG VAR(7)
#define PATCH VAR(8)
#define OVER VAR(9)
/* Everybody waits until all are at the same place. `n`: how many places came before, and this one. */
#define BARRIER(n) "lock incq " ARRIVED "; 1: pause; cmpq $" #n "*4, " ARRIVED "; jb 1b\n"
/* IPI to all others (vector in the low bits), then wait for three more acknowledgements. Clobbers rax rcx rdx rbx. */
#define IPI_ALL(vector) "mov " ACK ", %rbx; add $3, %rbx; mov $0x830, %ecx; xor %edx, %edx; mov $0xc4000+" vector ", %eax; wrmsr\n" \
	"1: pause; cmp %rbx, " ACK "; jb 1b\n"

GUEST_ASM(common, 64,
	/* segments, number, stack, x2APIC */
	"mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
	"mov $1, %r15d; lock xadd %r15, " ID "; mov %r15, %rax; shl $12, %rax; mov $0x80000, %esp; sub %rax, %rsp\n"
	"mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr; mov $0x80f, %ecx; mov $0x1ff, %eax; xor %edx, %edx; wrmsr\n"
	"test %r15, %r15; jnz 2f\n"
	"mov $0x830, %ecx; xor %edx, %edx; mov $0xc4500, %eax; wrmsr; mov $0xc4609, %eax; wrmsr; wrmsr\n"
	"2: " BARRIER(1)
	/* locked increments: aligned, by compare and exchange, misaligned, across a page */
	"mov $" STR(LOCKS) ", %edi; 3: lock incq " SUM "; mov " CAS ", %rax; 4: lea 1(%rax), %rdx; lock cmpxchg %rdx, " CAS "; jne 4b\n"
	"lock addl $1, 0x61003; dec %edi; jnz 3b\n"
	"mov $" STR(SPLITS) ", %edi; 3: lock incq 0x61ffc; mov $1, %eax; lock xadd %rax, 0x62ffe; dec %edi; jnz 3b\n"
	BARRIER(2)
	/* each in turn interrupts the others */
	"sti; 3: pause; cmp %r15, " TURN "; jne 3b\n"
	"mov $" STR(IPIS) ", %edi; 4: " IPI_ALL("0x40") "dec %edi; jnz 4b; incq " TURN "\n"
	BARRIER(3)
	/* the first moves the page at 512 MiB to and fro (PDE 256); the others read it: where they must see it or nowhere */
	"test %r15, %r15; jnz 5f\n"
	"mov $" STR(REMAPS) ", %edi; 3: incq " GEN "; xorq $0x600000, 0x5800; invlpg 0x20000000\n"
	IPI_ALL("0x41") "incq " GEN "; dec %edi; jnz 3b; movq $1, " OVER "; jmp 7f\n"
	"5: mov " GEN ", %rax; mov 0x20000000, %rbx; lock incq 0x20000008; cmp " GEN ", %rax; jne 6f; test $1, %al; jnz 6f\n"
	"shr %eax; and $1, %eax; inc %eax; cmp %rax, %rbx; je 6f; lock incq " WRONG "\n"
	"6: incl %r14d; cmpq $0, " OVER "; je 5b\n"
	"7: lock add %r14, 0x60000+8*11\n"
	BARRIER(4)
	/* the first changes the immediate of the function at 0x30003; the others call it: never older than what was announced */
	"test %r15, %r15; jnz 5f\n"
	"mov $1, %edi; 3: mov %edi, 0x30004; mov %rdi, " PATCH "; mov $200, %ecx; 4: pause; dec %ecx; jnz 4b\n"
	"inc %edi; cmp $" STR(PATCHES) ", %edi; jbe 3b; movq $2, " OVER "; jmp 7f\n"
	"5: mov " PATCH ", %rsi; xor %eax, %eax; cpuid; mov $0x30003, %eax; call *%rax; cmp %rsi, %rax; jae 6f; lock incq " WRONG "\n"
	"6: cmpq $2, " OVER "; jne 5b\n"
	"mov $0x30003, %ebx; xor %eax, %eax; push %rbx; cpuid; pop %rbx; mov $0x30003, %eax; call *%rax; cmp $" STR(PATCHES) ", %eax; je 7f; lock incq " WRONG "\n"
	"7: " BARRIER(5)
	"cli; mov $0x41, %al; out %al, $0xf4; hlt");
GUEST_ASM(on_ipi, 64, "push %rax; push %rcx; push %rdx; lock incq " ACK "\n"
	  "9: mov $0x80b, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr; pop %rdx; pop %rcx; pop %rax; iretq");
GUEST_ASM(on_shoot, 64, "push %rax; push %rcx; push %rdx; invlpg 0x20000000; lock incq " ACK "\n"
	  "9: mov $0x80b, %ecx; xor %eax, %eax; xor %edx, %edx; wrmsr; pop %rdx; pop %rcx; pop %rax; iretq");
GUEST_ASM(function, 64, "mov $0, %eax; ret");

struct runner { struct guest *g; unsigned v; int end; pthread_t thread; };

static void *run_vcpu(void *opaque)
{
	struct runner *r = opaque;

	do
		r->end = guest_run(r->g, r->v);
	while (r->end == -EAGAIN || r->end == -EINTR);
	return NULL;
}

static uint64_t word(const struct guest *g, uint64_t gpa)
{
	uint64_t v;

	memcpy(&v, g->mem + gpa, 8);
	return v;
}

static void set_up(struct guest *g)
{
	const struct { uint16_t limit; uint32_t base; } __attribute__((packed)) gdt = { 0x47, 0x1000 }, idt = { 0xfff, 0x2000 };
	const uint64_t page = 0x200000 | 0x87, one = 1, two = 2;

	guest_create(g, &(struct guest_cfg){ .prov = GUEST_SOFT, .nvcpus = CPUS, .irqchip = true, .mem_size = 8 << 20, .log_dirty = true });
	guest_load(g, TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
	guest_load(g, 0x10000, common, (size_t)(common_end - common));
	guest_load(g, 0x20000, on_ipi, (size_t)(on_ipi_end - on_ipi));
	guest_load(g, 0x21000, on_shoot, (size_t)(on_shoot_end - on_shoot));
	guest_load(g, 0x30003, function, (size_t)(function_end - function));
	guest_long64(g, 0, 0x10000);
	guest_gate(g, 64, 0x40, 0x20000, 0);
	guest_gate(g, 64, 0x41, 0x21000, 0);
	guest_load(g, VARS + 0x800, &gdt, sizeof gdt);
	guest_load(g, VARS + 0x808, &idt, sizeof idt);
	guest_load(g, 0x5800, &page, 8);
	guest_load(g, 0x200000, &one, 8);
	guest_load(g, 0x400000, &two, 8);
}

static void read_dirty_log(struct guest *g)
{
	static uint64_t bits[(8 << 20) / 4096 / 64];

	assert_int_equal(gioctl(&g->vm, KVM_GET_DIRTY_LOG, &(struct kvm_dirty_log){ .slot = 0, .dirty_bitmap = bits }, NULL), 0);
}

static void check(struct guest *g)
{
	uint32_t odd;

	memcpy(&odd, g->mem + 0x61003, 4);
	assert_int_equal(word(g, VARS + 8 * V_SUM), CPUS * LOCKS);
	assert_int_equal(word(g, VARS + 8 * V_CAS), CPUS * LOCKS);
	assert_int_equal(odd, CPUS * LOCKS);
	assert_int_equal(word(g, 0x61ffc), CPUS * SPLITS);
	assert_int_equal(word(g, 0x62ffe), CPUS * SPLITS);
	assert_int_equal(word(g, VARS + 8 * V_ACK), 3 * (CPUS * IPIS + REMAPS));
	/* Reads through an old mapping, or calls of code that is older than was announced. */
	assert_int_equal(word(g, VARS + 8 * V_WRONG), 0);
	/* no store through a stale translation got lost */
	assert_int_equal(word(g, 0x200008) + word(g, 0x400008), word(g, VARS + 8 * 11));
}

static void four_vcpus(void **state)
{
	struct runner r[CPUS];
	struct guest g;

	set_up(&g);
	for (unsigned v = 0; v < CPUS; v++) {
		r[v] = (struct runner){ .g = &g, .v = v };
		assert_int_equal(pthread_create(&r[v].thread, NULL, run_vcpu, &r[v]), 0);
	}
	for (unsigned n = 0; n < 20; n++) {
		usleep(5000);
		read_dirty_log(&g);
	}
	for (unsigned v = 0; v < CPUS; v++) {
		pthread_join(r[v].thread, NULL);
		assert_int_equal(r[v].end, KVM_EXIT_IO);
	}
	check(&g);
	guest_destroy(&g);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(four_vcpus) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
