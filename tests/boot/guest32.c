/*
 * A 32-bit program for a 64-bit kernel, with nothing but the kernel below it: int 0x80, 32-bit arithmetic and addressing, x87, string
 * instructions, a signal handler, segment base by set_thread_area. Prints "32-bit ok HASH" where every part agreed with itself.
 */
typedef unsigned int u32;
typedef unsigned char u8;

static long call(long n, long a, long b, long c)
{
	long r;

	__asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
	return r;
}

static u32 hash = 2166136261u;
static volatile int signals;

static void mix(u32 v)
{
	for (int i = 0; i < 4; i++, v >>= 8)
		hash = (hash ^ (v & 255)) * 16777619u;
}

static void fail(const char *what)
{
	u32 n = 0;

	while (what[n])
		n++;
	call(4, 1, (long)what, n);
	call(1, 1, 0, 0);
}

static void arithmetic(void)
{
	u32 a = 1, carry = 0, hi, lo;

	for (u32 i = 1; i < 200000; i++) {
		a = a * 1664525u + 1013904223u;
		__asm__("mull %3" : "=a"(lo), "=d"(hi) : "a"(a), "r"(i) : "cc");
		__asm__("addl %2, %0; adcl $0, %1" : "+r"(carry), "+r"(hi) : "r"(lo) : "cc");
		a ^= hi / (i | 1);
		__asm__("shldl $7, %1, %0; bswap %0" : "+r"(a) : "r"(carry) : "cc");
	}
	mix(a);
	mix(carry);
}

static void strings(void)
{
	static u8 s[8192], d[8192];
	u32 n = sizeof s;
	u8 *p = d, *q = s;

	for (u32 i = 0; i < sizeof s; i++)
		s[i] = (u8)(i * 7 + (i >> 5)) | 1;
	__asm__ volatile("cld; rep movsb" : "+D"(p), "+S"(q), "+c"(n) : : "memory");
	d[5000] = 0;
	n = sizeof d;
	p = d;
	__asm__ volatile("repne scasb" : "+D"(p), "+c"(n) : "a"(0) : "memory", "cc");
	if (p != d + 5001)
		fail("scasb\n");
	for (u32 i = 0; i < sizeof d; i += 97)
		mix(d[i]);
}

static void x87(void)
{
	double v = 1, s = 0;
	unsigned short cw = 0x27f;

	__asm__ volatile("fldcw %0" : : "m"(cw));
	for (int i = 1; i < 50000; i++) {
		v = v * 1.0000001 + 1.0 / i;
		s += v > 5 ? v : -v;
	}
	mix((u32)(int)(s / 1000));
}

static void on_signal(int n)
{
	signals += n;
}

static void signal_and_tls(void)
{
	struct { void (*fn)(int); u32 flags; void *restorer; u32 mask[2]; } sa = { on_signal, 0, 0, { 0, 0 } };
	struct { u32 entry, base, limit, flags; } d = { ~0u, 0, 0xfffff, 0x51 };
	static u32 cell = 0x12345678;
	u32 got;

	if (call(174, 10, (long)&sa, 0) && call(67, 10, (long)&sa, 0))
		fail("sigaction\n");
	for (int i = 0; i < 50; i++)
		call(37, call(20, 0, 0, 0), 10, 0);
	if (signals != 500)
		fail("signals\n");
	d.base = (u32)&cell;
	if (call(243, (long)&d, 0, 0))
		fail("set_thread_area\n");
	__asm__ volatile("movw %w1, %%gs; movl %%gs:0, %0" : "=r"(got) : "r"(d.entry * 8 + 3));
	if (got != cell)
		fail("gs base\n");
}

void _start(void);
__attribute__((force_align_arg_pointer)) void _start(void)
{
	char out[] = "32-bit ok 00000000\n";

	arithmetic();
	strings();
	x87();
	signal_and_tls();
	for (int i = 0; i < 8; i++)
		out[10 + i] = "0123456789abcdef"[hash >> (28 - 4 * i) & 15];
	call(4, 1, (long)out, sizeof out - 1);
	call(1, 0, 0, 0);
}
