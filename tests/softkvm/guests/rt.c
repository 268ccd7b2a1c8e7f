/* C side of the guests' runtime. */
#include "rt.h"

u8 idt[256 * 16] __attribute__((aligned(16)));
static u8 kstack[16384] __attribute__((aligned(16))), ustack[8192] __attribute__((aligned(16)));
static u8 stack[32768] __attribute__((aligned(16)));
ul stack_top = (ul)stack + sizeof stack;
volatile struct last last;
volatile ul ret_val;
handler_fn *volatile handlers[256];
#ifdef __x86_64__
ul user_cs = 0x23, user_ss = 0x2b;
#define CODE_SEL 0x18
#else
ul user_cs = 0x43, user_ss = 0x2b;
#define CODE_SEL 0x08
#endif
ul user_sp = (ul)ustack + sizeof ustack, user_flags = 2;

void set_gate(int vec, ul addr, u16 sel, int type, int dpl, int ist)
{
	u64 lo = (addr & 0xffff) | (u64)sel << 16 | (u64)(0x8000u | dpl << 13 | type << 8 | ist) << 32 | (u64)(addr >> 16 & 0xffff) << 48;

#ifdef __x86_64__
	((volatile u64 *)idt)[vec * 2] = lo;
	((volatile u64 *)idt)[vec * 2 + 1] = addr >> 32;
#else
	((volatile u64 *)idt)[vec] = lo;
#endif
}

void rt_init(void)
{
	struct { u16 limit; ul base; } __attribute__((packed)) r = { sizeof(ul) * 512 - 1, (ul)idt };

	for (int v = 0; v < 256; v++)
		set_gate(v, (ul)stubs + 16 * v, CODE_SEL, 14, v == 3 || v == 4 || v == 0x80 ? 3 : 0, 0);
	__asm__ volatile("lidt %0" :: "m"(r));
	*(volatile ul *)(TSS + 4) = (ul)kstack + sizeof kstack;
	*(volatile u16 *)(TSS + 0x66) = 0x68;   /* no I/O map */
	report.magic = 0x47534554;
}
