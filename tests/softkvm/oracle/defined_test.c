/*
 * What CPUID offers is decoded: every opcode of the legacy, VEX and EVEX maps, under each prefix that chooses among instructions, with
 * registers and with memory, in 16-, 32- and 64-bit code. What Zydis knows, and is of a set that this CPU has and the guest is offered, must
 * have a handler. The oracle cannot say that of instructions its generator leaves out.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "softkvm/api/api.h"
#include "softkvm/interp/block.h"
#include "softkvm/vcpu.h"
#include "softkvm/vec/vec.h"

static struct cpu *cpu;
static unsigned char seen[2][ZYDIS_MNEMONIC_MAX_VALUE + 1];     /* with registers, with memory: told once */
static unsigned tried, bad;

/* No bit of CPUID that is offered stands for these sets, or the instruction is there to be undefined. */
static bool may_be_undefined(const ZydisDecodedInstruction *z)
{
	const char *isa = ZydisISASetGetString(z->meta.isa_set);

	switch (z->mnemonic) {
	case ZYDIS_MNEMONIC_UD0: case ZYDIS_MNEMONIC_UD1: case ZYDIS_MNEMONIC_UD2: case ZYDIS_MNEMONIC_RSM:
		return true;
	default:
		return !strcmp(isa, "VTX") || !strcmp(isa, "CET") || !strncmp(isa, "KNC", 3) || (!strncmp(isa, "AVX512", 6) && !host_avx512());
	}
}

static void try(const uint8_t *b, unsigned bits)
{
	uint32_t mode = bits == 64 ? BM_CODE64 | BM_STACK64 : bits == 32 ? BM_CODE32 | BM_STACK32 : 0;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	ZydisDecodedInstruction z;
	ZydisDecoder d;
	struct insn i;
	bool mem = false;

	decode_init(&d, cpu, mode);
	if (ZYAN_FAILED(decode_zydis(&d, cpu, b, 15, &z, op)) || !cpuid_has_isa(cpu, z.meta.isa_set))
		return;
	tried++;
	vec_flush(cpu);
	if (decode_insn(cpu, &d, mode, b, 15, 0, &i) == DEC_OK && (i.fn != op_ud || may_be_undefined(&z)))
		return;
	for (unsigned n = 0; n < z.operand_count; n++)
		mem |= op[n].type == ZYDIS_OPERAND_TYPE_MEMORY;
	bad++;
	if (seen[mem][z.mnemonic]++)
		return;
	printf("%u-bit %s with %s (%s) has no handler:", bits, ZydisMnemonicGetString(z.mnemonic), mem ? "memory" : "registers",
	       ZydisISASetGetString(z.meta.isa_set));
	for (unsigned n = 0; n < z.length; n++)
		printf(" %02x", b[n]);
	printf("\n");
}

/* With modrm bytes: memory with and without displacement, registers. */
static void forms(uint8_t *b, unsigned n, unsigned bits)
{
	for (unsigned reg = 0; reg < 8; reg++) {
		b[n] = (uint8_t)(reg << 3 | (bits == 16 ? 7 : 3));
		try(b, bits);
		b[n] = (uint8_t)(reg << 3 | 0x84);
		try(b, bits);
		for (unsigned rm = 0; rm < 8; rm += reg < 2 ? 1 : 5) {
			b[n] = (uint8_t)(0xc0 | reg << 3 | rm);
			try(b, bits);
		}
	}
}

static void legacy(unsigned bits)
{
	static const uint8_t pre[] = { 0, 0x66, 0xf2, 0xf3, 0x48 };

	for (unsigned p = 0; p < sizeof pre; p++)
		for (unsigned map = 0; map < 4; map++)
			for (unsigned op = 0; op < 256; op++) {
				uint8_t b[24] = { 0 };
				unsigned n = 0;

				if (pre[p] == 0x48 && bits != 64)
					continue;
				if (pre[p])
					b[n++] = pre[p];
				if (map)
					b[n++] = 0x0f;
				if (map > 1)
					b[n++] = map == 2 ? 0x38 : 0x3a;
				b[n++] = (uint8_t)op;
				forms(b, n, bits);
			}
}

static void vex(unsigned bits, bool evex, unsigned vvvv)
{
	for (unsigned map = 1; map < 4; map++)
		for (unsigned wpl = 0; wpl < (evex ? 32 : 16); wpl++)
			for (unsigned op = 0; op < 256; op++) {
				unsigned w = wpl & 1, pp = wpl >> 1 & 3, l = wpl >> 3;
				uint8_t v[24] = { 0xc4, (uint8_t)(0xe0 | map), (uint8_t)(w << 7 | vvvv << 3 | l << 2 | pp), (uint8_t)op };
				uint8_t e[24] = { 0x62, (uint8_t)(0xf0 | map), (uint8_t)(w << 7 | vvvv << 3 | 4 | pp), (uint8_t)(l << 5 | 8), (uint8_t)op };

				forms(evex ? e : v, evex ? 5 : 4, bits);
			}
}

int main(void)
{
	cpu = calloc(1, sizeof *cpu);
	if (!cpu)
		return 1;
	cpu->feat = cpuid_host_features();
	for (unsigned bits = 16; bits <= 64; bits *= 2) {
		legacy(bits);
		for (unsigned evex = 0; evex < 2; evex++) {
			vex(bits, evex, 15);
			vex(bits, evex, 13);
		}
	}
	vec_cpu_free(cpu);
	free(cpu);
	printf("%u encodings of instructions that are offered, %u without a handler\n", tried, bad);
	return bad || tried < 100000;
}
