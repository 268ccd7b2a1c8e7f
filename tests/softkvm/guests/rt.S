/* Entry, exception stubs, try_call() and try_user(): see rt.h. */
#ifdef __x86_64__
#define W 8
#define A rax
#define B rbx
#define C rcx
#define D rdx
#define SP rsp
#define JB jb(%rip)
#define PUSHF pushfq
#define POPF popfq
#define IRET iretq
#else
#define W 4
#define A eax
#define B ebx
#define C ecx
#define D edx
#define SP esp
#define JB jb
#define PUSHF pushfl
#define POPF popfl
#define IRET iretl
#endif
	.section .start, "ax"
	.globl _start
_start:
	mov stack_top, %SP
	call rt_init
	call guest_main
	mov $0, %al
	out %al, $0xf4
1:	cli
	hlt
	jmp 1b

	.text
	.globl stubs
	.balign 16
stubs:
	.set i, 0
	.rept 256
	.balign 16
	.if (i != 8) && ((i < 10) || (i > 14)) && (i != 17) && (i != 21)
	push $0
	.endif
	push $i
	jmp common
	.set i, i + 1
	.endr

common:
	push %A
	push %B
#ifndef __x86_64__
	mov $0x10, %ebx                 /* virtual-8086 mode left null selectors */
	mov %ebx, %ds
	mov %ebx, %es
#endif
	mov 2 * W(%SP), %A
	cmp $0x80, %A
	je back
	mov handlers(, %A, W), %B
	test %B, %B
	jnz handle
	mov %A, last
	mov 3 * W(%SP), %A
	mov %A, last + W
	mov 4 * W(%SP), %A
	mov %A, last + 2 * W
	mov 5 * W(%SP), %A
	mov %A, last + 3 * W
	mov 6 * W(%SP), %A
	mov %A, last + 4 * W
	mov 7 * W(%SP), %A
	mov %A, last + 5 * W
	mov 8 * W(%SP), %A
	mov %A, last + 6 * W
	mov %cr2, %A
	mov %A, last + 7 * W
#ifdef __x86_64__
	incq last + 8 * W
#else
	incl last + 8 * W
#endif
	mov last, %A
resume:
	mov $0x10, %ebx
	mov %ebx, %ss
	mov %ebx, %ds
	mov %ebx, %es
	cld
	mov jb, %SP
	jmp out
back:	mov W(%SP), %A
	mov %A, ret_val
	mov $-1, %A
	jmp resume

handle:
#ifdef __x86_64__
	push %rcx
	push %rdx
	push %rsi
	push %rdi
	push %r8
	push %r9
	push %r10
	push %r11
	push %rbp
	mov %rsp, %rbp
	and $-16, %rsp
	cld
	call *%rbx
	mov %rbp, %rsp
	pop %rbp
	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rdi
	pop %rsi
	pop %rdx
	pop %rcx
#else
	push %ecx
	push %edx
	call *%ebx
	pop %edx
	pop %ecx
#endif
	pop %B
	pop %A
	add $2 * W, %SP
	IRET

	.macro save
	PUSHF
	push %B
#ifdef __x86_64__
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
#else
	push %ebp
	push %esi
	push %edi
#endif
	mov %SP, jb
	.endm

	.globl try_call
try_call:
	save
#ifdef __x86_64__
	mov %rdi, %rax
	mov %rsi, %rdi
	mov %rdx, %rsi
	call *%rax
#else
	mov %eax, %ebx
	mov %edx, %eax
	mov %ecx, %edx
	call *%ebx
#endif
	mov %A, ret_val
	mov jb, %SP
	mov $-1, %A
out:
#ifdef __x86_64__
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
#else
	pop %edi
	pop %esi
	pop %ebp
#endif
	pop %B
	POPF
	ret

	.globl try_user
try_user:
	save
#ifdef __x86_64__
	push user_ss
	push user_sp
	push user_flags
	push user_cs
	push %rdi
	mov %rsi, %rdi
	mov %rdx, %rsi
#else
	mov $0x2b, %ebx
	mov %ebx, %ds
	mov %ebx, %es
	push user_ss
	push user_sp
	push user_flags
	push user_cs
	push %eax
	mov %edx, %eax
	mov %ecx, %edx
#endif
	IRET

	.bss
	.balign 8
	.globl jb
jb:	.skip 8
	.section .note.GNU-stack, "", @progbits
