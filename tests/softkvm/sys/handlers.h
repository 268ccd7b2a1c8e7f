/*
 * Exception handlers for tiny guests: 16 bytes per vector at 0x20000. They report by OUT what they found and go on at
 * r15 (ebp): with ring 0 by a jump on a fresh stack, or by IRET when r13 (edi) is not 0. r14 (esi) is where the guest
 * expects the fault; the report is relative to it.
 *
 *   v vector  e error code  r RIP - r14  c CS  f flags (TF IF IOPL NT RF VM AC...)  a CR2  d DR6  s SS of the handler
 *   k page of the handler's stack
 */
#ifndef TESTS_SOFTKVM_SYS_HANDLERS_H
#define TESTS_SOFTKVM_SYS_HANDLERS_H

#define HANDLERS 0x20000

GUEST_ASM(h64, 64,
	".set i, 0\n"
	".rept 256\n"
	".byte 0x68; .long i; .byte 0xe9; .long h64_common - . - 4; .skip 6\n"
	".set i, i + 1\n"
	".endr\n"
	"h64_common: pop %rax; mov %eax, %ebx; mov $0x80, %edx; out %al, %dx\n"
	"cmp $31, %ebx; ja 1f; mov $0x227d00, %ecx; bt %ebx, %ecx; jnc 1f\n"
	"pop %rax; mov $0x84, %edx; out %eax, %dx\n"
	"1: mov (%rsp), %rax; sub %r14, %rax; mov $0x86, %edx; out %ax, %dx\n"
	"mov 8(%rsp), %rax; mov $0x88, %edx; out %ax, %dx\n"
	"mov 16(%rsp), %rax; and $0x3f7700, %eax; mov $0x8a, %edx; out %eax, %dx\n"
	"cmp $14, %ebx; jne 2f; mov %cr2, %rax; mov $0x8c, %edx; out %eax, %dx\n"
	"2: cmp $1, %ebx; jne 3f; mov %db6, %rax; mov $0x8e, %edx; out %eax, %dx\n"
	"mov $0xffff0ff0, %eax; mov %rax, %db6\n"
	"3: mov %ss, %eax; mov $0x90, %edx; out %ax, %dx\n"
	"mov %rsp, %rax; shr $12, %rax; mov $0x92, %edx; out %ax, %dx\n"
	"test %r13, %r13; jnz 4f; mov $0x8000, %esp; jmp *%r15\n"
	"4: mov %r15, (%rsp); iretq");

GUEST_ASM(h32, 32,
	".set i, 0\n"
	".rept 256\n"
	".byte 0x68; .long i; .byte 0xe9; .long h32_common - . - 4; .skip 6\n"
	".set i, i + 1\n"
	".endr\n"
	"h32_common: pop %eax; mov %eax, %ebx; mov $0x80, %edx; out %al, %dx\n"
	"cmp $31, %ebx; ja 1f; mov $0x227d00, %ecx; bt %ebx, %ecx; jnc 1f\n"
	"pop %eax; mov $0x84, %edx; out %eax, %dx\n"
	"1: mov (%esp), %eax; sub %esi, %eax; mov $0x86, %edx; out %ax, %dx\n"
	"mov 4(%esp), %eax; mov $0x88, %edx; out %ax, %dx\n"
	"mov 8(%esp), %eax; and $0x3f7700, %eax; mov $0x8a, %edx; out %eax, %dx\n"
	"cmp $14, %ebx; jne 2f; mov %cr2, %eax; mov $0x8c, %edx; out %eax, %dx\n"
	"2: cmp $1, %ebx; jne 3f; mov %db6, %eax; mov $0x8e, %edx; out %eax, %dx\n"
	"mov $0xffff0ff0, %eax; mov %eax, %db6\n"
	"3: mov %ss, %eax; mov $0x90, %edx; out %ax, %dx\n"
	"mov %esp, %eax; shr $12, %eax; mov $0x92, %edx; out %ax, %dx\n"
	"test %edi, %edi; jnz 4f; mov $0x10, %eax; mov %eax, %ds; mov %eax, %es; mov $0x8000, %esp; jmp *%ebp\n"
	"4: mov %ebp, (%esp); iret");

/* One instruction that faults (or traps), then go on. */
#define T64(insn) "lea 2f(%rip), %r14; lea 3f(%rip), %r15; 2: " insn "; 3:\n"
/* 32-bit code is loaded at 0x10000; `base` is its first label. */
#define T32(base, insn) "mov $0x10000 + 2f - " #base ", %esi; mov $0x10000 + 3f - " #base ", %ebp; 2: " insn "; 3:\n"

#endif
