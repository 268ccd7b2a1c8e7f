/*
 * Where a PC's BIOS leaves them: interrupt vectors, BIOS data area, extended BIOS data area. There is no firmware, but kernels
 * (Xen, boot loaders, memory testers) read them, and call the BIOS from real mode to ask for what it may know: each such call
 * comes back with carry set, "not supported".
 */
#include <string.h>

#include "base/util.h"
#include "board/boot.h"

#define BDA 0x400               /* BIOS data area: offsets below */
#define BDA_EBDA_SEGMENT 0x0e
#define BDA_BASE_MEMORY 0x13    /* KiB */
#define VECTORS 256

/* push bp; mov bp,sp; or byte [bp+6],1 (CF of the FLAGS on the stack); pop bp; iret */
static const uint8_t not_supported[] = { 0x55, 0x89, 0xe5, 0x80, 0x4e, 0x06, 0x01, 0x5d, 0xcf };

int boot_write_bios(struct boot *b, struct err *err)
{
	uint8_t low[BOOT_GDT] = { 0 }, ebda = (0xa0000 - BOOT_LOW_END) >> 10;
	int r;

	if (b->low_ram < 0x100000)              /* no room where a BIOS is */
		return 0;
	for (unsigned i = 0; i < VECTORS; i++) {
		st_le16(low + 4 * i, BOOT_BIOS_STUB & 0xffff);
		st_le16(low + 4 * i + 2, (BOOT_BIOS_STUB & 0xf0000) >> 4);
	}
	st_le16(low + BDA + BDA_EBDA_SEGMENT, BOOT_LOW_END >> 4);
	st_le16(low + BDA + BDA_BASE_MEMORY, BOOT_LOW_END >> 10);
	r = boot_write(b, 0, low, sizeof(low), "BIOS data area", err);
	if (!r)
		r = boot_write(b, BOOT_LOW_END, &ebda, 1, "extended BIOS data area", err);
	return r ? r : boot_write(b, BOOT_BIOS_STUB, not_supported, sizeof(not_supported), "BIOS calls", err);
}
