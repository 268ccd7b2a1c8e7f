/* Multiboot header and entry; also a PVH note, so that the same image tests both protocols. */
	.section .multiboot, "a"
	.align 4
#ifndef NO_MULTIBOOT
	.long 0x1badb002, 3, -(0x1badb002 + 3)
#endif
	.section .note.pvh, "a", @note
	.long 4, 4, 18
	.asciz "Xen"
	.long _start
	.text
	.globl _start
_start:
	mov $stack_top, %esp
	lgdt gdtr
	ljmp $0x10, $1f
1:	mov $0x18, %ecx
	mov %ecx, %ds
	mov %ecx, %es
	mov %ecx, %ss
	push $0
	popf
	push %ebx
	push %eax
	call guest_main
2:	hlt
	jmp 2b
	.data
	.align 8
gdt:	.quad 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:	.word 31
	.long gdt
	.bss
	.align 16
	.skip 16384
stack_top:
	.section .note.GNU-stack, "", @progbits
