/*
 * Differential test: a random unprivileged instruction on random state is executed by the host CPU
 * and by the engine, and everything it can change is compared.
 *
 * Guest linear addresses are host addresses here: a sandbox of a few pages between guard pages, used by
 * one side after the other. native.c runs the host side, fake.c stands in for the MMU and the loop.
 */
#ifndef TESTS_SOFTKVM_ORACLE_H
#define TESTS_SOFTKVM_ORACLE_H

#include <Zydis/Zydis.h>
#include <stdbool.h>
#include <stdint.h>

#include "softkvm/cpu.h"

#define SANDBOX_PAGES 3
#define SANDBOX (SANDBOX_PAGES * 4096)
#define OSZAPC 0x8d5

struct state {
	_Alignas(64) uint8_t fx[512];
	_Alignas(64) uint8_t zmm[32][64];
	uint64_t k[8];
	uint64_t gpr[16];
	uint64_t flags;
	uint32_t mxcsr;
	int trap;                       /* vector, -1 none */
	uint8_t mem[SANDBOX];
};

struct test_case {
	uint8_t bytes[16];
	uint8_t len;
	bool integer;
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	bool tlb[SANDBOX_PAGES];        /* pages the engine finds in its TLB */
};

extern uint8_t *sandbox;                /* SANDBOX bytes between guards; below 2 GiB, as is everything native.c uses */

int native_init(void);
void native_run(const struct test_case *t, const struct state *in, struct state *out);
bool native_avx512(void);

int engine_init(void);
/* False: the engine does not claim this instruction. */
bool engine_prepare(const struct test_case *t);
void engine_test_run(const struct test_case *t, const struct state *in, struct state *out);

uint64_t rnd(void);
static inline unsigned below(unsigned n) { return (unsigned)(rnd() % n); }
enum group { G_X87, G_SSE, G_AVX, G_AVX512, G_INTEGER, G_COUNT };
/* A random instruction of the group, decoded; false: try again. */
bool gen_instruction(struct test_case *t, enum group g);
/* Random state, with the memory operand inside (now and then just outside) the sandbox; false: cannot be arranged. */
bool gen_state(struct test_case *t, struct state *s);

#endif
