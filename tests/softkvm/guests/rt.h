/*
 * Runtime of the freestanding guests in this folder, 32- and 64-bit.
 *
 * A guest is a flat image at 0x100000 whose guest_main() makes checks; what fails is written to the report page, which the
 * runner prints. try_call() and try_user() run code in ring 0 and ring 3 and return the vector that ended it, or -1 when it
 * came back by itself; `last` has the details. Expected values are the manuals', written by hand in the guests.
 */
#ifndef RT_H
#define RT_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long ul;

/* Layout below 16 MiB; the runner knows it too (runner.h). */
#define REPORT_GPA 0x200000
#define PARAM_GPA 0x20f000
#define TABLES 0x400000         /* free for page tables */
#define SCRATCH 0x600000        /* free for the guest */
#define REPORT_MAX 64

struct report {
	u32 magic, checks, failed, n, last_line, pad;
	struct { u32 line, tag; u64 got, want; } e[REPORT_MAX];
};
#define report (*(volatile struct report *)REPORT_GPA)
#define param ((volatile u64 *)PARAM_GPA)

static inline void check_eq(int line, u64 tag, u64 got, u64 want)
{
	report.checks++;
	report.last_line = line;
	if (got == want)
		return;
	report.failed++;
	if (report.n < REPORT_MAX) {
		report.e[report.n].line = line;
		report.e[report.n].tag = (u32)tag;
		report.e[report.n].got = got;
		report.e[report.n].want = want;
		report.n++;
	}
}
#define EQ(got, want) check_eq(__LINE__, 0, (u64)(got), (u64)(want))
#define EQT(tag, got, want) check_eq(__LINE__, tag, (u64)(got), (u64)(want))
#define CHECK(c) EQ(!!(c), 1)

/* What the last event was. */
struct last { ul vec, err, ip, cs, flags, sp, ss, cr2, count; };
extern volatile struct last last;
int try_call(const void *fn, ul a, ul b);
int try_user(ul ip, ul a, ul b);
extern volatile ul ret_val;             /* what the code left in the accumulator */
extern ul user_cs, user_ss, user_sp, user_flags;
/* Interrupt handlers in C: registers are saved around them, and they return by IRET. */
typedef void handler_fn(void);
extern handler_fn *volatile handlers[256];
void rt_init(void);
void guest_main(void);
extern u8 stubs[];              /* 16 bytes per vector */
void set_gate(int vec, ul addr, u16 sel, int type, int dpl, int ist);
extern u8 idt[];
#define GDT ((volatile u64 *)0x1000)
#define TSS ((volatile u8 *)0x1200)

/* A piece of code as a function: a and b are in rdi, rsi (64-bit) or eax, edx (32-bit). */
#define SNIP(name, code) extern u8 name[]; __asm__(".text\n" #name ":\n" code "\n ret\n")

#define EXC(snip, a, b, vector, error) do { \
		EQ(try_call(snip, (ul)(a), (ul)(b)), vector); \
		EQ(last.err, error); \
		EQ(last.ip, (ul)(snip)); \
	} while (0)

static inline void outb(u16 p, u8 v) { __asm__ volatile("outb %0, %1" :: "a"(v), "Nd"(p) : "memory"); }
static inline void outl(u16 p, u32 v) { __asm__ volatile("outl %0, %1" :: "a"(v), "Nd"(p) : "memory"); }
static inline u8 inb(u16 p) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(p) : "memory"); return v; }
static inline u32 inl(u16 p) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(p) : "memory"); return v; }
static inline u64 rdmsr(u32 m) { u32 l, h; __asm__ volatile("rdmsr" : "=a"(l), "=d"(h) : "c"(m) : "memory"); return l | (u64)h << 32; }
static inline void wrmsr(u32 m, u64 v) { __asm__ volatile("wrmsr" :: "a"((u32)v), "d"((u32)(v >> 32)), "c"(m) : "memory"); }
static inline u64 rdtsc(void) { u32 l, h; __asm__ volatile("rdtsc" : "=a"(l), "=d"(h) :: "memory"); return l | (u64)h << 32; }
static inline void cpuid(u32 leaf, u32 sub, u32 *r)
{
	__asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
#define RDCR(n) ({ ul v_; __asm__ volatile("mov %%cr" #n ", %0" : "=r"(v_) :: "memory"); v_; })
#define WRCR(n, v) __asm__ volatile("mov %0, %%cr" #n :: "r"((ul)(v)) : "memory")
#define RDDR(n) ({ ul v_; __asm__ volatile("mov %%db" #n ", %0" : "=r"(v_) :: "memory"); v_; })
#define WRDR(n, v) __asm__ volatile("mov %0, %%db" #n :: "r"((ul)(v)) : "memory")
static inline void invlpg(ul a) { __asm__ volatile("invlpg (%0)" :: "r"(a) : "memory"); }
static inline u32 rd32(ul a) { return *(volatile u32 *)a; }
static inline void wr32(ul a, u32 v) { *(volatile u32 *)a = v; }
#define LOAD(type, a) (*(volatile type *)(ul)(a))

/* What the runner does for a guest (32-bit OUT): raise GSI v & 0xffff to v >> 16, send an MSI, an NMI to vCPU v, kick GSI 13's
 * irqfd; IN: how often GSI 13 was resampled since the last look. */
enum { ORDER_LINE = 0x5200, ORDER_MSI_DATA = 0x5204, ORDER_MSI = 0x5208, ORDER_NMI = 0x520c, ORDER_FD = 0x5210, ORDER_ACKS = 0x5214 };
static inline void line(u32 gsi, u32 level) { outl(ORDER_LINE, gsi | level << 16); }
static inline void msi(u32 addr, u32 data) { outl(ORDER_MSI_DATA, data); outl(ORDER_MSI, addr); }

enum { DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS = 10, NP, SS, GP, PF, MF = 16, AC, MC, XM };
enum { CR0_PE = 1, CR0_MP = 2, CR0_EM = 4, CR0_TS = 8, CR0_NE = 0x20, CR0_WP = 1 << 16, CR0_AM = 1 << 18 };
#define CR0_PG (1ul << 31)
enum { CR4_VME = 1, CR4_PVI = 2, CR4_TSD = 4, CR4_DE = 8, CR4_PSE = 0x10, CR4_PAE = 0x20, CR4_PGE = 0x80, CR4_OSFXSR = 0x200,
       CR4_OSXMMEXCPT = 0x400, CR4_UMIP = 0x800, CR4_LA57 = 0x1000, CR4_FSGSBASE = 1 << 16, CR4_PCIDE = 1 << 17,
       CR4_OSXSAVE = 1 << 18, CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21, CR4_PKE = 1 << 22 };

#endif
