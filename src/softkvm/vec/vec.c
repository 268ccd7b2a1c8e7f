/* Decoding of vector instructions into ops, and the handlers that run their stubs. */
#include <xmmintrin.h>

#include "softkvm/vec/vec.h"

#define HOST_MXCSR 0x1f80u
#define MX_FLAGS 0x3fu
#define MX_CONTROL 0xffc0u      /* all but the flags and AMD's MM */
#define MX_MM (1u << 17)

/* -- may it run? -------------------------------------------------------------------------------- */
void vec_check_slow(struct cpu *c, enum vec_class cls)
{
	switch (cls) {
	case VC_SSE:
		if ((c->cr0 & CR0_EM) || !(c->cr4 & CR4_OSFXSR))
			cpu_ud(c);
		break;
	case VC_MMX:
		if (c->cr0 & CR0_EM)
			cpu_ud(c);
		break;
	case VC_VEX:
	case VC_EVEX:
		if (!(c->cr4 & CR4_OSXSAVE) || (c->xcr0 & 6) != 6 || c->vm86 || c->real)
			cpu_ud(c);
		if (cls == VC_EVEX && (c->xcr0 & 0xe6) != 0xe6)
			cpu_ud(c);
		break;
	default:
		return;
	}
	if (c->cr0 & CR0_TS)
		cpu_raise(c, EXC_NM);
}

static inline void check(struct cpu *c, enum vec_class cls)
{
	if (cls == VC_SSE)
		vec_check_sse(c);
	else if (cls == VC_VEX)
		vec_check_vex(c);
	else
		vec_check_slow(c, cls);
}

/*
 * Legacy SSE operands and aligned moves: #GP(0), unless AMD's misaligned mode is on, or the mask selects no element (as an AMD
 * processor was seen to do; the manuals only say that what is masked out does not fault). True: through the bounce buffer.
 */
static bool misaligned(struct cpu *c, const struct vec_op *op)
{
	if (!(op->flags & VO_MM ? c->fpu.mxcsr & MX_MM : mask_is_empty(c, op)))
		cpu_gp(c, 0);
	return true;
}

/* -- MXCSR -------------------------------------------------------------------------------------- */
static void run_plain(struct cpu *c, const struct vec_op *op, void *mem)
{
	enum stub_end end = stub_run(c, op, mem);

	if (unlikely(end != STUB_DONE))
		stub_refuse(c, end);
}

/* One run under the guest's control word. An unmasked exception leaves the stub before it stores anything. */
static __attribute__((noinline)) void run_with_control(struct cpu *c, const struct vec_op *op, void *mem)
{
	uint32_t mx = c->fpu.mxcsr, flags;
	enum stub_end end;

	_mm_setcsr(mx & MX_CONTROL & ~MX_FLAGS);
	end = stub_try(c, op, mem, &flags);
	if (end == STUB_DONE)
		flags = _mm_getcsr();
	_mm_setcsr(HOST_MXCSR);
	if (end == STUB_UNDEFINED || end == STUB_NO_MEMORY)
		stub_refuse(c, end);
	c->fpu.mxcsr = mx | (flags & MX_FLAGS);
	if (end == STUB_FP_FAULT)
		cpu_raise(c, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
}

/*
 * With all exceptions masked and default rounding, as nearly always, the host's register is left alone as
 * long as its flags are a subset of the guest's: then what it holds afterwards is what the guest's would.
 */
static inline void run_op(struct cpu *c, const struct vec_op *op, void *mem)
{
	uint32_t mx = c->fpu.mxcsr;

	if (!(op->flags & VO_FP)) {
		run_plain(c, op, mem);
	} else if (likely((mx & MX_CONTROL) == HOST_MXCSR || (mx & MX_CONTROL & ~MX_FLAGS) == HOST_MXCSR)) {
		uint32_t h = _mm_getcsr();

		if (unlikely((h & MX_CONTROL) != HOST_MXCSR || (h & MX_FLAGS & ~mx)))
			_mm_setcsr(HOST_MXCSR);
		run_plain(c, op, mem);
		c->fpu.mxcsr = mx | (_mm_getcsr() & MX_FLAGS);
	} else {
		run_with_control(c, op, mem);
	}
}

/* -- handlers ----------------------------------------------------------------------------------- */
static __attribute__((noinline)) void load_slow(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin)
{
	_Alignas(64) uint8_t buf[64];

	if (op->flags & (VO_KMASK | VO_VMASK))
		mask_load(c, i, op, lin, buf);
	else
		mem_read(c, lin, buf, op->size);
	run_op(c, op, buf);
}

static __attribute__((noinline)) void store_slow(struct cpu *c, const struct insn *i, const struct vec_op *op, uint64_t lin)
{
	_Alignas(64) uint8_t buf[64] = { 0 };
	uint32_t mx = c->fpu.mxcsr, after;

	if (op->flags & (VO_KMASK | VO_VMASK))
		mask_probe(c, i, op, lin);
	else
		mem_probe(c, lin, op->size, ACC_WRITE);
	run_op(c, op, buf);
	after = c->fpu.mxcsr;
	c->fpu.mxcsr = mx;
	if (op->flags & (VO_KMASK | VO_VMASK))
		mask_store(c, i, op, lin, buf);
	else
		mem_write(c, lin, buf, op->size);
	c->fpu.mxcsr = after;
}

static inline void exec_rr(struct cpu *c, const struct insn *i, enum vec_class cls)
{
	check(c, cls);
	run_op(c, i->ptr, NULL);
}

static inline void exec_load(struct cpu *c, const struct insn *i, enum vec_class cls)
{
	const struct vec_op *op = i->ptr;
	uint64_t lin;
	void *p;

	check(c, cls);
	if (vec_misaligned_first(c, i, op->align))
		misaligned(c, op);
	if (unlikely(mask_by_element(c, i, op))) {
		load_slow(c, i, op, 0);
		return;
	}
	lin = insn_lin(c, i, op->size, ACC_READ);
	p = tlb_hit_r(c, lin, op->size);
	if (unlikely((lin & op->align) && misaligned(c, op)))
		p = NULL;
	if (likely(p))
		run_op(c, op, p);
	else
		load_slow(c, i, op, lin);
}

static inline void exec_store(struct cpu *c, const struct insn *i, enum vec_class cls)
{
	const struct vec_op *op = i->ptr;
	uint64_t lin;
	void *p;

	check(c, cls);
	if (vec_misaligned_first(c, i, op->align))
		misaligned(c, op);
	if (unlikely(mask_by_element(c, i, op))) {
		store_slow(c, i, op, 0);
		return;
	}
	lin = insn_lin(c, i, op->size, ACC_WRITE);
	p = tlb_hit_w(c, lin, op->size);
	if (unlikely((lin & op->align) && misaligned(c, op)))
		p = NULL;
	if (likely(p && !(op->flags & VO_FP)))
		run_plain(c, op, p);
	else
		store_slow(c, i, op, lin);
}

static void sse_rr(struct cpu *c, const struct insn *i) { exec_rr(c, i, VC_SSE); }
static void sse_load(struct cpu *c, const struct insn *i) { exec_load(c, i, VC_SSE); }
static void sse_store(struct cpu *c, const struct insn *i) { exec_store(c, i, VC_SSE); }
static void vex_rr(struct cpu *c, const struct insn *i) { exec_rr(c, i, VC_VEX); }
static void vex_load(struct cpu *c, const struct insn *i) { exec_load(c, i, VC_VEX); }
static void vex_store(struct cpu *c, const struct insn *i) { exec_store(c, i, VC_VEX); }
static void evex_rr(struct cpu *c, const struct insn *i) { exec_rr(c, i, VC_EVEX); }
static void evex_load(struct cpu *c, const struct insn *i) { exec_load(c, i, VC_EVEX); }
static void evex_store(struct cpu *c, const struct insn *i) { exec_store(c, i, VC_EVEX); }

static insn_fn *const handlers[][3] = {
	[VC_SSE] = { sse_rr, sse_load, sse_store },
	[VC_VEX] = { vex_rr, vex_load, vex_store },
	[VC_EVEX] = { evex_rr, evex_load, evex_store },
};

/* With MMX registers: what may fault comes first, then the x87 state becomes MMX state. */
static void mmx_exec(struct cpu *c, const struct insn *i)
{
	const struct vec_op *op = i->ptr;
	_Alignas(64) uint8_t buf[64] = { 0 };
	uint64_t lin = 0;

	if (op->cls == VC_MMX)
		vec_check_slow(c, VC_MMX);
	else
		vec_check_sse(c);
	x87_check_pending(c);
	if (op->size) {
		if (vec_misaligned_first(c, i, op->align))
			misaligned(c, op);
		lin = insn_lin(c, i, op->size, op->flags & VO_STORE ? ACC_WRITE : ACC_READ);
		if (unlikely(lin & op->align))
			misaligned(c, op);
		if (op->flags & VO_STORE)
			mem_probe(c, lin, op->size, ACC_WRITE);
		else
			mem_read(c, lin, buf, op->size);
	}
	if (op->flags & VO_MMX)
		x87_mmx_enter(&c->fpu);
	run_op(c, op, buf);
	if (op->dst_mm < 8)
		memset(c->fpu.fx + FX_ST + 16 * op->dst_mm + 8, 0xff, 2);
	if (op->flags & VO_STORE)
		mem_write(c, lin, buf, op->size);
}

static void op_emms(struct cpu *c, const struct insn *i)
{
	vec_check_slow(c, VC_MMX);
	x87_check_pending(c);
	x87_mmx_enter(&c->fpu);
	c->fpu.fx[FX_FTW] = 0;
}

static void zero_uppers(struct cpu *c, unsigned from)
{
	unsigned n = c->code_bits == 64 ? 16 : 8;

	vec_check_vex(c);
	for (unsigned r = 0; r < n; r++)
		memset(c->fpu.zmm[r] + from, 0, 64 - from);
}

static void op_vzeroupper(struct cpu *c, const struct insn *i) { zero_uppers(c, 16); }
static void op_vzeroall(struct cpu *c, const struct insn *i) { zero_uppers(c, 0); }
static void op_hint(struct cpu *c, const struct insn *i) { }
static void op_fence(struct cpu *c, const struct insn *i) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static void op_movnti(struct cpu *c, const struct insn *i)
{
	if (i->aux == 8)
		mem_st64(c, insn_lin(c, i, 8, ACC_WRITE), REG64(c, i->src));
	else
		mem_st32(c, insn_lin(c, i, 4, ACC_WRITE), REG32(c, i->src));
}

/* The stubs are full: have all blocks dropped and come again. */
static void op_again(struct cpu *c, const struct insn *i)
{
	cpu_request(c, REQ_BLOCKS);
	cpu_unwind(c, UNWIND_RETRY);
}

void vec_decode_full(struct insn *i)
{
	i->fn = op_again;
	i->flags |= IF_END;
}

/* -- decoding ----------------------------------------------------------------------------------- */
static bool unaligned_form(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_MOVUPS: case ZYDIS_MNEMONIC_MOVUPD: case ZYDIS_MNEMONIC_MOVDQU: case ZYDIS_MNEMONIC_LDDQU:
	case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_PCMPISTRI:
	case ZYDIS_MNEMONIC_PCMPISTRM:
		return true;
	default:
		return false;
	}
}

static bool aligned_move(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_MOVAPS: case ZYDIS_MNEMONIC_MOVAPD: case ZYDIS_MNEMONIC_MOVDQA: case ZYDIS_MNEMONIC_MOVNTDQ:
	case ZYDIS_MNEMONIC_MOVNTPS: case ZYDIS_MNEMONIC_MOVNTPD: case ZYDIS_MNEMONIC_MOVNTDQA:
	case ZYDIS_MNEMONIC_VMOVAPS: case ZYDIS_MNEMONIC_VMOVAPD: case ZYDIS_MNEMONIC_VMOVDQA: case ZYDIS_MNEMONIC_VMOVDQA32:
	case ZYDIS_MNEMONIC_VMOVDQA64: case ZYDIS_MNEMONIC_VMOVNTDQ: case ZYDIS_MNEMONIC_VMOVNTPS: case ZYDIS_MNEMONIC_VMOVNTPD:
	case ZYDIS_MNEMONIC_VMOVNTDQA:
		return true;
	default:
		return false;
	}
}

static bool is_fp(const struct decoded *d)
{
	static const char *const by_name[] = { "vrcp", "vrsqrt", "rcp", "rsqrt", "vfpclass", "cvt", "vcvt" };
	const char *name = ZydisMnemonicGetString(d->z.mnemonic);

	switch (d->z.meta.exception_class) {
	case ZYDIS_EXCEPTION_CLASS_SSE2: case ZYDIS_EXCEPTION_CLASS_SSE3: case ZYDIS_EXCEPTION_CLASS_AVX2:
	case ZYDIS_EXCEPTION_CLASS_AVX3: case ZYDIS_EXCEPTION_CLASS_AVX11: case ZYDIS_EXCEPTION_CLASS_E2:
	case ZYDIS_EXCEPTION_CLASS_E2NF: case ZYDIS_EXCEPTION_CLASS_E3: case ZYDIS_EXCEPTION_CLASS_E3NF:
	case ZYDIS_EXCEPTION_CLASS_E11: case ZYDIS_EXCEPTION_CLASS_E11NF:
		return true;
	default:
		break;
	}
	for (unsigned n = 0; n < ARRAY_SIZE(by_name); n++)
		if (!strncmp(name, by_name[n], strlen(by_name[n])))
			return true;
	return false;
}

static bool no_suppression(const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_VDBPSADBW: case ZYDIS_MNEMONIC_VGF2P8AFFINEQB: case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB:
	case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
		return true;            /* E4NF, whatever Zydis says: the mask is by other elements than those in memory */
	default:
		break;
	}
	switch (d->z.meta.exception_class) {
	case ZYDIS_EXCEPTION_CLASS_E1NF: case ZYDIS_EXCEPTION_CLASS_E2NF: case ZYDIS_EXCEPTION_CLASS_E3NF:
	case ZYDIS_EXCEPTION_CLASS_E4NF: case ZYDIS_EXCEPTION_CLASS_E5NF: case ZYDIS_EXCEPTION_CLASS_E6NF:
	case ZYDIS_EXCEPTION_CLASS_E9NF: case ZYDIS_EXCEPTION_CLASS_E10NF: case ZYDIS_EXCEPTION_CLASS_E11NF:
		return true;
	default:
		return false;
	}
}

static void shape_gpr(struct vec_shape *s, const ZydisDecodedOperand *o, bool in, bool out)
{
	unsigned guest = insn_reg_off(o->reg.value) / 8, hostreg;

	if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
		hostreg = 0;
		s->greg = (uint8_t)guest;
	} else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
		hostreg = 1;
		s->grm = (uint8_t)guest;
	} else {
		hostreg = guest & 3;
		if (hostreg == 1)
			s->grm = R_RCX;
	}
	s->g_in |= in << hostreg;
	s->g_out |= out << hostreg;
}

static void shape_vector(struct vec_op *op, const struct decoded *d, const ZydisDecodedOperand *o, ZydisRegisterClass k,
			 bool in, bool out)
{
	struct vec_shape *s = &op->s;
	unsigned n = (unsigned)ZydisRegisterGetId(o->reg.value) & 31;
	bool merge = d->z.avx.mask.reg > ZYDIS_REGISTER_K0;

	if (in || d->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY || merge)
		s->v_in |= 1u << n;
	if (out)
		s->v_out |= 1u << n;
	if (d->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		s->width = MAX(s->width, k == ZYDIS_REGCLASS_ZMM ? 64 : k == ZYDIS_REGCLASS_YMM ? 32 : 16);
}

/* One operand into the shape. False: of a kind that no stub can have. */
static bool shape_operand(struct vec_op *op, const struct decoded *d, const ZydisDecodedOperand *o)
{
	bool in = o->actions & ZYDIS_OPERAND_ACTION_MASK_READ, out = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	struct vec_shape *s = &op->s;
	ZydisRegisterClass k;
	unsigned n;

	if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return true;
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN || op->size || o->size > 512 || o->size < 8)
			return false;
		op->size = (uint8_t)(o->size / 8);
		op->esize = (uint8_t)(o->element_size / 8);
		op->flags |= (in ? VO_LOAD : 0) | (out ? VO_STORE : 0);
		return !(in && out);
	}
	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
		return false;
	k = ZydisRegisterGetClass(o->reg.value);
	n = (unsigned)ZydisRegisterGetId(o->reg.value) & 7;
	switch (k) {
	case ZYDIS_REGCLASS_XMM: case ZYDIS_REGCLASS_YMM: case ZYDIS_REGCLASS_ZMM:
		shape_vector(op, d, o, k, in, out);
		return true;
	case ZYDIS_REGCLASS_MMX:
		op->flags |= VO_MMX;
		s->mm_in |= 1u << n;
		if (out) {
			s->mm_out |= 1u << n;
			op->dst_mm = (uint8_t)n;
		}
		return true;
	case ZYDIS_REGCLASS_MASK:
		if (o->encoding == ZYDIS_OPERAND_ENCODING_MASK && n == 0)
			return true;
		s->k_in |= 1u << n;
		if (out)
			s->k_out |= 1u << n;
		return true;
	case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
		shape_gpr(s, o, in, out);
		return true;
	case ZYDIS_REGCLASS_FLAGS:
		s->fl_in |= in;
		s->fl_out |= out;
		return true;
	default:
		return o->reg.value == ZYDIS_REGISTER_MXCSR;
	}
}

static void set_alignment(struct vec_op *op, const struct decoded *d)
{
	ZydisMnemonic m = d->z.mnemonic;

	if (aligned_move(m)) {
		op->align = op->size ? op->size - 1 : 0;
	} else if (d->z.meta.isa_set == ZYDIS_ISA_SET_SHA && !host_is_intel()) {
		op->align = 0;          /* AMD's manual and CPUs ask for no alignment here */
	} else if (d->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && op->size == 16 && !unaligned_form(m)) {
		op->align = 15;
		op->flags |= VO_MM;
	}
}

/* What the mask's bits stand for in memory, where that is not an element as Zydis has it. */
static unsigned masked_size(const struct vec_op *op, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_VEXTRACTF32X4: case ZYDIS_MNEMONIC_VEXTRACTI32X4: case ZYDIS_MNEMONIC_VEXTRACTF32X8:
	case ZYDIS_MNEMONIC_VEXTRACTI32X8: case ZYDIS_MNEMONIC_VBROADCASTF32X2: case ZYDIS_MNEMONIC_VBROADCASTI32X2:
	case ZYDIS_MNEMONIC_VBROADCASTF32X4: case ZYDIS_MNEMONIC_VBROADCASTI32X4: case ZYDIS_MNEMONIC_VBROADCASTF32X8:
	case ZYDIS_MNEMONIC_VBROADCASTI32X8:
		return 4;
	case ZYDIS_MNEMONIC_VEXTRACTF64X2: case ZYDIS_MNEMONIC_VEXTRACTI64X2: case ZYDIS_MNEMONIC_VEXTRACTF64X4:
	case ZYDIS_MNEMONIC_VEXTRACTI64X4: case ZYDIS_MNEMONIC_VBROADCASTF64X2: case ZYDIS_MNEMONIC_VBROADCASTI64X2:
	case ZYDIS_MNEMONIC_VBROADCASTF64X4: case ZYDIS_MNEMONIC_VBROADCASTI64X4:
		return 8;
	default:
		return op->esize;
	}
}

static void set_mask(struct vec_op *op, const struct decoded *d)
{
	unsigned k = (unsigned)ZydisRegisterGetId(d->z.avx.mask.reg), bits = d->z.avx.vector_length;
	const char *isa = ZydisISASetGetString(d->z.meta.isa_set);
	const ZydisDecodedOperand *reg = d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER ? &d->op[0] : &d->op[2];

	if (!op->size || !op->esize || d->z.avx.mask.reg <= ZYDIS_REGISTER_K0 || d->z.avx.mask.reg > ZYDIS_REGISTER_K7 ||
	    (no_suppression(d) && !(op->flags & VO_STORE)))
		return;
	op->flags |= no_suppression(d) ? VO_KMASK | VO_WHOLE : VO_KMASK;
	op->mask = (uint8_t)k;
	op->esize = (uint8_t)masked_size(op, d);
	op->lanes = (uint8_t)(bits / 8 / op->esize);
	if (strstr(isa, "SCALAR"))
		op->lanes = 1;
	else if (op->flags & VO_STORE)
		op->lanes = op->size / op->esize;
	else if (ZydisRegisterGetClass(reg->reg.value) != ZYDIS_REGCLASS_MASK && reg->element_size)
		op->lanes = MIN(op->lanes, (uint8_t)(bits / reg->element_size));
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_VCOMPRESSPS: case ZYDIS_MNEMONIC_VCOMPRESSPD: case ZYDIS_MNEMONIC_VPCOMPRESSB:
	case ZYDIS_MNEMONIC_VPCOMPRESSW: case ZYDIS_MNEMONIC_VPCOMPRESSD: case ZYDIS_MNEMONIC_VPCOMPRESSQ:
	case ZYDIS_MNEMONIC_VEXPANDPS: case ZYDIS_MNEMONIC_VEXPANDPD: case ZYDIS_MNEMONIC_VPEXPANDB:
	case ZYDIS_MNEMONIC_VPEXPANDW: case ZYDIS_MNEMONIC_VPEXPANDD: case ZYDIS_MNEMONIC_VPEXPANDQ:
		op->flags |= VO_DENSE;
		break;
	default:
		break;
	}
}

static void set_vmask(struct vec_op *op, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_VMASKMOVPS: case ZYDIS_MNEMONIC_VMASKMOVPD:
	case ZYDIS_MNEMONIC_VPMASKMOVD: case ZYDIS_MNEMONIC_VPMASKMOVQ:
		op->flags |= VO_VMASK;
		op->mask = (uint8_t)ZydisRegisterGetId(d->op[1].reg.value);
		op->esize = d->z.mnemonic == ZYDIS_MNEMONIC_VMASKMOVPS || d->z.mnemonic == ZYDIS_MNEMONIC_VPMASKMOVD ? 4 : 8;
		break;
	default:
		break;
	}
}

/* A number in memory to an integer in a general-purpose register: what names no vector register and is a vector instruction nevertheless. */
static bool memory_to_integer(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_CVTSS2SI: case ZYDIS_MNEMONIC_CVTTSS2SI: case ZYDIS_MNEMONIC_CVTSD2SI: case ZYDIS_MNEMONIC_CVTTSD2SI:
	case ZYDIS_MNEMONIC_VCVTSS2SI: case ZYDIS_MNEMONIC_VCVTTSS2SI: case ZYDIS_MNEMONIC_VCVTSD2SI: case ZYDIS_MNEMONIC_VCVTTSD2SI:
	case ZYDIS_MNEMONIC_VCVTSS2USI: case ZYDIS_MNEMONIC_VCVTTSS2USI: case ZYDIS_MNEMONIC_VCVTSD2USI: case ZYDIS_MNEMONIC_VCVTTSD2USI:
	case ZYDIS_MNEMONIC_VCVTSH2SI: case ZYDIS_MNEMONIC_VCVTTSH2SI: case ZYDIS_MNEMONIC_VCVTSH2USI: case ZYDIS_MNEMONIC_VCVTTSH2USI:
		return true;
	default:
		return false;
	}
}

bool vec_op_build(struct vec_op *op, const struct decoded *d)
{
	struct vec_shape *s = &op->s;

	memset(op, 0, sizeof *op);
	op->dst_mm = 0xff;
	for (unsigned n = 0; n < d->z.operand_count; n++)
		if (!shape_operand(op, d, &d->op[n]))
			return false;
	if (!s->v_in && !s->v_out && !s->mm_in && !s->k_in && !s->k_out && !memory_to_integer(d->z.mnemonic))
		return false;
	if (d->z.mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTD || d->z.mnemonic == ZYDIS_MNEMONIC_VP2INTERSECTQ)
		s->k_out |= s->k_out | (s->k_out & 0x55) << 1 | (s->k_out & 0xaa) >> 1;
	if (!stub_rewrite(s, d))
		return false;
	if (is_fp(d))
		op->flags |= VO_FP;
	switch (d->z.encoding) {
	case ZYDIS_INSTRUCTION_ENCODING_VEX:
		op->cls = s->k_in | s->k_out ? VC_EVEX : VC_VEX;
		break;
	case ZYDIS_INSTRUCTION_ENCODING_EVEX:
		op->cls = VC_EVEX;
		break;
	default:
		op->cls = op->flags & VO_MMX && !s->v_in && !s->v_out ? VC_MMX : VC_SSE;
		break;
	}
	set_alignment(op, d);
	set_mask(op, d);
	set_vmask(op, d);
	return true;
}

bool vec_op_unproven(const struct insn *i)
{
	for (unsigned n = 0; n < ARRAY_SIZE(handlers); n++)
		for (unsigned k = 0; k < 3; k++)
			if (i->fn == handlers[n][k])
				return !((const struct vec_op *)i->ptr)->proven;
	return false;
}

static bool misc_decode(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_EMMS: i->fn = op_emms; return true;
	case ZYDIS_MNEMONIC_FEMMS: i->fn = op_emms; return host_has_isa(ZYDIS_ISA_SET_AMD3DNOW);
	case ZYDIS_MNEMONIC_VZEROUPPER: i->fn = op_vzeroupper; return true;
	case ZYDIS_MNEMONIC_VZEROALL: i->fn = op_vzeroall; return true;
	case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_MFENCE: i->fn = op_fence; return true;
	case ZYDIS_MNEMONIC_PREFETCH: case ZYDIS_MNEMONIC_PREFETCHNTA: case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1: case ZYDIS_MNEMONIC_PREFETCHT2: case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1: i->fn = op_hint; return true;
	case ZYDIS_MNEMONIC_MOVNTI:
		insn_set_mem(i, d, &d->op[0]);
		i->src = insn_reg_off(d->op[1].reg.value);
		i->aux = (uint8_t)(d->op[0].size / 8);
		i->fn = op_movnti;
		return true;
	default:
		return false;
	}
}

bool vec_decode(struct insn *i, const struct decoded *d)
{
	struct vec_op want, *op;

	if (xsave_decode(i, d) || misc_decode(i, d))
		return true;
	if (!host_has_isa(d->z.meta.isa_set))
		return false;
	if (x87_decode(i, d) || mask_decode(i, d))
		return true;
	if (!vec_op_build(&want, d))
		return false;
	for (unsigned n = 0; n < d->z.operand_count_visible; n++)
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
			insn_set_mem(i, d, &d->op[n]);
	if (hot_decode(i, d, &want))
		return true;
	op = stub_get((struct cpu *)d->cpu, &want);
	if (!op) {
		vec_decode_full(i);
		return true;
	}
	i->ptr = op;
	if (op->s.mm_in)
		i->fn = mmx_exec;
	else
		i->fn = handlers[op->cls][op->flags & VO_STORE ? 2 : op->flags & VO_LOAD ? 1 : 0];
	return true;
}
