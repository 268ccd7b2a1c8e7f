/* Random register accesses, lines, messages and time on all chips: irq_fuzz [RUNS [SEED]] */
#include "../../pci/fuzz.h"
#include "fake.h"

static void step(struct vm *vm, const uint8_t *d)
{
	static const uint16_t ports[] = { 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x44 };
	static const uint8_t lens[] = { 1, 2, 4, 8 };
	struct cpu *c = vm->cpus[d[1] & 1];
	uint64_t v = ld_le32(d + 4) | (uint64_t)d[2] << 32;
	uint8_t raw[8], sipi;
	struct kvm_lapic_state l;
	struct kvm_irqchip chip;
	struct kvm_pit_state2 p;

	memcpy(raw, &v, 8);
	switch (d[0] % 14) {
	case 0: case 1: bus_pio(c, ports[d[3] % ARRAY_SIZE(ports)], lens[d[2] & 1], d[1] & 4, raw); break;
	case 2: bus_mmio(c, 0xfee00000 + (d[3] << 4) % 0x400 + (d[2] & 8 ? d[2] & 7 : 0), lens[d[2] & 8 ? d[2] >> 6 : 2], d[1] & 4, raw); break;
	case 3: v = d[3] & 31; bus_mmio(c, 0xfec00000, 4, true, &v); bus_mmio(c, 0xfec00010, lens[d[2] & 3], d[1] & 4, raw); break;
	case 4: lapic_msr_write(c, 0x800 + (d[3] & 63), v); lapic_msr_read(c, 0x800 + (d[3] & 63), &v, v & 1); break;
	case 5: irqchip_line(vm, d[3] & 31, d[1] >> 2 & 1, d[2]); break;
	case 6: irqchip_msi(vm, 0xfee00000 | (uint64_t)d[3] << 12 | (d[2] & 12), (uint32_t)v & 0xffff); break;
	case 7: fake_now += v & 0xfffffff; lapic_timer_poll(c); irqchip_lock(vm->irqchip); pit_poll(vm->irqchip, fake_now); irqchip_unlock(vm->irqchip); break;
	case 8: if (irqchip_pending(c) >= 0) irqchip_ack(c); break;
	case 9: lapic_take_init_sipi(c, &sipi); lapic_take_nmi_smi(c); lapic_set_tpr(c, d[3]); lapic_timer_deadline(c); break;
	case 10: lapic_set_base(c, 0xfee00000 | (d[3] & 0xf) << 8, d[2] & 1); break;
	case 11: lapic_get(c, &l); l.regs[(d[3] * 4) & 0x3ff] ^= d[4]; lapic_set(c, &l); break;
	case 12: chip.chip_id = d[3] % 3; irqchip_get(vm, &chip); chip.chip.dummy[d[2]] ^= d[4]; irqchip_set(vm, &chip); break;
	case 13: irqchip_get_pit2(vm, &p); ((uint8_t *)&p)[d[3] % sizeof p] ^= d[4]; irqchip_set_pit2(vm, &p); lapic_reset(c, d[2] & 1); break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *d, size_t n)
{
	struct vm *vm = fake_vm(2, false);

	irqchip_create_pit(vm, NULL);
	((struct pit *)vm->irqchip->pit)->no_thread = true;
	fake_now = 1000000;
	FUZZ_EACH(d, n, 8)
		step(vm, d);
	fake_vm_free(vm);
	return 0;
}
