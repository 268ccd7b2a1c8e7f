/*
 * A boot sector: reads sector 8 of the disk it came from, says what stands there on the debug console, writes that to sector 20 and ends
 * the machine with status 33 (isa-debug-exit). BIOS calls only, so that the BIOS's virtio-blk driver does the work.
 */
	.code16
	.globl _start
_start:
	xor %ax, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $0x7c00, %sp
	mov $0x42, %ah
	mov $packet, %si
	int $0x13
	jc fail
	mov $0x8000, %si
say:
	lodsb
	test %al, %al
	jz done
	out %al, $0xe9
	jmp say
done:
	movl $20, packet + 8
	mov $0x4300, %ax
	mov $packet, %si
	int $0x13
	jc fail
	mov $16, %al
	jmp leave
fail:
	mov $1, %al
leave:
	mov $0x501, %dx
	out %al, %dx
	hlt
	.balign 4
packet:
	.byte 16, 0, 1, 0
	.word 0x8000, 0
	.long 8, 0
	.org 510
	.word 0xaa55
