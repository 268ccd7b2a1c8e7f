/* For the tiny multiboot guests in this folder: 32-bit, no library, leaves through the debug exit port. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 p, u8 v) { __asm__ volatile("outb %0, %1" :: "a"(v), "Nd"(p)); }
static inline void outw(u16 p, u16 v) { __asm__ volatile("outw %0, %1" :: "a"(v), "Nd"(p)); }
static inline void outl(u16 p, u32 v) { __asm__ volatile("outl %0, %1" :: "a"(v), "Nd"(p)); }
static inline u8 inb(u16 p) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline u16 inw(u16 p) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline u32 inl(u16 p) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline u32 rd32(u32 a) { return *(volatile u32 *)a; }
static inline void wr32(u32 a, u32 v) { *(volatile u32 *)a = v; }

static inline void puts_com1(const char *s)
{
	for (; *s; s++) {
		while (!(inb(0x3fd) & 0x20))
			;
		outb(0x3f8, *s);
	}
}

/* Process status (code << 1) | 1. */
static inline void guest_exit(u8 code)
{
	outb(0x501, code);
	for (;;)
		__asm__ volatile("cli; hlt");
}

/* The number of the check that failed becomes the status. */
#define CHECK(n, cond) do { if (!(cond)) { puts_com1("FAIL " #n ": " #cond "\n"); guest_exit(n); } } while (0)

void set_gate(int vec, void *handler);
void guest_main(u32 magic, u32 info);

#endif
