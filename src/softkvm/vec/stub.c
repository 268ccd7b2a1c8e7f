/*
 * Stubs: a few instructions around one guest instruction, executed by the host CPU on struct cpu.
 *
 *     int stub(struct cpu *rdi, void *rsi)
 *         load the registers the instruction uses     (displacements from rdi)
 *         the instruction, its memory operand rewritten to [rsi], its modrm GPRs to rax and rcx
 *         store what it wrote
 *         xor eax, eax ; ret
 *
 * A stub uses only caller-saved registers and no stack. Code lives in a memfd mapped twice, writable
 * and executable, never both at one address. The area is bounded and per vCPU; when it is full,
 * everything is thrown away together with the decoded blocks that point into it (vec_flush()).
 *
 * Where Zydis accepts bytes that the host CPU does not, or the guest has unmasked a SIMD exception, the
 * stub traps, as it does where the client unmapped the memory of the operand: stub_fault() makes it return
 * early (fault.h). Nothing was stored then.
 */
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "softkvm/fault.h"
#include "softkvm/vec/vec.h"

#define CODE_SIZE (2u << 20)
#define STUB_MAX 512            /* bytes of one stub, more than the largest */
#define OPS_MAX 16384
#define HASH_SIZE 4096

struct vec_cache {
	uint8_t *rw, *rx;
	uint32_t used, nops;
	bool full;
	struct vec_op *hash[HASH_SIZE];
	struct vec_op *ops;     /* OPS_MAX, touched as they are used */
};

/* -- what the host has -------------------------------------------------------------------------- */
struct host { bool intel; uint32_t c1, d1, b7, c7, d7, a71, ce1, de1; uint64_t x; };
static struct host host;
static pthread_once_t host_once = PTHREAD_ONCE_INIT;

static void host_init(void)
{
	uint32_t a, b = 0, c, d;

	__get_cpuid(0, &a, &b, &c, &d);
	host.intel = b == signature_INTEL_ebx;
	__get_cpuid(1, &a, &b, &host.c1, &host.d1);
	if (__get_cpuid_count(7, 0, &a, &host.b7, &host.c7, &host.d7) && a >= 1)
		__get_cpuid_count(7, 1, &host.a71, &b, &c, &d);
	__get_cpuid(0x80000001, &a, &b, &host.ce1, &host.de1);
	host.x = xsave_supported();
	if (!(host.x & XCR0_AVX))
		host.c1 &= ~(1u << 28);
	if (!(host.x & XCR0_ZMM_HI256))
		host.b7 &= ~(1u << 16);
}

static const struct host *host_get(void)
{
	pthread_once(&host_once, host_init);
	return &host;
}

bool host_avx(void) { return host_get()->c1 >> 28 & 1; }
bool host_is_intel(void) { return host_get()->intel; }
bool host_adx(void) { return host_get()->b7 >> 19 & 1; }
bool host_avx512(void) { return host_get()->b7 >> 16 & 1; }

#define ISA(x) case ZYDIS_ISA_SET_##x
#define ISA512(x) case ZYDIS_ISA_SET_##x##_128: case ZYDIS_ISA_SET_##x##_256: case ZYDIS_ISA_SET_##x##_512
static bool host_has_avx512(const struct host *h, int isa)
{
	bool f = h->b7 >> 16 & 1, vl = h->b7 >> 31, narrow;
	const char *name = ZydisISASetGetString(isa);
	size_t len = strlen(name);

	if (!f)
		return false;
	narrow = len > 4 && (!strcmp(name + len - 4, "_128") || !strcmp(name + len - 4, "_256"));
	if (narrow && !vl)
		return false;
	switch (isa) {
	ISA512(AVX512F): ISA(AVX512F_128N): ISA(AVX512F_KOP): ISA(AVX512F_SCALAR):
		return true;
	ISA512(AVX512BW): ISA(AVX512BW_128N): ISA(AVX512BW_KOP):
		return h->b7 >> 30 & 1;
	ISA512(AVX512DQ): ISA(AVX512DQ_128N): ISA(AVX512DQ_KOP): ISA(AVX512DQ_SCALAR):
		return h->b7 >> 17 & 1;
	ISA512(AVX512CD):
		return h->b7 >> 28 & 1;
	ISA512(AVX512_BF16):
		return h->a71 >> 5 & 1;
	ISA512(AVX512_BITALG):
		return h->c7 >> 12 & 1;
	ISA512(AVX512_FP16): ISA(AVX512_FP16_128N): ISA(AVX512_FP16_SCALAR):
		return h->d7 >> 23 & 1;
	ISA512(AVX512_GFNI):
		return h->c7 >> 8 & 1;
	ISA512(AVX512_IFMA):
		return h->b7 >> 21 & 1;
	ISA512(AVX512_VAES):
		return h->c7 >> 9 & 1;
	ISA512(AVX512_VBMI2):
		return h->c7 >> 6 & 1;
	ISA512(AVX512_VBMI):
		return h->c7 >> 1 & 1;
	ISA512(AVX512_VNNI):
		return h->c7 >> 11 & 1;
	ISA512(AVX512_VP2INTERSECT):
		return h->d7 >> 8 & 1;
	ISA512(AVX512_VPCLMULQDQ):
		return h->c7 >> 10 & 1;
	ISA512(AVX512_VPOPCNTDQ):
		return h->c7 >> 14 & 1;
	default:
		return false;
	}
}

bool host_has_isa(int isa)
{
	const struct host *h = host_get();
	bool avx = h->c1 >> 28 & 1;

	switch (isa) {
	ISA(X87): ISA(I86): ISA(FCMOV): ISA(PPRO): ISA(PENTIUMMMX): ISA(SSE): ISA(SSE2): ISA(SSE2MMX): ISA(SSEMXCSR):
		return true;
	ISA(SSE3): ISA(SSE3X87): return h->c1 & 1;
	ISA(PCLMULQDQ): return h->c1 >> 1 & 1;
	ISA(SSSE3): ISA(SSSE3MMX): return h->c1 >> 9 & 1;
	ISA(FMA): return avx && (h->c1 >> 12 & 1);
	ISA(SSE4): return h->c1 >> 19 & 1;
	ISA(SSE42): return h->c1 >> 20 & 1;
	ISA(AES): return h->c1 >> 25 & 1;
	ISA(AVX): return avx;
	ISA(AVXAES): return avx && (h->c1 >> 25 & 1);
	ISA(F16C): return avx && (h->c1 >> 29 & 1);
	ISA(AVX2): ISA(AVX2GATHER): return avx && (h->b7 >> 5 & 1);
	ISA(SHA): return h->b7 >> 29 & 1;
	ISA(GFNI): return h->c7 >> 8 & 1;
	ISA(AVX_GFNI): return avx && (h->c7 >> 8 & 1);
	ISA(VAES): return avx && (h->c7 >> 9 & 1);
	ISA(VPCLMULQDQ): return avx && (h->c7 >> 10 & 1);
	ISA(AVX_VNNI): return avx && (h->a71 >> 4 & 1);
	ISA(SSE4A): return h->ce1 >> 6 & 1;
	ISA(AMD3DNOW): return h->de1 >> 31 & 1;
	default: return host_has_avx512(h, isa);
	}
}

/* -- faults in stubs ---------------------------------------------------------------------------- */
static __thread uint32_t fault_mxcsr;

static bool stub_fault(struct cpu *c, struct fault *f)
{
	const struct vec_cache *v = c->vec;
	mcontext_t *m = &f->uc->uc_mcontext;

	if (!v || f->pc - (uintptr_t)v->rx >= CODE_SIZE || ((f->sig == SIGSEGV || f->sig == SIGBUS) && !f->client))
		return false;
	fault_mxcsr = m->fpregs->mxcsr;
	m->fpregs->mxcsr = 0x1f80;
	m->gregs[REG_RIP] = (greg_t)(uintptr_t)v->rx;   /* the `ret` at its start */
	m->gregs[REG_RAX] = f->client ? STUB_NO_MEMORY : f->sig == SIGFPE ? STUB_FP_FAULT : STUB_UNDEFINED;
	return true;
}

enum stub_end stub_try(struct cpu *c, const struct vec_op *op, void *mem, uint32_t *mxcsr)
{
	int r = op->code(c, mem);

	if (likely(!r)) {
		((struct vec_op *)(uintptr_t)op)->proven = true;
		return STUB_DONE;
	}
	/* The stub was left half-way. */
	__asm__ volatile("fnclex; fninit; emms" ::: "memory");
	if (host_avx())
		__asm__ volatile("vzeroupper");
	*mxcsr = fault_mxcsr;
	return (enum stub_end)r;
}

enum stub_end stub_run(struct cpu *c, const struct vec_op *op, void *mem)
{
	uint32_t mxcsr;

	return stub_try(c, op, mem, &mxcsr);
}

void stub_refuse(struct cpu *c, enum stub_end end)
{
	if (end == STUB_NO_MEMORY)
		fault_client(c);
	cpu_ud(c);
}

/* -- the cache ---------------------------------------------------------------------------------- */
static int cache_map(struct vec_cache *v)
{
	int fd = memfd_create("softkvm-stubs", MFD_CLOEXEC);

	if (fd < 0)
		return -errno;
	if (ftruncate(fd, CODE_SIZE) == 0) {
		v->rw = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		v->rx = mmap(NULL, CODE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	}
	close(fd);
	v->ops = mmap(NULL, OPS_MAX * sizeof *v->ops, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return v->rw && v->rw != MAP_FAILED && v->rx && v->rx != MAP_FAILED && v->ops != MAP_FAILED ? 0 : -ENOMEM;
}

static void cache_clear(struct vec_cache *v)
{
	memset(v->hash, 0, sizeof v->hash);
	v->nops = 0;
	v->full = false;
	v->rw[0] = 0xc3;
	v->used = 16;
}

static void cache_free(struct vec_cache *v)
{
	if (v->rw && v->rw != MAP_FAILED)
		munmap(v->rw, CODE_SIZE);
	if (v->rx && v->rx != MAP_FAILED)
		munmap(v->rx, CODE_SIZE);
	if (v->ops && v->ops != MAP_FAILED)
		munmap(v->ops, OPS_MAX * sizeof *v->ops);
	free(v);
}

static struct vec_cache *cache_get(struct cpu *c)
{
	struct vec_cache *v = c->vec;

	if (v)
		return v;
	v = calloc(1, sizeof *v);
	if (!v)
		return NULL;
	if (cache_map(v) < 0) {
		cache_free(v);
		return NULL;
	}
	cache_clear(v);
	fault_serve(FAULT_STUB, stub_fault);
	return c->vec = v;
}

void vec_cpu_free(struct cpu *c)
{
	if (c->vec)
		cache_free(c->vec);
	c->vec = NULL;
}

void vec_flush(struct cpu *c)
{
	if (c->vec && c->vec->full)
		cache_clear(c->vec);
}

/* -- emission ----------------------------------------------------------------------------------- */
struct emit { uint8_t *p; };

static void e1(struct emit *e, unsigned b) { *e->p++ = (uint8_t)b; }
static void en(struct emit *e, const void *b, unsigned n) { memcpy(e->p, b, n); e->p += n; }
/* modrm and disp32 of [rdi + off] */
static void e_rdi(struct emit *e, unsigned reg, size_t off)
{
	uint32_t o = (uint32_t)off;

	e1(e, 0x80 | (reg & 7) << 3 | 7);
	en(e, &o, 4);
}

static size_t off_v(unsigned n) { return offsetof(struct cpu, fpu.zmm) + 64 * n; }
static size_t off_mm(unsigned n) { return offsetof(struct cpu, fpu.fx) + FX_ST + 16 * n; }

/* MOVUPS between vector register and image; width 0: legacy encoding. */
static void e_vec(struct emit *e, unsigned n, unsigned width, bool store)
{
	if (width == 64) {
		e1(e, 0x62);
		e1(e, (n & 8 ? 0 : 0x80) | 0x60 | (n & 16 ? 0 : 0x10) | 1);
		e1(e, 0x7c);
		e1(e, 0x48);
	} else if (width) {
		e1(e, 0xc5);
		e1(e, (n & 8 ? 0 : 0x80) | 0x78 | (width == 32 ? 4 : 0));
	} else {
		if (n & 8)
			e1(e, 0x44);
		e1(e, 0x0f);
	}
	e1(e, 0x10 + store);
	e_rdi(e, n, off_v(n));
}

static void e_k(struct emit *e, unsigned n, bool store)
{
	if (host_has_isa(ZYDIS_ISA_SET_AVX512BW_KOP))
		en(e, (const uint8_t[]){ 0xc4, 0xe1, 0xf8 }, 3);
	else
		en(e, (const uint8_t[]){ 0xc5, 0xf8 }, 2);
	e1(e, 0x90 + store);
	e_rdi(e, n, offsetof(struct cpu, fpu.k) + 8 * n);
}

static void e_mm(struct emit *e, unsigned n, bool store)
{
	e1(e, 0x0f);
	e1(e, store ? 0x7f : 0x6f);
	e_rdi(e, n, off_mm(n));
}

static void e_gpr(struct emit *e, unsigned hostreg, unsigned guest, bool store)
{
	e1(e, 0x48);
	e1(e, store ? 0x89 : 0x8b);
	e_rdi(e, hostreg, offsetof(struct cpu, gpr) + 8 * guest);
}

static unsigned guest_of(const struct vec_shape *s, unsigned hostreg)
{
	return hostreg == 0 ? s->greg : hostreg == 1 ? s->grm : R_RDX;
}

/* fxsave64 / fxrstor64 of the image */
static void e_fx(struct emit *e, bool restore)
{
	en(e, (const uint8_t[]){ 0x48, 0x0f, 0xae }, 3);
	e_rdi(e, restore, offsetof(struct cpu, fpu.fx));
}

static void e_loads(struct emit *e, const struct vec_shape *s)
{
	if (s->fl_in || s->fl_out) {
		en(e, (const uint8_t[]){ 0x66, 0x8b }, 2);              /* mov ax, aflags */
		e_rdi(e, 0, offsetof(struct cpu, aflags));
		en(e, (const uint8_t[]){ 0x04, 0x7f, 0x9e }, 3);        /* add al, 0x7f ; sahf */
	}
	if (s->x87)
		e_fx(e, true);
	for (unsigned n = 0; n < 3; n++)
		if (s->g_in >> n & 1)
			e_gpr(e, n, guest_of(s, n), false);
	for (unsigned n = 0; n < 32; n++)
		if (s->v_in >> n & 1)
			e_vec(e, n, s->width && n >= 16 ? 64 : s->width, false);
	for (unsigned n = 0; n < 8; n++) {
		if (s->k_in >> n & 1)
			e_k(e, n, false);
		if (s->mm_in >> n & 1)
			e_mm(e, n, false);
	}
}

static void e_stores(struct emit *e, const struct vec_shape *s)
{
	unsigned w = s->width ? (host_avx512() ? 64 : 32) : 0;

	for (unsigned n = 0; n < 32; n++)
		if (s->v_out >> n & 1)
			e_vec(e, n, w, true);
	for (unsigned n = 0; n < 8; n++) {
		if (s->k_out >> n & 1)
			e_k(e, n, true);
		if (s->mm_out >> n & 1)
			e_mm(e, n, true);
	}
	for (unsigned n = 0; n < 3; n++)
		if (s->g_out >> n & 1)
			e_gpr(e, n, guest_of(s, n), true);
	if (s->fl_out) {
		en(e, (const uint8_t[]){ 0x9f, 0x0f, 0x90, 0xc0, 0x66, 0x89 }, 6);      /* lahf ; seto al ; mov aflags, ax */
		e_rdi(e, 0, offsetof(struct cpu, aflags));
	}
	if (s->x87) {
		e_fx(e, false);
		en(e, (const uint8_t[]){ 0xdb, 0xe3 }, 2);              /* fninit */
	}
	if (s->mm_in || s->mm_out)
		en(e, (const uint8_t[]){ 0x0f, 0x77 }, 2);              /* emms */
	if (w)
		en(e, (const uint8_t[]){ 0xc5, 0xf8, 0x77 }, 3);        /* vzeroupper */
	en(e, (const uint8_t[]){ 0x31, 0xc0, 0xc3 }, 3);
}

static void stub_emit(struct vec_cache *v, struct vec_op *op)
{
	struct emit e = { v->rw + v->used };

	e_loads(&e, &op->s);
	en(&e, op->s.code, op->s.len);
	e_stores(&e, &op->s);
	op->code = (int (*)(struct cpu *, void *))(void *)(v->rx + v->used);
	v->used = ALIGN_UP((uint32_t)(e.p - v->rw), 16u);
}

static uint32_t op_hash(const struct vec_op *op)
{
	const uint8_t *p = (const uint8_t *)&op->s;
	uint32_t h = op->flags * 31u + op->size;

	for (size_t n = 0; n < sizeof op->s; n++)
		h = (h ^ p[n]) * 16777619u;
	return (h ^ h >> 15) % HASH_SIZE;
}

static bool op_same(const struct vec_op *a, const struct vec_op *b)
{
	return a->flags == b->flags && a->size == b->size && a->align == b->align && a->cls == b->cls && a->mask == b->mask &&
	       a->esize == b->esize && a->lanes == b->lanes && a->dst_mm == b->dst_mm && a->fop == b->fop && !memcmp(&a->s, &b->s, sizeof a->s);
}

struct vec_op *stub_get(struct cpu *c, const struct vec_op *want)
{
	struct vec_cache *v = cache_get(c);
	uint32_t h = op_hash(want);
	struct vec_op *op;

	if (!v)
		return NULL;
	for (op = v->hash[h]; op; op = op->next)
		if (op_same(op, want))
			return op;
	if (v->nops == OPS_MAX || CODE_SIZE - v->used < STUB_MAX) {
		v->full = true;
		return NULL;
	}
	op = &v->ops[v->nops++];
	*op = *want;
	stub_emit(v, op);
	op->next = v->hash[h];
	v->hash[h] = op;
	return op;
}
