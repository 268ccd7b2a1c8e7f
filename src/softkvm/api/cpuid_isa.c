/* Zydis ISA sets and the CPUID bits that offer them: an instruction that is not offered is #UD. */
#include <Zydis/Zydis.h>

#include "softkvm/api/api.h"

/* Which register of struct cpu_features holds the bit. */
enum word { W_NONE /* always */, W_NEVER, W_1C, W_1D, W_7B, W_7C, W_7D, W_71A, W_D1A, W_E1C, W_E1D, W_E8B };

struct need { uint8_t word, bit; };

#define S(name) ZYDIS_ISA_SET_##name
#define S3(name, w, b) [S(name##_128)] = { w, b }, [S(name##_256)] = { w, b }, [S(name##_512)] = { w, b }

/* By ISA set; what is not named here is always there. */
static const struct need needs[ZYDIS_ISA_SET_MAX_VALUE + 1] = {
	[S(ADOX_ADCX)] = { W_7B, 19 }, [S(AES)] = { W_1C, 25 }, [S(AVX)] = { W_1C, 28 }, [S(AVX2)] = { W_7B, 5 },
	[S(AVX2GATHER)] = { W_7B, 5 }, [S(AVXAES)] = { W_1C, 25 }, [S(AVX_GFNI)] = { W_7C, 8 }, [S(AVX_VNNI)] = { W_71A, 4 },
	[S(BMI1)] = { W_7B, 3 }, [S(BMI2)] = { W_7B, 8 }, [S(CLFLUSHOPT)] = { W_7B, 23 }, [S(CLFSH)] = { W_1D, 19 },
	[S(CLWB)] = { W_7B, 24 }, [S(CLZERO)] = { W_E8B, 0 }, [S(CMOV)] = { W_1D, 15 }, [S(CMPXCHG16B)] = { W_1C, 13 },
	[S(F16C)] = { W_1C, 29 }, [S(FCMOV)] = { W_1D, 15 }, [S(FMA)] = { W_1C, 12 }, [S(FXSAVE)] = { W_1D, 24 },
	[S(FXSAVE64)] = { W_1D, 24 }, [S(GFNI)] = { W_7C, 8 }, [S(INVPCID)] = { W_7B, 10 }, [S(LAHF)] = { W_E1C, 0 },
	[S(LZCNT)] = { W_E1C, 5 }, [S(MOVBE)] = { W_1C, 22 }, [S(PCLMULQDQ)] = { W_1C, 1 }, [S(PENTIUMMMX)] = { W_1D, 23 },
	[S(PKU)] = { W_7C, 3 }, [S(POPCNT)] = { W_1C, 23 }, [S(RDPID)] = { W_7C, 22 }, [S(RDRAND)] = { W_1C, 30 },
	[S(RDSEED)] = { W_7B, 18 }, [S(RDTSCP)] = { W_E1D, 27 }, [S(RDWRFSGS)] = { W_7B, 0 }, [S(SERIALIZE)] = { W_7D, 14 },
	[S(SHA)] = { W_7B, 29 }, [S(SMAP)] = { W_7B, 20 }, [S(SSE)] = { W_1D, 25 }, [S(SSEMXCSR)] = { W_1D, 25 },
	[S(SSE2)] = { W_1D, 26 }, [S(SSE2MMX)] = { W_1D, 26 }, [S(SSE3)] = { W_1C, 0 }, [S(SSE3X87)] = { W_1C, 0 },
	[S(SSE4)] = { W_1C, 19 }, [S(SSE42)] = { W_1C, 20 }, [S(SSE4A)] = { W_E1C, 6 }, [S(SSSE3)] = { W_1C, 9 },
	[S(SSSE3MMX)] = { W_1C, 9 }, [S(VAES)] = { W_7C, 9 }, [S(VPCLMULQDQ)] = { W_7C, 10 }, [S(XSAVE)] = { W_1C, 26 },
	[S(XSAVEC)] = { W_D1A, 1 }, [S(XSAVEOPT)] = { W_D1A, 0 }, [S(XSAVES)] = { W_D1A, 3 }, [S(MOVDIR)] = { W_7C, 27 },
	[S(X87)] = { W_1D, 0 },
	S3(AVX512F, W_7B, 16), [S(AVX512F_128N)] = { W_7B, 16 }, [S(AVX512F_KOP)] = { W_7B, 16 }, [S(AVX512F_SCALAR)] = { W_7B, 16 },
	S3(AVX512BW, W_7B, 30), [S(AVX512BW_128N)] = { W_7B, 30 }, [S(AVX512BW_KOP)] = { W_7B, 30 },
	S3(AVX512DQ, W_7B, 17), [S(AVX512DQ_128N)] = { W_7B, 17 }, [S(AVX512DQ_KOP)] = { W_7B, 17 }, [S(AVX512DQ_SCALAR)] = { W_7B, 17 },
	S3(AVX512CD, W_7B, 28), S3(AVX512_BF16, W_71A, 5), S3(AVX512_BITALG, W_7C, 12), S3(AVX512_FP16, W_7D, 23),
	[S(AVX512_FP16_128N)] = { W_7D, 23 }, [S(AVX512_FP16_SCALAR)] = { W_7D, 23 }, S3(AVX512_GFNI, W_7C, 8),
	S3(AVX512_IFMA, W_7B, 21), S3(AVX512_VAES, W_7C, 9), S3(AVX512_VBMI2, W_7C, 6), S3(AVX512_VBMI, W_7C, 1),
	S3(AVX512_VNNI, W_7C, 11), S3(AVX512_VP2INTERSECT, W_7D, 8), S3(AVX512_VPCLMULQDQ, W_7C, 10), S3(AVX512_VPOPCNTDQ, W_7C, 14),
	/* Never offered. */
	[S(AMD3DNOW)] = { W_NEVER, 0 }, [S(AMX_BF16)] = { W_NEVER, 0 }, [S(AMX_INT8)] = { W_NEVER, 0 }, [S(AMX_TILE)] = { W_NEVER, 0 },
	[S(AVX512ER_512)] = { W_NEVER, 0 }, [S(AVX512ER_SCALAR)] = { W_NEVER, 0 }, [S(AVX512PF_512)] = { W_NEVER, 0 },
	[S(AVX512_4FMAPS_512)] = { W_NEVER, 0 }, [S(AVX512_4FMAPS_SCALAR)] = { W_NEVER, 0 }, [S(AVX512_4VNNIW_512)] = { W_NEVER, 0 },
	[S(ENQCMD)] = { W_NEVER, 0 }, [S(FMA4)] = { W_NEVER, 0 }, [S(HRESET)] = { W_NEVER, 0 },
	[S(KEYLOCKER)] = { W_NEVER, 0 }, [S(KEYLOCKER_WIDE)] = { W_NEVER, 0 }, [S(LWP)] = { W_NEVER, 0 }, [S(MCOMMIT)] = { W_NEVER, 0 },
	[S(MONITORX)] = { W_NEVER, 0 }, [S(PADLOCK_ACE)] = { W_NEVER, 0 }, [S(PADLOCK_PHE)] = { W_NEVER, 0 },
	[S(PADLOCK_PMM)] = { W_NEVER, 0 }, [S(PADLOCK_RNG)] = { W_NEVER, 0 }, [S(PCONFIG)] = { W_NEVER, 0 }, [S(PT)] = { W_NEVER, 0 },
	[S(RDPRU)] = { W_NEVER, 0 }, [S(RTM)] = { W_NEVER, 0 }, [S(SGX)] = { W_NEVER, 0 }, [S(SGX_ENCLV)] = { W_NEVER, 0 },
	[S(SMX)] = { W_NEVER, 0 }, [S(SNP)] = { W_NEVER, 0 }, [S(SVM)] = { W_NEVER, 0 }, [S(TBM)] = { W_NEVER, 0 }, [S(TDX)] = { W_NEVER, 0 },
	[S(TSX_LDTRK)] = { W_NEVER, 0 }, [S(UINTR)] = { W_NEVER, 0 }, [S(VMFUNC)] = { W_NEVER, 0 }, [S(WAITPKG)] = { W_NEVER, 0 },
	[S(XOP)] = { W_NEVER, 0 }, [S(AMD_INVLPGB)] = { W_NEVER, 0 },
};

/* Vector lengths below 512 need AVX512VL. */
static bool needs_vl(int set)
{
	static const uint16_t vl[] = {
		S(AVX512F_128), S(AVX512F_256), S(AVX512BW_128), S(AVX512BW_256), S(AVX512DQ_128), S(AVX512DQ_256), S(AVX512CD_128),
		S(AVX512CD_256), S(AVX512_BF16_128), S(AVX512_BF16_256), S(AVX512_BITALG_128), S(AVX512_BITALG_256),
		S(AVX512_FP16_128), S(AVX512_FP16_256), S(AVX512_GFNI_128), S(AVX512_GFNI_256), S(AVX512_IFMA_128), S(AVX512_IFMA_256),
		S(AVX512_VAES_128), S(AVX512_VAES_256), S(AVX512_VBMI2_128), S(AVX512_VBMI2_256), S(AVX512_VBMI_128), S(AVX512_VBMI_256),
		S(AVX512_VNNI_128), S(AVX512_VNNI_256), S(AVX512_VP2INTERSECT_128), S(AVX512_VP2INTERSECT_256),
		S(AVX512_VPCLMULQDQ_128), S(AVX512_VPCLMULQDQ_256), S(AVX512_VPOPCNTDQ_128), S(AVX512_VPOPCNTDQ_256),
	};

	for (unsigned i = 0; i < ARRAY_SIZE(vl); i++)
		if (vl[i] == set)
			return true;
	return false;
}

static uint32_t word(const struct cpu_features *f, enum word w)
{
	switch (w) {
	case W_NONE: return ~0u;
	case W_NEVER: return 0;
	case W_1C: return f->f1_ecx;
	case W_1D: return f->f1_edx;
	case W_7B: return f->f7_ebx;
	case W_7C: return f->f7_ecx;
	case W_7D: return f->f7_edx;
	case W_71A: return f->f7_1_eax;
	case W_D1A: return f->fd_1_eax;
	case W_E1C: return f->f80000001_ecx;
	case W_E1D: return f->f80000001_edx;
	case W_E8B: return f->f80000008_ebx;
	}
	return 0;
}

static bool offered(const struct cpu_features *f, unsigned set)
{
	const struct need *n = set < ARRAY_SIZE(needs) ? &needs[set] : &needs[0];

	return n->word == W_NONE || ((word(f, n->word) >> n->bit & 1) && (!needs_vl((int)set) || f->f7_ebx >> 31));
}

bool cpuid_has_isa(const struct cpu *c, int set)
{
	/* Before KVM_SET_CPUID2 every instruction of the supported table is there, as on hardware. */
	return offered(c->feat->n ? c->feat : cpuid_host_features(), (unsigned)set);
}
