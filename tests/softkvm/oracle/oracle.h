/*
 * Differential test: a random unprivileged instruction on random state is executed by the host CPU and by softkvm, and everything
 * it can change is compared: registers, flags, vector and x87 state, memory, where it goes on, exceptions with their error codes.
 *
 * Both sides run the same bytes at the same addresses: the arena lies below 2 GiB and guest linear = guest physical = host
 * addresses. Its pages have the same rights on both sides, the selectors mean the same (Linux's GDT, an LDT of ours). The native
 * side enters by sigreturn and leaves by a signal (native.c), the guest enters ring 3 by IRETQ and leaves by an exception (vm.c);
 * what surrounds the instruction is INT3. So branches, far transfers and all kinds of code segment can be had.
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

/* The arena, as offsets: what is not listed is not mapped. */
#define ARENA (2u << 20)
#define A_SANDBOX 0x80000u      /* readable, writable */
#define A_CONST (A_SANDBOX + SANDBOX)   /* one page, readable */
#define A_CODE 0xc0000u
#define CODE_SIZE 8192u

/* Selectors: Linux's, and an LDT. */
enum { SEL_CS32 = 0x23, SEL_DATA = 0x2b, SEL_CS64 = 0x33, SEL_FS = 0x07, SEL_GS = 0x0f, SEL_CS16 = 0x17, SEL_DATA16 = 0x1f };
#define FS_BASE (A_SANDBOX + 0x5c0)     /* of the arena; no limit. Aligned: AMD's XSAVE was seen to look at the offset */
#define GS_BASE 0u
#define GS_LIMIT (A_CONST - 0x101)      /* ends within the sandbox */
#define DATA16_BASE (A_SANDBOX - 0x2000)
#define DATA16_LIMIT 0x6fffu

struct state {
	_Alignas(64) uint8_t fx[512];   /* FXSAVE64 layout, the x87 part */
	_Alignas(64) uint8_t zmm[32][64];
	uint64_t k[8];
	uint64_t gpr[16];
	uint64_t rip, flags;
	uint32_t mxcsr;
	uint16_t cs, ss, seg[4];        /* seg: DS, ES, FS, GS */
	int trap;                       /* vector */
	uint32_t error;
	uint64_t cr2;                   /* 0 but for page faults */
	uint8_t mem[SANDBOX];
};

struct test_case {
	uint8_t bytes[16];
	uint8_t len, bits;
	unsigned at;                    /* offset in the code area; a NOP stands before */
	bool flush;                     /* the guest finds an empty TLB */
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
};

extern uint8_t *sandbox;                /* in the arena; written by both sides */
static inline uint64_t arena(void) { return (uintptr_t)sandbox - A_SANDBOX; }

/* native.c */
int native_init(void);
uint8_t *native_alias(void);            /* the arena, writable from end to end */
bool native_has(unsigned bits);         /* can the host run code of so many bits? */
bool native_avx512(void);
/* Memory and code as the case wants them; both sides start from that. */
void arena_load(const struct test_case *t, const struct state *in);
void native_run(const struct test_case *t, const struct state *in, struct state *out);

/* image.c: the standard XSAVE format. `bv`: components to be marked as in use. */
void state_to_xsave(const struct state *s, uint8_t *img, uint64_t bv);
void state_from_xsave(struct state *s, const uint8_t *img);
uint64_t common_xcr0(void);             /* components that both sides have and that are compared */

/* vm.c. `start`: bytes before the instruction at which to start, 0 or 1. */
int vm_init(void);
void vm_run(const struct test_case *t, const struct state *in, struct state *out, unsigned start);
void vm_end(void);

/* gen.c, place.c */
uint64_t rnd(void);
static inline unsigned below(unsigned n) { return (unsigned)(rnd() % n); }
enum group { G_INTEGER, G_CONTROL, G_X87, G_SSE, G_AVX, G_AVX512, G_STATE, G_COUNT };
/* A random instruction of the group, decoded; false: try again. */
bool gen_instruction(struct test_case *t, enum group g, unsigned bits);
/* Random state, with the memory operand inside (now and then just outside) the sandbox; false: cannot be arranged. */
bool gen_state(struct test_case *t, struct state *s);
uint64_t number(void);
bool is_string(const struct test_case *t);
/* Linear address of a memory operand in this state. */
uint64_t operand_address(const struct test_case *t, const struct state *s, const ZydisDecodedOperand *o);

/* fake.c: the vector family alone, on a sandbox for memory; for xsave_test.c. */
int engine_init(void);
bool engine_prepare(const struct test_case *t);
void engine_test_run(const struct test_case *t, const struct state *in, struct state *out);

#endif
