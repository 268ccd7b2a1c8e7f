/* Tables have right sums and lengths, and iasl (when installed) disassembles the DSDT without complaint. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/internal.h"

static int check(const uint8_t *t, uint32_t len)
{
	uint8_t s = 0;

	for (uint32_t i = 0; i < len; i++)
		s += t[i];
	return s == 0;
}

static int disassemble(const uint8_t *t, uint32_t len)
{
	FILE *f = fopen("dsdt-test.aml", "w");
	int r;

	if (!f || fwrite(t, 1, len, f) != len || fclose(f))
		return 1;
	if (system("command -v iasl >/dev/null"))
		return 77;
	r = system("iasl -d dsdt-test.aml >dsdt-test.log 2>&1 && ! grep -iE 'error|warning|external' dsdt-test.dsl && "
		   "iasl -p dsdt-again dsdt-test.dsl >dsdt-test.log 2>&1");
	if (r && system("cat dsdt-test.log"))
		return 1;
	return r != 0;
}

int main(void)
{
	struct machine m = { .pci = true, .cfg.cpus = 64, .pci64_base = 1ULL << 35 };
	uint64_t fadt;
	const uint8_t *x, *dsdt;
	struct err err = { 0 };

	if (io_space_create(&m.env.ports, "ports", 0x10000, &err) || acpi_build(&m, &err))
		return 1;
	x = m.acpi_low + ld_le64(m.acpi_low + 24) - BOOT_ACPI;
	if (!check(m.acpi_low, 20) || !check(m.acpi_low, 36) || !check(x, ld_le32(x + 4)))
		return 2;
	for (uint32_t i = 36; i < ld_le32(x + 4); i += 8) {
		const uint8_t *t = m.acpi_low + ld_le64(x + i) - BOOT_ACPI;

		if (!check(t, ld_le32(t + 4)))
			return 3;
	}
	fadt = ld_le64(x + 36) - BOOT_ACPI;
	dsdt = m.acpi_low + ld_le64(m.acpi_low + fadt + 140) - BOOT_ACPI;
	if (memcmp(dsdt, "DSDT", 4) || !check(dsdt, ld_le32(dsdt + 4)))
		return 4;
	int r = disassemble(dsdt, ld_le32(dsdt + 4));
	free(m.acpi_low);
	io_space_destroy(m.env.ports);
	return r;
}
