/* Random selections, reads and DMA descriptors on fw_cfg, with RAM that the descriptors may or may not lie in. */
#include <string.h>

#include "../pci/fuzz.h"
#include "base/util.h"
#include "core/mem.h"
#include "dev/fw_cfg.h"
#include "fix.h"

#define RAM (64u << 10)

static void step(struct fix *f, const uint8_t *p)
{
	static const uint16_t ports[] = { 0x510, 0x511, 0x514, 0x518 };
	uint16_t port = ports[p[1] & 3];

	switch (p[0] & 3) {
	case 0:
		in(f, port, 1u << (p[2] % 3));
		break;
	case 1:
		out(f, port, p[2] & 1 ? (uint32_t)(p[3] & 0x3f) : ld_le32(p + 4), 1u << (p[3] % 3));
		break;
	case 2: /* a descriptor that is nearly right: control, length, address, all big endian */
		gm_write(f->env.mem, (p[1] & 15) * 16u, (uint8_t[16]){ 0, p[2] & 0x3f, 0, p[3] & 0x1f, 0, 0, p[4], p[5],
			 0, 0, 0, 0, 0, p[6] & 1, p[7], 0 }, 16);
		break;
	default: /* start it; the port takes the address big endian */
		out(f, 0x514, 0, 4);
		out(f, 0x518, __builtin_bswap32((p[1] & 15) * 16u + (p[2] ? 0 : p[3])), 4);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static uint8_t blob[3000];
	struct fix f;
	struct fw_cfg *c;

	fix_init(&f);
	if (guest_mem_create(&f.env.mem, NULL, NULL) ||
	    guest_mem_add_ram(f.env.mem, "ram", 0, RAM, NULL, NULL) ||
	    fw_cfg_create(&c, &f.env, NULL) || fw_cfg_add_file(c, "etc/blob", blob, sizeof blob, NULL))
		abort();
	FUZZ_EACH(data, len, 8)
		step(&f, data);
	fw_cfg_destroy(c);
	guest_mem_destroy(f.env.mem);
	fix_done(&f);
	return 0;
}
