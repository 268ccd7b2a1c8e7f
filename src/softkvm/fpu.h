/*
 * x87, MMX, SSE, AVX, AVX-512 register image of a vCPU, and its conversions to the FXSAVE and XSAVE
 * formats (SDM vol. 1 ch. 13). The image is in our own layout, so that a stub can load just the
 * registers one instruction touches; the x87 part is kept in FXSAVE form, ready for fxrstor.
 */
#ifndef SOFTKVM_FPU_H
#define SOFTKVM_FPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cpu;

struct fpu {
	_Alignas(64) uint8_t zmm[32][64];       /* XMM/YMM/ZMM registers, low bytes first */
	uint64_t k[8];                          /* opmask registers */
	_Alignas(16) uint8_t fx[512];           /* FXSAVE64 layout: only the x87 part and MXCSR_MASK are meaningful here */
	uint32_t mxcsr;
	uint64_t xstate_bv;                     /* components not in their initial state (XINUSE), conservatively */
};

/* Power-on and FNINIT-like states. */
void fpu_reset(struct fpu *f);

/* KVM_GET/SET_FPU, KVM_GET/SET_XSAVE(2): standard (non-compacted) format. `len` bytes are available. */
void fpu_to_xsave(const struct cpu *c, void *area, size_t len);
int fpu_from_xsave(struct cpu *c, const void *area, size_t len);        /* -EINVAL: bad header or MXCSR */
struct kvm_fpu;
void fpu_to_kvm(const struct fpu *f, struct kvm_fpu *out);
void fpu_from_kvm(struct fpu *f, const struct kvm_fpu *in);

/*
 * The stubs that execute vector instructions belong to the vCPU (c->vec). Free with the vCPU; vec_flush()
 * whenever all decoded blocks are dropped (REQ_BLOCKS), which the vector decoder asks for when they are full.
 */
void vec_cpu_free(struct cpu *c);
void vec_flush(struct cpu *c);

/* Size and offset of XSAVE component `n` in the standard format, from the host's CPUID 0xd; false: not offered. */
bool xsave_component(unsigned n, uint32_t *offset, uint32_t *size);
/* XCR0 bits softkvm can offer on this host. */
uint64_t xsave_supported(void);
/* Bytes of a standard-format area for these components; compacted likewise. */
uint32_t xsave_size(uint64_t components);
uint32_t xsave_size_compact(uint64_t components);

#endif
