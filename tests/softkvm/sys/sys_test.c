/*
 * The privileged side in small guests: each reports what happened by OUT; the report is compared with what the manuals
 * say (written down here) and with /dev/kvm where there is one. What that one cannot do is skipped with a reason.
 */
#include <stdio.h>
#include <stdlib.h>

#include "guest.h"
#include "handlers.h"

struct scene {
	const char *name;
	unsigned bits;
	const uint8_t *code, *end;
	void (*setup)(struct guest *g);
	const char *expect;
	const char *kvm_skip;   /* why a difference on /dev/kvm is that one's own */
};

static void put64(struct guest *g, uint64_t gpa, uint64_t v) { memcpy(g->mem + gpa, &v, 8); }
static void put32(struct guest *g, uint64_t gpa, uint32_t v) { memcpy(g->mem + gpa, &v, 4); }
static void put16(struct guest *g, uint64_t gpa, uint16_t v) { memcpy(g->mem + gpa, &v, 2); }

static void gdt_limit(struct guest *g, uint16_t limit)
{
	struct kvm_sregs s;

	guest_get_sregs(g, 0, &s);
	s.gdt.limit = limit;
	guest_set_sregs(g, 0, &s);
}

static void load(struct guest *g, const struct scene *s)
{
	guest_load(g, 0x10000, s->code, (size_t)(s->end - s->code));
	if (s->bits == 16) {
		guest_real16(g, 0, 0x1000, 0);
	} else if (s->bits == 32) {
		guest_load(g, HANDLERS, h32, (size_t)(h32_end - h32));
		guest_prot32(g, 0, 0x10000);
	} else {
		guest_load(g, HANDLERS, h64, (size_t)(h64_end - h64));
		guest_long64(g, 0, 0x10000);
	}
	for (unsigned v = 0; s->bits != 16 && v < 0x40; v++)
		guest_gate(g, s->bits, v, HANDLERS + 16 * v, 0);
	if (s->setup)
		s->setup(g);
}

static void text(const struct guest_log *log, int reason, char *buf, size_t size)
{
	static const char letter[] = "v...e.r.c.f.a.d.s.k";
	size_t n = 0;

	for (unsigned i = 0; i < log->n; i++) {
		const struct guest_exit *e = &log->e[i];
		unsigned p = (unsigned)e->addr - 0x80;

		if (e->reason != KVM_EXIT_IO)
			continue;
		if (p < sizeof letter - 1)
			n += (size_t)snprintf(buf + n, size - n, p ? " %c%llx" : "\n%c%llx", letter[p], (unsigned long long)e->data);
		else
			n += (size_t)snprintf(buf + n, size - n, " [%s%llx=%llx]", e->out ? "" : "i", (unsigned long long)e->addr,
					      (unsigned long long)e->data);
		if (n >= size)
			fail_msg("log too long");
	}
	snprintf(buf + n, size - n, "\nexit %d\n", reason);
}

static void play(const struct scene *s, enum guest_prov p, char *buf, size_t size)
{
	struct guest_log *log = calloc(1, sizeof *log);
	struct guest g;
	int r;

	guest_create(&g, &(struct guest_cfg){ .prov = p });
	load(&g, s);
	r = guest_run_log(&g, 0, log);
	text(log, r, buf, size);
	guest_destroy(&g);
	free(log);
}

/* A software /dev/kvm gave up (KVM_EXIT_INTERNAL_ERROR) after saying the same as we do. */
static bool stopped_short(char *kvm, const char *got)
{
	char *end = strstr(kvm, "\nexit 17\n");

	return end && !strncmp(kvm, got, (size_t)(end - kvm));
}

static void run_scene(void **state)
{
	const struct scene *s = *state;
	char *got = malloc(16384), *kvm = malloc(16384);
	bool bad;

	play(s, GUEST_SOFT, got, 16384);
	bad = strcmp(got, s->expect) != 0;
	if (bad)
		print_error("%s: softkvm gives%s", s->name, got);
	if (guest_have(GUEST_KVM) && !s->kvm_skip) {
		play(s, GUEST_KVM, kvm, 16384);
		if (stopped_short(kvm, got)) {
			print_message("%s: compared up to where /dev/kvm cannot emulate an instruction\n", s->name);
		} else if (strcmp(kvm, got)) {
			print_error("%s: /dev/kvm gives%s", s->name, kvm);
			bad = true;
		}
	} else if (s->kvm_skip) {
		print_message("%s: not compared with /dev/kvm: %s\n", s->name, s->kvm_skip);
	}
	free(got);
	free(kvm);
	if (bad)
		fail();
}

/* -- 64-bit ----------------------------------------------------------------------------------- */
GUEST_ASM(faults64, 64,
	"xor %r13d, %r13d\n"
	T64("ud2")
	"xor %ecx, %ecx\n" T64("div %ecx")
	T64("int3")
	T64("int $0x30")
	"mov $0x1234, %eax\n" T64("mov %eax, %ds")
	"mov $0x18, %eax\n" T64("mov %eax, %ss")
	"mov $0x50, %eax\n" T64("mov %eax, %es")
	"mov $0x50, %eax\n" T64("mov %eax, %ss")
	T64("mov 0x40000123, %al")
	T64("movb $1, 0x40000123")
	"mov $0x800000000000, %rax\n" T64("mov (%rax), %bl")
	"mov $0x800000000000, %rbp\n" T64("mov (%rbp), %bl")
	"mov $0x80, %ecx\n mov %cr4, %rax; bts $31, %rax\n" T64("mov %rax, %cr4")
	"mov %cr0, %rax; btr $0, %rax\n" T64("mov %rax, %cr0")
	"mov $0xffff, %ecx\n" T64("rdmsr")
	T64("int $0x90")
	"mov $0x30, %eax\n" T64("ltr %ax")
	"pushq $0x18; lea 3f(%rip), %rax; push %rax; lretq; 3:\n"
	T64("pushq $0x2b; push %rsp; pushfq; pushq $0x18; push %r15; iretq")
	"mov $0x41, %al; out %al, $0xf4; hlt");

static void setup_faults64(struct guest *g)
{
	put64(g, 0x1050, 0x00cf13000000ffff);   /* data, not present */
	gdt_limit(g, 0x57);
	memset(g->mem + 0x2000 + 0x90 * 16, 0, 16);
}

GUEST_ASM(user64, 64,
	"mov $1, %r13d; lea 1f(%rip), %rax\n"
	"pushq $0x2b; pushq $0x9000; pushq $0x202; pushq $0x23; push %rax; iretq\n"
	"1:\n"
	T64("cli")
	T64("hlt")
	T64("mov %cr0, %rax")
	T64("int $0x30")
	T64("int $0x31")
	T64("out %al, $0x60")
	T64("out %al, $0x61")
	T64("rdmsr")
	T64("mov %ds, %eax; mov $0x28, %eax; mov %eax, %ds; mov $0x10, %eax; mov %eax, %ds")
	T64("mov %eax, %ss")
	"mov %cs, %eax; out %ax, $0x61\n"
	"mov $0x2b, %eax; mov %eax, %ds\n"
	/* to compatibility mode and back through a gate */
	"lea 4f(%rip), %rcx; lea 5f(%rip), %r15; lea 5f(%rip), %r14; pushq $0x43; push %rcx; lretq\n"
	".code32\n4: mov %cs, %eax; out %ax, $0x61; xor %eax, %eax; dec %eax; .byte 0x40; out %ax, $0x61\n"
	"int $0x31\n"
	"5: ljmp $0x23, $0x10000 + 6f - user64\n"
	".code64\n6:\n"
	T64("ud2")
	"mov $0x41, %al; out %al, $0xf4");

static void setup_user64(struct guest *g)
{
	struct kvm_sregs s;

	guest_gate(g, 64, 0x31, HANDLERS + 16 * 0x31, 3);
	put16(g, 0x1200 + 0x66, 0x68);
	memset(g->mem + 0x1268, 0xff, 0x40);
	g->mem[0x1268 + 0x61 / 8] &= (uint8_t)~(1u << (0x61 & 7) | 1u << (0x62 & 7));
	g->mem[0x1268 + 0xf4 / 8] &= (uint8_t)~(1u << (0xf4 & 7));
	guest_get_sregs(g, 0, &s);
	s.tr.limit = 0x68 + 0x20;
	guest_set_sregs(g, 0, &s);
}

GUEST_ASM(syscall64, 64,
	"xor %r13d, %r13d\n"
	"mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x00180018, %edx; wrmsr\n"
	"inc %ecx; lea 5f(%rip), %rax; xor %edx, %edx; wrmsr\n"
	"mov $0xc0000084, %ecx; mov $0x40700, %eax; xor %edx, %edx; wrmsr\n"
	"mov $0xc0000102, %ecx; mov $0x5678, %eax; xor %edx, %edx; wrmsr\n"
	"lea 1f(%rip), %rcx; mov $0x3202, %r11d; mov $0x9000, %esp; sysretq\n"
	"1: mov %cs, %eax; out %ax, $0x61; mov %ss, %eax; out %ax, $0x61; pushfq; pop %rax; out %eax, $0x62\n"
	"lea 2f(%rip), %rbx; syscall; 2: mov %cs, %eax; out %ax, $0x61\n"
	T64("swapgs")
	"mov $0x41, %al; out %al, $0xf4\n"
	"5: mov %rcx, %rax; sub %rbx, %rax; out %eax, $0x63; mov %r11, %rax; out %eax, $0x64\n"
	"mov %cs, %eax; out %ax, $0x61; mov %ss, %eax; out %ax, $0x61; pushfq; pop %rax; out %eax, $0x62\n"
	"swapgs; mov $0xc0000101, %ecx; rdmsr; out %eax, $0x65; mov %rbx, %rcx; sysretq");

GUEST_ASM(ist64, 64,
	"xor %r13d, %r13d\n"
	T64("ud2")
	"mov $0x800000000100, %rax; mov %rax, %rsp\n" T64("push %rax")
	"mov $0x800000000100, %rax; mov %rax, %rsp\n" T64("int $0x32")
	/* a not-present gate met by #GP: double fault; its own gate not there: shutdown */
	"mov $0x8000, %esp\n" T64("int $0x90")
	"movl $0, 0x2084; movl $0, 0x20d4; int $0x90; hlt");

static void set_ist(struct guest *g, unsigned vector, unsigned ist)
{
	g->mem[0x2000 + vector * 16 + 4] = (uint8_t)ist;
}

static void setup_ist64(struct guest *g)
{
	put64(g, 0x1200 + 0x24, 0x9ff7);        /* IST1, to be aligned */
	put64(g, 0x1200 + 0x2c, 0xb000);
	put64(g, 0x1200 + 0x34, 0xd000);
	set_ist(g, 6, 1);
	set_ist(g, 12, 2);
	set_ist(g, 8, 3);
	g->mem[0x2000 + 13 * 16 + 5] &= 0x7f;
	memset(g->mem + 0x2000 + 0x90 * 16, 0, 16);
}

GUEST_ASM(debug64, 64,
	"mov $1, %r13d\n"
	/* single step of one instruction; the handler returns with TF still set, so clear it there by POPF */
	"xor %r13d, %r13d\n"
	"pushfq; orl $0x100, (%rsp); lea 2f(%rip), %r14; lea 3f(%rip), %r15; popfq; nop; 2: nop; 3:\n"
	/* data breakpoint, write, 4 bytes */
	"mov $0x9000, %eax; mov %rax, %db0; mov $0xd0002, %eax; mov %rax, %db7\n"
	T64("movl $1, 0x9002")
	T64("mov 0x9000, %eax; movb $1, 0x8fff; nop")
	/* read/write, byte */
	"mov $0x30002, %eax; mov %rax, %db7\n"
	T64("mov 0x9000, %eax")
	/* instruction breakpoint: fault */
	"lea 2f(%rip), %rax; mov %rax, %db1; mov $0x8, %eax; mov %rax, %db7\n"
	T64("nop; nop")
	/* general detect */
	"mov $0x2000, %eax; mov %rax, %db7\n"
	T64("mov %db7, %rax")
	"mov %db7, %rax; out %eax, $0x62\n"
	T64(".byte 0xf1")
	/* MOV SS holds the single step back */
	"mov %ss, %eax; pushfq; orl $0x100, (%rsp); lea 2f(%rip), %r14; lea 3f(%rip), %r15\n"
	"popfq; mov %eax, %ss; nop; 2: nop; 3:\n"
	/* single step between two iterations pushes RF, behind the last one not */
	"mov $3, %ecx; mov $0x9000, %edi; pushfq; orl $0x100, (%rsp); lea 2f(%rip), %r14; lea 3f(%rip), %r15; popfq; 2: rep stosb; 3:\n"
	"mov $1, %ecx; pushfq; orl $0x100, (%rsp); lea 2f(%rip), %r14; lea 3f(%rip), %r15; popfq; 2: rep stosb; 3:\n"
	/* and RF holds for all iterations: their breakpoint does not hit */
	"lea 2f(%rip), %rax; mov %rax, %db1; mov $8, %eax; mov %rax, %db7; mov $3, %ecx; mov $0x9000, %edi\n"
	"mov %rsp, %rbx; push $0x10; push %rbx; pushfq; orl $0x10000, (%rsp); push $0x18; push %rax; lea 2f(%rip), %rax\n"
	"mov %rax, (%rsp); mov %rax, %r14; lea 3f(%rip), %r15; iretq; 2: rep stosb; 3: mov %edi, %eax; out %eax, $0x62\n"
	"mov $0x41, %al; out %al, $0xf4");

/* -- 32-bit ----------------------------------------------------------------------------------- */
GUEST_ASM(faults32, 32,
	"xor %edi, %edi\n"
	T32(faults32, "ud2")
	T32(faults32, "into; mov $0x7fffffff, %eax; inc %eax; into")
	T32(faults32, "int $0x31")
	"mov $0x1234, %eax\n" T32(faults32, "mov %eax, %ds")
	"mov $0x50, %eax\n" T32(faults32, "mov %eax, %es")
	"mov $0x50, %eax\n" T32(faults32, "mov %eax, %ss")
	"mov $0x58, %eax; mov %eax, %es\n"
	T32(faults32, "mov %es:0xfff, %al; mov %es:0x1000, %al")
	"mov $0x58, %eax; mov %eax, %es\n" T32(faults32, "mov %es:0xffd, %eax")
	"mov $0x60, %eax; mov %eax, %es\n"      /* expand-down, limit 0xfff */
	T32(faults32, "mov %es:0x1000, %al; mov %es:0xfff, %al")
	T32(faults32, "movb $0, %cs:0x9000")
	"xor %eax, %eax; mov %eax, %es\n" T32(faults32, "mov %es:0, %al")
	"mov $0x58, %eax; mov %eax, %ss; mov $2, %esp\n" T32(faults32, "nop")
	"mov $0x10, %eax; mov %eax, %ss; mov $0x8000, %esp\n"
	T32(faults32, "ljmp $0x70, $0")
	T32(faults32, "ljmp $0x10, $0")
	T32(faults32, "ljmp $0, $0")
	"mov $0x10, %eax; lar %eax, %ebx; mov %ebx, %eax; out %eax, $0x62; mov $0x58, %eax; lsl %eax, %eax; out %eax, $0x62\n"
	"mov $0x08, %eax; verw %ax; setz %al; out %al, $0x63; mov $0x10, %eax; verw %ax; setz %al; out %al, $0x63\n"
	"mov $0x1230, %eax; mov $3, %ecx; arpl %cx, %ax; out %eax, $0x62\n"
	"mov $0x41, %al; out %al, $0xf4");

static void setup_faults32(struct guest *g)
{
	put64(g, 0x1050, 0x00cf13000000ffff);   /* not present */
	put64(g, 0x1058, 0x0040930000000fff);   /* 4 KiB */
	put64(g, 0x1060, 0x00c0970000000000);   /* expand-down */
	gdt_limit(g, 0x67);
}

/* Rings: RETF outwards, call gate with two parameters inwards, RETF 8 back, INT from ring 3, IRET to the outer ring. */
GUEST_ASM(gates32, 32,
	"mov $1, %edi; pushl $0x2b; pushl $0x9000; pushl $0x43; pushl $0x10000 + 1f - gates32; lret\n"
	"1: mov %cs, %eax; mov %ds, %ebx; mov %ebx, %ecx; mov $0x2b, %edx; mov %edx, %ds; mov %edx, %es\n"
	"pushl $0x1111; pushl $0x2222; lcall $0x53, $0\n"
	T32(gates32, "int $0x31")
	T32(gates32, "lcall $0x5b, $0")
	T32(gates32, "ljmp $0x50, $0")
	T32(gates32, "cli")
	"mov $0x10000 + 9f - gates32, %ebp; mov %ebp, %esi; int $0x32; 9: hlt\n"
	".skip 64\n"
	".globl gates32_inner\ngates32_inner: push %eax; push %edx; mov %cs, %eax; mov $0x61, %dx; out %ax, %dx\n"
	"mov 16(%esp), %eax; mov $0x62, %dx; out %eax, %dx; mov 20(%esp), %eax; out %eax, %dx\n"
	"mov %ss, %eax; mov $0x61, %dx; out %ax, %dx; mov 24(%esp), %eax; mov $0x62, %dx; out %eax, %dx\n"
	"mov 12(%esp), %eax; mov $0x61, %dx; out %ax, %dx; mov %ebx, %eax; out %ax, %dx; pop %edx; pop %eax; lret $8");
extern const uint8_t gates32_inner[];

static void setup_gates32(struct guest *g)
{
	uint64_t off = 0x10000 + (uint64_t)(gates32_inner - gates32);

	put64(g, 0x1050, (off & 0xffff) | 0x08ull << 16 | 0x0000ec02ull << 32 | (off >> 16) << 48);
	put64(g, 0x1058, (off & 0xffff) | 0x08ull << 16 | 0x00008c02ull << 32 | (off >> 16) << 48);    /* DPL 0 */
	gdt_limit(g, 0x5f);
	guest_gate(g, 32, 0x31, HANDLERS + 16 * 0x31, 3);
	guest_load(g, 0x28000, "\xb0\x41\xe6\xf4\xf4", 5);
	guest_gate(g, 32, 0x32, 0x28000, 3);
}

/* Two tasks: CALL, IRET, JMP through a gate, interrupt through a task gate, and a bad selector in the new task. */
GUEST_ASM(task32, 32,
	"mov $0x30, %eax; ltr %ax; mov $0x99, %ebx\n"
	"lcall $0x50, $0\n"
	"mov %ebx, %eax; out %eax, $0x62; pushf; pop %eax; out %eax, $0x63; mov %cr0, %eax; out %eax, $0x62\n"
	"str %ax; out %ax, $0x61; clts\n"
	"int $0x33\n"
	"mov %ebx, %eax; out %eax, $0x62\n"
	"movl $0x10000 + 8f - task32, 0x1400 + 0x3c; movl $0x1233, 0x1400 + 0x54\n"
	"movl $0x10000 + task32_b - task32, 0x1400 + 0x38\n"
	"xor %edi, %edi; ljmp $0x50, $0\n"
	"8: str %ax; out %ax, $0x61; mov $0x41, %al; out %al, $0xf4\n"
	".skip 32\n"
	".globl task32_b\ntask32_b: mov %ebx, %eax; out %eax, $0x62; str %ax; out %ax, $0x61; pushf; pop %eax; out %eax, $0x63\n"
	"mov 0x1400, %eax; out %ax, $0x61; movzbl 0x1035, %eax; out %al, $0x64; movzbl 0x1055, %eax; out %al, $0x64\n"
	"inc %ebx; iret; jmp task32_b");
extern const uint8_t task32_b[];

static void setup_task32(struct guest *g)
{
	put64(g, 0x1030, 0x0000890000000067 | (uint64_t)0x1200 << 16);
	put64(g, 0x1050, 0x0000890000000067 | (uint64_t)0x1400 << 16);
	gdt_limit(g, 0x57);
	memset(g->mem + 0x1400, 0, 0x68);
	put32(g, 0x1420, (uint32_t)(0x10000 + (task32_b - task32)));
	put32(g, 0x1424, 2);
	put32(g, 0x1434, 0x77);         /* EBX */
	put32(g, 0x1438, 0xa000);
	for (unsigned k = 0; k < 6; k++)
		put32(g, 0x1448 + 4 * k, k == 1 ? 0x08 : 0x10);
	put64(g, 0x2000 + 0x33 * 8, 0x50ull << 16 | 0x8500ull << 32);
}

/* Virtual-8086 mode at IOPL 0 and 3. */
GUEST_ASM(vm86, 32,
	"mov $1, %edi; mov $0x10000 + 1f - vm86, %eax; mov $0, %ebp\n"
	"pushl $0; pushl $0; pushl $0x1234; pushl $0x900; pushl $0x880; pushl $0xf00; pushl $0x23002; pushl $0x1000; pushl $1f - vm86; iret\n"
	".code16\n1: mov %cs, %ax; out %ax, $0x61; mov %ds, %ax; out %ax, $0x61\n"
	"mov $2f - vm86, %si; mov $3f - vm86, %bp; 2: hlt; 3:\n"
	"pushf; pop %ax; out %ax, $0x61\n"
	"mov $2f - vm86, %si; mov $3f - vm86, %bp; 2: int $0x31; 3:\n"
	"mov $2f - vm86, %si; mov $3f - vm86, %bp; 2: int $0x32; 3:\n"
	"cli; sti\n"
	"mov $2f - vm86, %si; mov $3f - vm86, %bp; 2: mov %cr0, %eax; 3:\n"
	"mov $2f - vm86, %si; mov $3f - vm86, %bp; 2: lldt %ax; 3:\n"
	"mov $0x41, %al; out %al, $0xf4\n.code32");

static void setup_vm86(struct guest *g)
{
	struct kvm_sregs s;

	guest_gate(g, 32, 0x31, HANDLERS + 16 * 0x31, 3);
	put16(g, 0x1200 + 0x66, 0x68);
	memset(g->mem + 0x1268, 0, 0x40);
	guest_get_sregs(g, 0, &s);
	s.tr.limit = 0x68 + 0x20;
	guest_set_sregs(g, 0, &s);
}

GUEST_ASM(vm86_iopl0, 32,
	"mov $1, %edi; mov $0, %ebp\n"
	"pushl $0; pushl $0; pushl $0; pushl $0; pushl $0x880; pushl $0xf00; pushl $0x20002; pushl $0x1000; pushl $1f - vm86_iopl0; iret\n"
	".code16\n1:\n"
	"mov $2f - vm86_iopl0, %si; mov $3f - vm86_iopl0, %bp; 2: cli; 3:\n"
	"mov $2f - vm86_iopl0, %si; mov $3f - vm86_iopl0, %bp; 2: pushf; 3:\n"
	"mov $2f - vm86_iopl0, %si; mov $3f - vm86_iopl0, %bp; 2: int $0x31; 3:\n"
	"mov $2f - vm86_iopl0, %si; mov $3f - vm86_iopl0, %bp; 2: int3; 3:\n"
	"mov $2f - vm86_iopl0, %si; mov $3f - vm86_iopl0, %bp; 2: iret; 3:\n"
	"mov $0x41, %al; out %al, $0xf4\n.code32");

static void setup_vm86_iopl0(struct guest *g)
{
	setup_vm86(g);
	guest_gate(g, 32, 3, HANDLERS + 16 * 3, 3);
}

/* -- 16-bit ----------------------------------------------------------------------------------- */
GUEST_ASM(real16, 16,
	"xor %ax, %ax; mov %ax, %ds; mov %ax, %es; mov %ax, %ss\n"
	"movw $7f - real16, 4 * 0x21; movw $0x1000, 4 * 0x21 + 2\n"
	"movw $7f - real16, 4 * 6; movw $0x1000, 4 * 6 + 2; movw $7f - real16, 4 * 13; movw $0x1000, 4 * 13 + 2\n"
	"movw $7f - real16, 4 * 4; movw $0x1000, 4 * 4 + 2\n"
	"mov $1f - real16, %bp; sti; int $0x21; 1: pushf; pop %ax; out %ax, $0x61\n"
	"mov $1f - real16, %bp; ud2; 1:\n"
	"mov $1f - real16, %bp; mov $0xffff, %bx; mov (%bx), %ax; 1:\n"
	"mov $1f - real16, %bp; mov $0x7fff, %ax; inc %ax; into; 1:\n"
	"lcall $0x1000, $2f - real16; mov %sp, %ax; out %ax, $0x61\n"
	"ljmp $0x1010, $3f - real16 - 0x100\n.skip 0x100\n"
	"3: mov %cs, %ax; out %ax, $0x61; pushl $0x12345678; popl %eax; out %eax, $0x62\n"
	"mov $0x41, %al; out %al, $0xf4\n"
	"2: mov %cs, %ax; out %ax, $0x61; lret\n"
	/* reports return address, CS, flags; goes on at BP */
	"7: pop %ax; sub %bp, %ax; out %ax, $0x63; pop %ax; out %ax, $0x63; pop %cx; mov %cx, %ax; and $0x0300, %ax; out %ax, $0x63\n"
	"pushf; pop %ax; and $0x300, %ax; out %ax, $0x63; push %cx; push %cs; push %bp; iret");

/* Up to protected mode and back, keeping a big limit ("unreal" mode); then to long mode by hand and back to ring 0 code32. */
GUEST_ASM(modes16, 16,
	"cli; xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x8000, %sp; lgdtl 0x900\n"
	"mov %cr0, %eax; or $1, %al; mov %eax, %cr0; mov $0x10, %bx; mov %bx, %fs; and $0xfe, %al; mov %eax, %cr0\n"
	"mov $0x20000, %ebx; movb $0x5a, %fs:(%ebx); movb %fs:(%ebx), %al; out %al, $0x64\n"
	"mov %cr0, %eax; or $1, %al; mov %eax, %cr0; ljmpl $0x08, $0x10000 + 1f - modes16\n"
	".code32\n1: mov $0x10, %eax; mov %eax, %ds; mov %eax, %ss; mov $0x8000, %esp\n"
	"mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4; mov $0x3000, %eax; mov %eax, %cr3\n"
	"mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr\n"
	"mov %cr0, %eax; bts $31, %eax; mov %eax, %cr0; rdmsr; out %eax, $0x62\n"
	"ljmp $0x18, $0x10000 + 2f - modes16\n"
	".code64\n2: mov $0x123456789abcdef0, %rax; shr $32, %rax; out %eax, $0x62; mov %cs, %eax; out %ax, $0x61\n"
	"pushq $8; pushq $0x10000 + 3f - modes16; lretq\n"
	".code32\n3: mov %cr0, %eax; btr $31, %eax; mov %eax, %cr0; rdmsr; out %eax, $0x62; mov %cs, %eax; out %ax, $0x61\n"
	"mov $0x41, %al; out %al, $0xf4");

static void setup_modes16(struct guest *g)
{
	put64(g, 0x1008, 0x00cf9b000000ffff);
	put64(g, 0x1010, 0x00cf93000000ffff);
	put64(g, 0x1018, 0x00af9b000000ffff);
	put16(g, 0x900, 0x1f);
	put32(g, 0x902, 0x1000);
	put64(g, 0x3000, 0x4007);
	put64(g, 0x4000, 0x5007);
	put64(g, 0x5000, 0x87);
}

#include "expect.h"

static const struct scene scenes[] = {
	{ "faults64", 64, faults64, faults64_end, setup_faults64, EXPECT_FAULTS64, KVM_FAULTS64 },
	{ "user64", 64, user64, user64_end, setup_user64, EXPECT_USER64, KVM_USER64 },
	{ "syscall64", 64, syscall64, syscall64_end, NULL, EXPECT_SYSCALL64, KVM_SYSCALL64 },
	{ "ist64", 64, ist64, ist64_end, setup_ist64, EXPECT_IST64, KVM_IST64 },
	{ "debug64", 64, debug64, debug64_end, NULL, EXPECT_DEBUG64, KVM_DEBUG64 },
	{ "faults32", 32, faults32, faults32_end, setup_faults32, EXPECT_FAULTS32, KVM_FAULTS32 },
	{ "gates32", 32, gates32, gates32_end, setup_gates32, EXPECT_GATES32, KVM_GATES32 },
	{ "task32", 32, task32, task32_end, setup_task32, EXPECT_TASK32, KVM_TASK32 },
	{ "vm86", 32, vm86, vm86_end, setup_vm86, EXPECT_VM86, KVM_VM86 },
	{ "vm86_iopl0", 32, vm86_iopl0, vm86_iopl0_end, setup_vm86_iopl0, EXPECT_VM86_IOPL0, KVM_VM86_IOPL0 },
	{ "real16", 16, real16, real16_end, NULL, EXPECT_REAL16, KVM_REAL16 },
	{ "modes16", 16, modes16, modes16_end, setup_modes16, EXPECT_MODES16, KVM_MODES16 },
};

int main(int argc, char **argv)
{
	struct CMUnitTest t[sizeof scenes / sizeof scenes[0]];

	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	for (unsigned i = 0; i < sizeof scenes / sizeof scenes[0]; i++)
		t[i] = (struct CMUnitTest){ scenes[i].name, run_scene, NULL, NULL, (void *)&scenes[i] };
	return _cmocka_run_group_tests("sys", t, sizeof scenes / sizeof scenes[0], NULL, NULL);
}
