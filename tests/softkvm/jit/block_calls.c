/*
 * Functions that call each other in all ways, and return to where they were called from or elsewhere: what the translator's stack of calls
 * (jit/gen_branch.c) is for and what it must not believe. Each call takes from a common supply, so that all comes to an end; whoever finds none left returns.
 */
#include "block_make.h"

#define FUNCTIONS 6
#define STACK 0x2f0000u         /* there is much room below */
#define OTHER_STACK 0x2a0000u
#define SUPPLY 0x500030u
#define OTHER_RSP 0x500040u

struct program {
	struct code *c;
	uint32_t base;                                  /* its address */
	unsigned to[FUNCTIONS], nfix;                   /* where functions are */
	struct { unsigned at, function; bool relative; } fix[64];
	unsigned values[64], nvalues;                   /* immediates that others may change */
};

static void refer(struct program *p, bool relative)
{
	p->fix[p->nfix].at = p->c->n;
	p->fix[p->nfix].relative = relative;
	p->fix[p->nfix++].function = below(FUNCTIONS);
	put32(p->c, 0);
}

/* An instruction of the natural width: REX.W in 64-bit code. */
static void wide(struct program *p, const char *bytes, unsigned n)
{
	if (!narrow)
		put(p->c, "\x48", 1);
	put(p->c, bytes, n);
}

static void mov_eax_function(struct program *p)
{
	put(p->c, "\xb8", 1);
	refer(p, false);
}

static void call(struct program *p)
{
	switch (below(4)) {
	case 0:
		mov_eax_function(p);
		put(p->c, "\xff\xd0", 2);                       /* call rax */
		break;
	case 1:         /* call 1f ; jmp 9f ; 1: mov eax, function ; call 2f ; int3 ; 2: mov [rsp], rax ; ret ; 9: */
		put(p->c, "\xe8\2\0\0\0\xeb", 6);
		put(p->c, narrow ? "\x0f" : "\x10", 1);
		mov_eax_function(p);
		put(p->c, "\xe8\1\0\0\0\xcc", 6);
		wide(p, "\x89\x04\x24", 3);
		put(p->c, "\xc3", 1);
		break;
	default:
		put(p->c, "\xe8", 1);
		refer(p, true);
	}
}

static void step(struct program *p)
{
	struct code *c = p->c;

	switch (below(12)) {
	case 0: case 1: case 2: case 3:
		call(p);
		break;
	case 4:                                                 /* a frame of its own around a call */
		wide(p, "\x83\xec\x18", 3);                    /* sub rsp, 24 */
		wide(p, "\x89\x54\x24\x08", 4);                /* mov [rsp + 8], rdx */
		call(p);
		wide(p, "\x03\x54\x24\x08", 4);                /* add rdx, [rsp + 8] */
		wide(p, "\x83\xc4\x18", 3);                    /* add rsp, 24 */
		break;
	case 5:
		put(c, "\x53", 1);                              /* push rbx ; call ; pop rbx */
		call(p);
		put(c, "\x5b", 1);
		break;
	case 6:                                                 /* the other stack */
		if (below(3) == 0) {
			wide(p, "\x87\x24\x25", 3);            /* xchg rsp, [OTHER_RSP] */
			put32(c, OTHER_RSP);
		}
		break;
	case 7:                                                 /* registers that the translator likes to have elsewhere */
		for (unsigned n = 3 + below(8); n; n--)
			put(c, (uint8_t[]){ 0x4d, "\x01\x31\x29"[below(3)], (uint8_t)(0xc0 | (5 + below(3)) << 3 | (5 + below(3))) } + narrow, 3 - narrow);
		break;
	case 8:
		if (p->nvalues && below(4) == 0) {              /* add byte [such an immediate], 1 */
			put(c, "\x80\x04\x25", 3);
			put32(c, p->base + p->values[below(p->nvalues)]);
			put(c, "\1", 1);
		}
		break;
	default:                                                /* rol edx, 5 ; add edx, imm32 */
		put(c, "\xc1\xc2\x05\x81\xc2", 5);
		if (p->nvalues < ARRAY_SIZE(p->values))
			p->values[p->nvalues++] = c->n;
		put32(c, (uint32_t)rnd());
	}
}

static void end(struct program *p)
{
	struct code *c = p->c;

	switch (below(12)) {
	case 0:                                                 /* jmp function */
		put(c, "\xe9", 1);
		refer(p, true);
		break;
	case 1:                                                 /* push function ; ret */
		put(c, "\x68", 1);
		refer(p, false);
		put(c, "\xc3", 1);
		break;
	case 2:                                                 /* to the caller's caller, if the supply is a multiple of 8 */
		put(c, "\xf6\x04\x25", 3);                     /* test byte [SUPPLY], 7 ; jnz over */
		put32(c, SUPPLY);
		put(c, narrow ? "\x07\x75\x03" : "\x07\x75\x04", 3);
		wide(p, "\x83\xc4", 2);                        /* add rsp, word */
		put(c, narrow ? "\x04" : "\x08", 1);
		put(c, "\xc3", 1);
		break;
	case 3:
		put(c, &"\x41\xc3"[narrow], 2u - narrow);    /* with a prefix of no use */
		break;
	default:
		put(c, "\xc3", 1);
	}
}

static void function(struct program *p)
{
	struct code *c = p->c;

	put(c, "\x83\x2c\x25", 3);                             /* sub dword [SUPPLY], 1 ; jns over a return */
	put32(c, SUPPLY);
	put(c, "\x01\x79\x01\xc3\x42", 5 - !narrow);         /* 32-bit code: inc edx as well */
	for (unsigned n = 1 + below(4); n; n--)
		step(p);
	end(p);
}

/* Return addresses for all that returns once too often: to the HLT. */
static unsigned fill_stack(struct program *p, uint32_t at)
{
	struct code *c = p->c;
	unsigned hole;

	put(c, "\xbc", 1);                                      /* mov esp, at ; mov ecx, 48 ; 1: push end ; dec ecx, which is loop ; */
	put32(c, at);
	put(c, "\xb9\x30\0\0\0\x68", 6);
	hole = c->n;
	put32(c, 0);
	put(c, "\xe2\xf9", 2);                                 /* loop 1b */
	return hole;
}

void make_calls(struct code *c, unsigned at)
{
	struct program p = { .c = c, .base = H_CODE + at };
	unsigned holes[2], body, halt;

	memset(c, 0, sizeof *c);
	c->at[c->count++] = 0;
	holes[0] = fill_stack(&p, OTHER_STACK);
	wide(&p, "\x89\x24\x25", 3);                           /* mov [OTHER_RSP], rsp */
	put32(c, OTHER_RSP);
	holes[1] = fill_stack(&p, STACK);
	body = c->n;
	put(c, "\xc7\x04\x25", 3);                             /* mov dword [SUPPLY], n */
	put32(c, SUPPLY);
	put32(c, below(32) ? 20 + below(100) : 4000);
	for (unsigned n = 1 + below(3); n; n--)
		call(&p);
	put(c, "\x83\x04\x25\0\0\x50\0\xff\x0f\x85", 10);     /* add dword [0x500000], -1 ; jnz body */
	put32(c, body - (c->n + 4));
	halt = c->n;
	put(c, "\xf4", 1);
	for (unsigned n = 0; n < FUNCTIONS; n++) {
		p.to[n] = c->n;
		function(&p);
	}
	for (unsigned n = 0; n < 2; n++)
		memcpy(c->b + holes[n], &(uint32_t){ p.base + halt }, 4);
	for (unsigned n = 0; n < p.nfix; n++) {
		uint32_t to = p.to[p.fix[n].function], v = p.fix[n].relative ? to - (p.fix[n].at + 4) : p.base + to;

		memcpy(c->b + p.fix[n].at, &v, 4);
	}
}
