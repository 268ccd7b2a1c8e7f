/*
 * A guest that sets up what the monitor shows, writes down what it sees itself, and halts: qemu_test.py compares the two.
 * Multiboot, loaded at 1 MiB as it is; into 64-bit mode at once.
 */
	.set	LAPIC, 0xfee00000
	.set	SEEN, 0x5000            /* 8 bytes each: see `seen` in qemu_test.py */

	.code32
	.globl	_start
_start:	jmp	begin
	.balign	4
header:	.long	0x1badb002, 0x00010000, -(0x1badb002 + 0x00010000)
	.long	header, _start, 0, 0, _start

	.balign	8
gdt:	.quad	0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr:	.word	gdtr - gdt - 1
	.long	gdt
idtr:	.word	0x3ff
	.quad	0x6000

begin:	cli
	lgdt	gdtr
	/* One to one: the first 2 MiB, and the 2 MiB of the local APIC. */
	movl	$0x2003, 0x1000
	movl	$0x3003, 0x2000
	movl	$0x4003, 0x2018
	movl	$0x83, 0x3000
	movl	$0xfee0009b, 0x4fb8
	mov	$0x1000, %eax
	mov	%eax, %cr3
	mov	$0x620, %eax            /* PAE, OSFXSR, OSXMMEXCPT */
	mov	%eax, %cr4
	mov	$0xc0000080, %ecx
	rdmsr
	or	$0x901, %eax            /* LME, NXE, SCE */
	wrmsr
	mov	$0x80000033, %eax
	mov	%eax, %cr0
	ljmp	$8, $long_mode

	.macro	outb	port, value
	mov	$\value, %al
	out	%al, $\port
	.endm
	.macro	apic	reg, value
	movl	$\value, \reg(%r15)
	.endm
	.macro	note
	stosq
	.endm

	.code64
	.globl	long_mode, here, stepped, written, done, word
long_mode:
	mov	$16, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$0x9000, %esp
	lidt	idtr
	/* 8259A: bases 0x50 and 0x58, masks of our own, line 4 of the second level-triggered by ELCR. */
	outb	0x20, 0x11
	outb	0x21, 0x50
	outb	0x21, 0x04
	outb	0x21, 0x01
	outb	0xa0, 0x11
	outb	0xa1, 0x58
	outb	0xa1, 0x02
	outb	0xa1, 0x01
	outb	0x21, 0xf3
	outb	0xa1, 0x6e
	mov	$LAPIC, %r15d
	apic	0xf0, 0x1a7
	apic	0x80, 0x30
	apic	0x320, 0x100c1
	apic	0x350, 0x10700
	apic	0x360, 0x400
	apic	0x370, 0xc3
	apic	0xe0, 0xffffffff
	apic	0xd0, 0x05000000
	mov	$0x12345678, %eax
	mov	%rax, %dr0
	/* What we see. */
	mov	$SEEN, %edi
	mov	%cr0, %rax
	note
	mov	%cr3, %rax
	note
	mov	%cr4, %rax
	note
	mov	$0xc0000080, %ecx
	rdmsr
	note
	.irp	reg, 0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x320, 0x350, 0x360, 0x370
	mov	\reg(%r15), %eax
	note
	.endr
	xor	%eax, %eax
	in	$0x21, %al
	note
	in	$0xa1, %al
	note
	mov	$0x3f8, %edx
	mov	$'K', %al
	out	%al, %dx
	/* For the debugger: single steps, a breakpoint, a watched word. */
here:	mov	$0x1111222233334444, %rax
	add	$1, %rax
	push	%rax
	pop	%rbx
stepped:
	xchg	%rcx, %rax
	movl	$0x5a5a, word
written:
	fninit
	fldpi
	movabs	$0x0123456789abcdef, %rax
	movq	%rax, %xmm3
	movabs	$0x8182838485868788, %r8
	movabs	$0x9192939495969798, %r15
	mov	$0xb, %ebx
	mov	$0xc, %ecx
	mov	$0xd, %edx
	mov	$0x51, %esi
	mov	$0xd1, %edi
	mov	$0xb9, %ebp
	std
done:	hlt
	jmp	done

	.balign	8
word:	.quad	0
