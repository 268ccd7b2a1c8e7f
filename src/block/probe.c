/* Which format an image is in, by its first bytes (the magics in the formats' specifications). */
#include <string.h>

#include "base/util.h"
#include "block/driver.h"

const char *probe_format(const uint8_t *head, size_t len)
{
	static const struct { const char *name, *magic; size_t off, len; } formats[] = {
		{ "qcow2", "QFI\xfb", 0, 4 }, { "qed", "QED\0", 0, 4 }, { "vmdk", "KDMV", 0, 4 }, { "vmdk", "COWD", 0, 4 },
		{ "vmdk", "# Disk DescriptorFile", 0, 21 }, { "vhdx", "vhdxfile", 0, 8 }, { "vpc", "conectix", 0, 8 },
		{ "vdi", "\x7f\x10\xda\xbe", 64, 4 }, { "luks", "LUKS\xba\xbe", 0, 6 },
		{ "parallels", "WithoutFreeSpace", 0, 16 }, { "parallels", "WithouFreSpacExt", 0, 16 },
		{ "bochs", "Bochs Virtual HD Image", 0, 22 },
	};
	for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
		if (formats[i].off + formats[i].len <= len &&
		    !memcmp(head + formats[i].off, formats[i].magic, formats[i].len))
			return formats[i].name;
	}
	return NULL;
}
