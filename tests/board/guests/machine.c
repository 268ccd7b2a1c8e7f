/* Everything a direct-booted guest finds on the board: tables, chips, PCI, interrupts. */
#include "guest.h"

static struct { u16 lo, sel; u8 zero, type; u16 hi; } __attribute__((packed)) idt[256];

void set_gate(int vec, void *handler)
{
	u32 h = (u32)handler;

	idt[vec].lo = h;
	idt[vec].sel = 0x10;
	idt[vec].type = 0x8e;
	idt[vec].hi = h >> 16;
}

/*
 * Interrupt entry that returns with popf and ret: same privilege needs no more, and some
 * software-emulated /dev/kvm cannot execute iret.
 */
#define ENTRY(name) \
	void name##_entry(void); \
	__asm__(".globl " #name "_entry\n" #name "_entry: pusha\n call " #name "\n" \
		"mov 40(%esp), %eax\n mov 32(%esp), %ecx\n mov %eax, 36(%esp)\n mov %ecx, 40(%esp)\n" \
		"popa\n add $4, %esp\n popf\n ret\n")

static volatile u32 pit_ticks, rtc_ticks, msi_hits, ioapic_hits;

ENTRY(on_pit);
void on_pit(void)
{
	pit_ticks++;
	outb(0x20, 0x20);
}

ENTRY(on_rtc);
void on_rtc(void)
{
	rtc_ticks++;
	outb(0x70, 0x0c);
	inb(0x71);
	outb(0xa0, 0x20);
	outb(0x20, 0x20);
}

ENTRY(on_ioapic);
void on_ioapic(void)
{
	ioapic_hits++;
	inb(0x3fa);
	wr32(0xfee000b0, 0);
}

static u8 sum(const u8 *p, u32 n)
{
	u8 s = 0;

	while (n--)
		s += *p++;
	return s;
}

static int same(const void *a, const char *b, int n)
{
	const char *x = a;

	while (n--)
		if (*x++ != *b++)
			return 0;
	return 1;
}

static u32 find_table(u32 rsdt, const char *sig)
{
	for (u32 i = 36; i < rd32(rsdt + 4); i += 4)
		if (same((void *)rd32(rsdt + i), sig, 4))
			return rd32(rsdt + i);
	return 0;
}

/* What real-mode code looks for: base memory, the extended BIOS data area, vectors to code that ends with IRET. */
static void check_bios_area(void)
{
	u32 int15 = rd32(0x15 * 4), code = (int15 >> 16 << 4) + (int15 & 0xffff);

	CHECK(15, (rd32(0x413) & 0xffff) == 639 && (rd32(0x40e) & 0xffff) == 0x9fc0 && *(volatile u8 *)0x9fc00 == 1);
	CHECK(16, code >= 0xf0000 && code < 0x100000 && *(volatile u8 *)code == 0x55 && *(volatile u8 *)(code + 8) == 0xcf);
}

static void check_acpi(void)
{
	u32 rsdp = 0, rsdt, t;
	static const char *const sig[] = { "FACP", "APIC", "MCFG" };

	for (u32 a = 0xe0000; a < 0x100000 && !rsdp; a += 16)
		if (same((void *)a, "RSD PTR ", 8))
			rsdp = a;
	CHECK(10, rsdp && !sum((u8 *)rsdp, 20) && !sum((u8 *)rsdp, 36));
	rsdt = rd32(rsdp + 16);
	CHECK(11, same((void *)rsdt, "RSDT", 4) && !sum((u8 *)rsdt, rd32(rsdt + 4)));
	for (int i = 0; i < 3; i++) {
		t = find_table(rsdt, sig[i]);
		CHECK(12, t && !sum((u8 *)t, rd32(t + 4)));
	}
	t = find_table(rsdt, "FACP");
	CHECK(13, same((void *)rd32(t + 40), "DSDT", 4) && !sum((u8 *)rd32(t + 40), rd32(rd32(t + 40) + 4)));
	CHECK(14, same((void *)rd32(t + 36), "FACS", 4));
}

static u32 cf8(u32 devfn, u32 reg)
{
	outl(0xcf8, 0x80000000 | devfn << 8 | reg);
	return inl(0xcfc);
}

static void check_pci(void)
{
	CHECK(20, cf8(0, 0) == 0x29c08086);
	CHECK(21, cf8(0xf8, 0) == 0x29188086);
	CHECK(22, cf8(0x50, 0) == 0xffffffff);
	CHECK(23, rd32(0xb0000000) == 0x29c08086);
	CHECK(24, rd32(0xb0000000 + (0xf8 << 12)) == 0x29188086);
	CHECK(25, rd32(0xb0100000) == 0xffffffff);
	CHECK(26, cf8(0, 0x60) == 0xb0000001);
	CHECK(27, (cf8(0xf8, 8) >> 16) == 0x0601);
	CHECK(28, inl(0xcf8) == 0x8000f808);
}

static void pic_init(void)
{
	struct { u16 limit; u32 base; } __attribute__((packed)) r = { sizeof(idt) - 1, (u32)idt };

	__asm__ volatile("lidt %0" :: "m"(r));
	outb(0x20, 0x11); outb(0x21, 0x20); outb(0x21, 4); outb(0x21, 1);
	outb(0xa0, 0x11); outb(0xa1, 0x28); outb(0xa1, 2); outb(0xa1, 1);
	outb(0x21, 0xfa);
	outb(0xa1, 0xfe);
}

static void check_interrupts(void)
{
	set_gate(0x20, on_pit_entry);
	set_gate(0x28, on_rtc_entry);
	set_gate(0x40, on_ioapic_entry);
	pic_init();
	outb(0x43, 0x34);
	outb(0x40, 0x9c);
	outb(0x40, 0x2e);                               /* 100 Hz */
	outb(0x70, 0x0a); outb(0x71, 0x26);
	outb(0x70, 0x0b); outb(0x71, 0x42);             /* periodic, 1024 Hz */
	__asm__ volatile("sti");
	while (pit_ticks < 3 || rtc_ticks < 3)
		__asm__ volatile("hlt");
	__asm__ volatile("cli");
	outb(0x70, 0x0b); outb(0x71, 0x02);
	outb(0x21, 0xff);
	outb(0xa1, 0xff);
	/* UART through the I/O APIC: pin 4 to vector 0x40, then enable the transmit interrupt. */
	wr32(0xfee000f0, 0x1ff);
	wr32(0xfec00000, 0x10 + 4 * 2 + 1); wr32(0xfec00010, 0);
	wr32(0xfec00000, 0x10 + 4 * 2); wr32(0xfec00010, 0x40);
	outb(0x3fc, 8);
	__asm__ volatile("sti");
	outb(0x3f9, 2);
	for (u32 i = 0; i < 100000 && !ioapic_hits; i++)
		__asm__ volatile("pause");
	__asm__ volatile("cli");
	outb(0x3f9, 0);
	CHECK(30, ioapic_hits == 1);
}

static void check_rtc(void)
{
	u8 s;

	outb(0x70, 0x0d);
	CHECK(40, inb(0x71) == 0x80);
	outb(0x70, 0x32);
	CHECK(41, inb(0x71) == 0x20);
	outb(0x70, 0x00);
	s = inb(0x71);
	CHECK(42, (s & 15) < 10 && s < 0x60);
}

static void check_pm(void)
{
	u32 a = inl(0x608), b;

	for (volatile int i = 0; i < 1000; i++)
		;
	b = inl(0x608);
	CHECK(50, ((b - a) & 0xffffff) > 0 && ((b - a) & 0xffffff) < 0x400000);
	CHECK(51, inw(0x604) & 1);
}

static void check_fw_cfg(void)
{
	outw(0x510, 0);
	CHECK(60, inb(0x511) == 'Q' && inb(0x511) == 'E' && inb(0x511) == 'M' && inb(0x511) == 'U');
	CHECK(61, inl(0x514) == 0x554d4551);
}

static int has(const char *s, const char *w)
{
	for (; *s; s++) {
		int i = 0;

		while (w[i] && s[i] == w[i])
			i++;
		if (!w[i])
			return 1;
	}
	return 0;
}

void guest_main(u32 magic, u32 info)
{
	const char *cmd;

	if (magic == 0x2badb002) {
		CHECK(1, (rd32(info) & 0x48) == 0x48);
		cmd = (char *)rd32(info + 16);
		CHECK(2, rd32(info + 44) >= 48);
	} else {
		CHECK(3, rd32(info) == 0x336ec578);
		cmd = (char *)rd32(info + 24);
		CHECK(4, rd32(info + 32) == 0xe0000);
	}
	puts_com1("hello from the guest\n");
	if (has(cmd, "poweroff"))
		outw(0x604, 0x2000);
	if (has(cmd, "reset"))
		outb(0xcf9, 6);
	if (has(cmd, "kbdreset"))
		outb(0x64, 0xfe);
	if (has(cmd, "triple")) {
		struct { u16 limit; u32 base; } __attribute__((packed)) r = { 0, 0 };

		__asm__ volatile("lidt %0; ud2" :: "m"(r));
	}
	if (has(cmd, "twice")) {                        /* a reset must start again; CMOS survives it */
		outb(0x70, 0x50);
		if (inb(0x71) != 0x77) {
			outb(0x71, 0x77);
			outb(0x92, 1);
			for (;;)
				__asm__ volatile("hlt");
		}
		guest_exit(0x21);
	}
	if (has(cmd, "modules")) {
		CHECK(5, rd32(info + 20) == 2);
		CHECK(6, same((void *)rd32(rd32(info + 24)), "one", 3) && same((void *)rd32(rd32(info + 24) + 16), "two", 3));
		CHECK(7, has((char *)rd32(rd32(info + 24) + 8), "a,b"));
		guest_exit(0x21);
	}
	if (!has(cmd, "full"))
		guest_exit(0x21);
	check_bios_area();
	check_acpi();
	check_pci();
	check_rtc();
	check_pm();
	check_fw_cfg();
	check_interrupts();
	guest_exit(0x21);
}
