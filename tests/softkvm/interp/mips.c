/* Instructions per second of the interpreter on small loops: `mips [seconds-per-loop]`. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "harness.h"

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* rcx counts down in each; assembled by the compiler and copied out of this program. */
#define LOOP(name, body) \
	__asm__(".pushsection .rodata\n.globl " #name "\n" #name ":\n" body "\nhlt\n" #name "_end:\n.popsection"); \
	extern const char name[], name##_end[];
LOOP(l_alu, "1: add %rax,%rbx\n xor %rbx,%rdx\n shl $3,%rdx\n lea 4(%rdx,%rbx,2),%rsi\n sub %rsi,%rax\n and $0xffff,%esi\n dec %rcx\n jnz 1b")
LOOP(l_mem, "1: mov (%r8),%rax\n add $8,%rax\n mov %rax,8(%r8)\n add %rax,16(%r8)\n movzbl 3(%r8),%edx\n mov %edx,24(%r8)\n cmp %rdx,32(%r8)\n dec %rcx\n jnz 1b")
LOOP(l_call, "1: call 2f\n dec %rcx\n jnz 1b\n jmp 3f\n2: push %rbx\n mov %rcx,%rbx\n test $1,%bl\n je 4f\n add $3,%rax\n4: pop %rbx\n ret\n3:")
LOOP(l_sort, "1: mov %rcx,%rdx\n and $0xff,%edx\n mov (%r8,%rdx,4),%eax\n mov 4(%r8,%rdx,4),%ebx\n cmp %ebx,%eax\n jle 2f\n mov %ebx,(%r8,%rdx,4)\n mov %eax,4(%r8,%rdx,4)\n2: dec %rcx\n jnz 1b")
LOOP(l_copy, "1: mov %rcx,%rdx\n mov $4096,%ecx\n lea (%r8),%rsi\n lea 8192(%r8),%rdi\n rep movsb\n mov %rdx,%rcx\n dec %rcx\n jnz 1b")

static void bench(const char *name, const char *code, const char *end, double secs)
{
	double t0, t;
	uint64_t n0;

	harness_start();
	harness_code(code, (size_t)(end - code));
	h.cpu.gpr[8] = H_DATA;
	for (unsigned n = 0; n < 1024; n++)
		((uint32_t *)(h.ram + H_DATA))[n] = (uint32_t)(n * 2654435761u);
	n0 = h.cpu.stats.insns;
	t0 = now();
	do {
		h.cpu.gpr[R_RCX] = 1000000;
		harness_run();
		t = now() - t0;
	} while (t < secs);
	printf("%-6s %8.1f MIPS\n", name, (double)(h.cpu.stats.insns - n0) / t / 1e6);
	harness_stop();
}

int main(int argc, char **argv)
{
	double secs = argc > 1 ? atof(argv[1]) : 0.5;

	bench("alu", l_alu, l_alu_end, secs);
	bench("mem", l_mem, l_mem_end, secs);
	bench("call", l_call, l_call_end, secs);
	bench("sort", l_sort, l_sort_end, secs);
	bench("copy", l_copy, l_copy_end, secs);
	return 0;
}
