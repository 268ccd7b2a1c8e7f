/*
 * System instructions that kernels use all the time, of 64-bit code: interrupt and direction flag, SWAPGS and segment bases, STAC and CLAC,
 * time stamps, selectors, control registers and PKRU read, SYSCALL and SYSRET, VERW; and two that reach memory in their own way, bit strings and
 * CMPXCHG16B. What is not the usual case goes to the handler: other rings than a mode tells apart, something that waits for STI, control register bits
 * that forbid it.
 */
#include "softkvm/jit/slots.h"
#include "softkvm/sys/sysint.h"

/* -- pieces -------------------------------------------------------------------------------------- */
/* EFLAGS are free, and failures have somewhere to go. */
static struct cold *begin(struct tr *t, unsigned n)
{
	gen_clobber(t, n);
	return cold_new(t, n, 1);
}

static bool kernel(const struct tr *t) { return !(t->k->mode & BM_USER); }

/* op byte [p], v ; with 80 /reg. */
static void byte_op(struct em *e, unsigned reg, const void *p, uint8_t v)
{
	e8(e, 0x80);
	em_abs(e, reg, p);
	e8(e, v);
}

/* op dword [p], v ; with 81 /reg: 1 or, 4 and, 6 xor. */
static void word_op(struct em *e, unsigned reg, const void *p, uint32_t v)
{
	em_op_abs(e, false, 0x81, reg, p);
	e32(e, v);
}

/* To `k` unless a bit of [p] is set (cc 4) or clear (5). */
static void need_bit(struct em *e, struct cold *k, const void *p, uint32_t bit, unsigned cc)
{
	em_op_abs(e, false, 0xf7, 0, p);
	e32(e, bit);
	cold_from(k, em_jcc(e, cc));
}

/* Rings 1 and 2 share the kernel's mode. */
static void need_ring0(struct tr *t, struct cold *k)
{
	byte_op(&t->h, 7, &t->c->cpl, 0);
	cold_from(k, em_jcc(&t->h, 5));
}

/* begin() for what only ring 0 may do; NULL: ring 3, which is the handler's business. */
static struct cold *begin_ring0(struct tr *t, unsigned n)
{
	struct cold *k;

	if (!kernel(t))
		return NULL;
	k = begin(t, n);
	need_ring0(t, k);
	return k;
}

static void set_flag(struct em *e, struct cpu *c, uint32_t bit, bool on)
{
	word_op(e, on ? 1 : 4, &c->eflags, on ? bit : ~bit);
}

/* -- flags --------------------------------------------------------------------------------------- */
static bool cld_std(struct tr *t, unsigned n)
{
	gen_clobber(t, n);
	set_flag(&t->h, t->c, FL_DF, t->t[n].z.mnemonic == ZYDIS_MNEMONIC_STD);
	return true;
}

static bool cli(struct tr *t, unsigned n)
{
	struct cold *k = begin_ring0(t, n);

	if (!k)
		return false;
	set_flag(&t->h, t->c, FL_IF, false);
	cold_done(t, n, k);
	return true;
}

/* As sti_shadow() says: where nothing waits and another instruction follows in the block, the shadow is kept by itself. */
static bool sti(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k = begin_ring0(t, n);

	if (!k)
		return false;
	byte_op(e, 7, &t->c->irq_blocked, 0);
	cold_from(k, em_jcc(e, 5));
	word_op(e, 7, &t->c->requests, 0);
	cold_from(k, em_jcc(e, 5));
	set_flag(e, t->c, FL_IF, true);
	cold_done(t, n, k);
	return true;
}

/* eax = RFLAGS from cpu->aflags and eflags but VM and RF; uses SC. */
static void get_rflags(struct em *e, struct cpu *c)
{
	EM(e, 0x0f);                                            /* movzx eax, word [aflags] ; mov ecx, eax */
	em_op_abs(e, false, 0xb7, SA, &c->aflags);
	EM(e, 0x89, 0xc1, 0x83, 0xe1, 0x01, 0xc1, 0xe1, 0x0b);  /* and ecx, 1 ; shl ecx, 11 */
	EM(e, 0xc1, 0xe8, 0x08, 0x25, 0xd5, 0x00, 0x00, 0x00);  /* shr eax, 8 ; and eax, 0xd5 */
	EM(e, 0x09, 0xc8);                                      /* or eax, ecx */
	em_op_abs(e, false, 0x0b, SA, &c->eflags);
	EM(e, 0x83, 0xc8, FL_1, 0x25);                          /* or eax, 2 ; and eax, all but VM and RF */
	e32(e, ~(uint32_t)(FL_VM | FL_RF));
}

/* The other way, as cpu_set_rflags() where mode and interrupts do not depend on what changes. */
static void set_rflags(struct em *e, struct cpu *c)
{
	EM(e, 0x89, 0xc1, 0x81, 0xe1);                          /* mov ecx, eax ; and ecx, what cpu->eflags has ; mov [eflags], ecx */
	e32(e, 0x3f7700);
	em_op_abs(e, false, 0x89, SC, &c->eflags);
	EM(e, 0x89, 0xc1, 0xc1, 0xe9, 0x0b, 0x83, 0xe1, 0x01);  /* mov ecx, eax ; shr ecx, 11 ; and ecx, 1 */
	EM(e, 0x25, 0xd5, 0x00, 0x00, 0x00, 0x83, 0xc8, 0x02);  /* and eax, 0xd5 ; or eax, 2 */
	EM(e, 0xc1, 0xe0, 0x08, 0x09, 0xc8, 0x66);              /* shl eax, 8 ; or eax, ecx ; mov [aflags], ax */
	em_op_abs(e, false, 0x89, SA, &c->aflags);
}

static bool pushf(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k;

	if (t->t[n].z.operand_width != 64)
		return false;
	gen_flags_save(t);
	k = begin(t, n);
	gen_stack(t, k, -8, 8, true);
	get_rflags(e, t->c);
	gen_point(t, n);
	em_mem(e, true, 0x89, SA, ST, -1, 0, 0);
	em_mem(e, true, 0x8d, H_R12, H_R12, -1, 0, -8);
	cold_done(t, n, k);
	return true;
}

/*
 * EFLAGS.AC changes what the kernel may reach, and so the mode: on at the next translation, of the other mode, or out to the loop. The table
 * of indirect targets finds it, at a place that is known here.
 */
static bool stac_clac(struct tr *t, unsigned n)
{
	bool on = t->t[n].z.mnemonic == ZYDIS_MNEMONIC_STAC;
	uint64_t rip = tr_end(t, n);
	const struct jit_ind *ind = &t->j->low->ind[jit_ind_index(rip)];
	struct em *e = &t->h;
	struct cold *k;
	uint8_t *out;

	if (!kernel(t) || t->k->page->moves || on == !!(t->k->mode & BM_AC) || (int64_t)rip != (int32_t)rip)
		return false;
	gen_flags_save(t);
	k = begin(t, n);
	k->final = true;
	need_ring0(t, k);
	need_bit(e, k, &t->c->cr4, CR4_SMAP, 4);
	set_flag(e, t->c, FL_AC, on);
	em_imm(e, SA, (uintptr_t)t->c->tlbs[on ? TLB_KERNEL_AC : TLB_KERNEL]);
	em_store(e, SA, &t->c->tlb);
	word_op(e, 6, &t->j->low->stamp, BM_AC);
	em_op_abs(e, true, 0x81, 7, &ind->rip);                 /* cmp qword [ind.rip], rip */
	e32(e, (uint32_t)rip);
	out = em_jcc(e, 5);
	em_load32(e, SA, &ind->at);
	map_out(e, t);
	EM(e, 0xff, 0xe0);                                      /* jmp rax */
	em_here(&t->cold, out);
	gen_leave(&t->cold, t, rip, NULL);
	return true;
}

/* -- registers ----------------------------------------------------------------------------------- */
static bool swapgs(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k = begin_ring0(t, n);

	if (!k)
		return false;
	em_load(e, SA, &t->c->seg[SEG_GS].base);
	em_load(e, SC, &t->c->msr.kernel_gs_base);
	em_store(e, SC, &t->c->seg[SEG_GS].base);
	em_store(e, SA, &t->c->msr.kernel_gs_base);
	cold_done(t, n, k);
	return true;
}

static unsigned reg_of(const ZydisDecodedOperand *o) { return insn_reg_off(o->reg.value) / 8; }

static bool read_base(struct tr *t, unsigned n, unsigned seg)
{
	struct cold *k = begin(t, n);

	need_bit(&t->h, k, &t->c->cr4, CR4_FSGSBASE, 4);
	em_op_abs(&t->h, t->t[n].z.operand_width == 64, 0x8b, SA, &t->c->seg[seg].base);
	gen_put(t, reg_of(&t->t[n].op[0]), SA);
	cold_done(t, n, k);
	return true;
}

/* Canonical with 48 bits is canonical; whether 57 count is the handler's question. */
static bool write_base(struct tr *t, unsigned n, unsigned seg)
{
	struct em *e = &t->h;
	struct cold *k;

	if (t->t[n].z.operand_width != 64)
		return false;
	k = begin(t, n);
	need_bit(e, k, &t->c->cr4, CR4_FSGSBASE, 4);
	em_mov(e, SC, gen_get(t, reg_of(&t->t[n].op[0]), SC));
	em_mov(e, SA, SC);
	EM(e, 0x48, 0xc1, 0xe0, 0x10, 0x48, 0xc1, 0xf8, 0x10);  /* shl rax, 16 ; sar rax, 16 ; cmp rax, rcx */
	EM(e, 0x48, 0x39, 0xc8);
	cold_from(k, em_jcc(e, 5));
	em_store(e, SC, &t->c->seg[seg].base);
	cold_done(t, n, k);
	return true;
}

/* The lower 16 bits of guest register g = ax. */
static void put16(struct tr *t, unsigned g)
{
	int h = t->map[g];

	e8(&t->h, 0x66);
	if (h < 0) {
		em_op_abs(&t->h, false, 0x89, SA, &t->c->gpr[g]);
		return;
	}
	e8(&t->h, 0x40 | h >> 3);                               /* mov h16, ax */
	e8(&t->h, 0x89);
	e8(&t->h, 0xc0 | (h & 7));
}

static bool read_selector(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];

	if (i->op[0].type != ZYDIS_OPERAND_TYPE_REGISTER)
		return false;
	e8(&t->h, 0x0f);                                        /* movzx eax, word [sel] */
	em_op_abs(&t->h, false, 0xb7, SA, &t->c->seg[i->in->src].sel);
	if (i->z.operand_width == 16)
		put16(t, reg_of(&i->op[0]));
	else
		gen_put(t, reg_of(&i->op[0]), SA);
	return true;
}

static bool read_cr(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const uint64_t *cr;
	struct cold *k;

	switch (i->op[1].reg.value) {
	case ZYDIS_REGISTER_CR0: cr = &t->c->cr0; break;
	case ZYDIS_REGISTER_CR2: cr = &t->c->cr2; break;
	case ZYDIS_REGISTER_CR3: cr = &t->c->cr3; break;
	case ZYDIS_REGISTER_CR4: cr = &t->c->cr4; break;
	default: return false;
	}
	k = begin_ring0(t, n);
	if (!k)
		return false;
	em_load(&t->h, SA, cr);
	gen_put(t, reg_of(&i->op[0]), SA);
	cold_done(t, n, k);
	return true;
}

/* MOV with a segment or control register on one side. */
static bool mov(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];

	return i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT ? i->z.opcode == 0x8c && read_selector(t, n) :
	       i->z.opcode_map == ZYDIS_OPCODE_MAP_0F && i->z.opcode == 0x20 && read_cr(t, n);
}

/* The host's counter and an offset, where the guest's runs at the same rate. */
static bool rdtsc(struct tr *t, unsigned n, bool p)
{
	struct em *e = &t->h;
	struct cold *k = begin(t, n);

	need_bit(e, k, &t->c->cr4, CR4_TSD, 5);
	byte_op(e, 7, &t->c->tsc_scaled, 0);
	cold_from(k, em_jcc(e, 5));
	EM(e, 0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0);    /* rdtsc ; shl rdx, 32 ; or rax, rdx */
	em_op_abs(e, true, 0x03, SA, &t->c->msr.tsc_offset);
	em_mov(e, H_RDX, SA);
	EM(e, 0x48, 0xc1, 0xea, 0x20, 0x41, 0x89, 0xc5);                /* shr rdx, 32 ; mov r13d, eax */
	if (p)
		em_load32(e, H_R14, &t->c->msr.tsc_aux);
	cold_done(t, n, k);
	return true;
}

static bool rdpkru(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k = begin(t, n);

	need_bit(e, k, &t->c->cr4, CR4_PKE, 4);
	EM(e, 0x45, 0x85, 0xf6);                                /* test r14d, r14d */
	cold_from(k, em_jcc(e, 5));
	em_load32(e, H_R13, &t->c->pkru);
	EM(e, 0x31, 0xd2);                                      /* xor edx, edx */
	cold_done(t, n, k);
	return true;
}

/* -- SYSCALL, SYSRET ----------------------------------------------------------------------------- */
/*
 * Both change ring and mode, and so go on by the table of indirect targets under the other mode's stamp. All that may want the handler comes first,
 * the lookup last; its way out makes the stamp anew.
 */
static void need_same_fetch(struct tr *t, struct cold *k, unsigned user)
{
	struct em *e = &t->h;

	em_imm(e, SC, (uintptr_t)&t->c->blocks->seen_fetch_gen[user]);
	EM(e, 0x8b, 0x09);                                      /* mov ecx, [rcx] ; cmp ecx, [fetch_gen] */
	em_op_abs(e, false, 0x3b, SC, &t->c->fetch_gen[user]);
	cold_from(k, em_jcc(e, 5));
}

/* As block_stamp(). */
static void set_stamp(struct tr *t, uint32_t mode)
{
	struct em *e = &t->h;

	em_imm(e, SC, (uintptr_t)&t->c->blocks->gen[!!(mode & BM_USER)]);
	EM(e, 0x8b, 0x09, 0x48, 0xc1, 0xe1, 0x20);              /* mov ecx, [rcx] ; shl rcx, 32 */
	em_imm(e, SA, mode | 1u << 31);
	EM(e, 0x48, 0x09, 0xc1);                                /* or rcx, rax */
	em_store(e, SC, &t->j->low->stamp);
}

/* What both have to look at, the other ring's stamp, and in jit_low.go_on the code to go on at. */
static void ring_begin(struct tr *t, unsigned n, struct cold *k, bool to_user)
{
	uint32_t mode = (t->k->mode & ~(uint32_t)(BM_USER | BM_AC)) | (to_user ? BM_USER : 0);
	struct em *e = &t->h;

	k->final = true;
	need_bit(e, k, &t->c->efer, EFER_SCE, 4);
	word_op(e, 7, &t->c->requests, 0);
	cold_from(k, em_jcc(e, 5));
	need_same_fetch(t, k, to_user);
	set_stamp(t, mode);
	if (to_user)
		em_mov(e, SA, H_R14);
	else
		em_load(e, SA, &t->c->msr.lstar);
	gen_lookup(t, n, k);
	em_store(e, SA, &t->j->low->go_on);
}

/* A segment as seg_flat() makes it, with the selector in ecx, which is kept; uses SA and ST. */
static void put_seg(struct tr *t, unsigned seg, bool code, unsigned dpl)
{
	struct seg *s = &t->c->seg[seg], image;
	struct em *e = &t->h;
	uint64_t w[3];

	_Static_assert(sizeof image == sizeof w && offsetof(struct seg, sel) == 12, "selector in the second word");
	memset(&image, 0, sizeof image);
	seg_flat(&image, 0, code, dpl, code);
	memcpy(w, &image, sizeof w);
	w[2] &= ~0ull >> 8 * (sizeof w - offsetof(struct seg, unusable) - 1);   /* not the padding */
	for (unsigned m = 0; m < 3; m++) {
		em_imm(e, ST, w[m]);
		if (m == 1) {
			EM(e, 0x48, 0x89, 0xc8, 0x48, 0xc1, 0xe0, 0x20);        /* mov rax, rcx ; shl rax, 32 ; or r15, rax */
			EM(e, 0x49, 0x09, 0xc7);
		}
		em_store(e, ST, (uint64_t *)(void *)s + m);
	}
}

/* CS, whose selector is in ecx, SS behind it, the ring and its TLB; then on where jit_low.go_on says. */
static void ring_end(struct tr *t, int ss, unsigned cpl)
{
	struct em *e = &t->h;

	put_seg(t, SEG_CS, true, cpl);
	EM(e, 0x83, 0xc1);                                      /* add ecx, ss ; movzx ecx, cx */
	e8(e, (uint8_t)ss);
	EM(e, 0x0f, 0xb7, 0xc9);
	put_seg(t, SEG_SS, false, cpl);
	e8(e, 0xc6);                                            /* mov byte [cpl], cpl */
	em_abs(e, 0, &t->c->cpl);
	e8(e, (uint8_t)cpl);
	em_imm(e, SA, (uintptr_t)t->c->tlbs[cpl ? TLB_USER : TLB_KERNEL]);
	em_store(e, SA, &t->c->tlb);
	em_load(e, SA, &t->j->low->go_on);
	map_out(e, t);
	EM(e, 0xff, 0xe0);                                      /* jmp rax */
}

static bool op_syscall(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k;

	if (kernel(t))
		return false;
	gen_flags_save(t);
	k = begin(t, n);
	em_load32(e, SA, &t->c->msr.sfmask);
	EM(e, 0xf7, 0xd0);                                      /* not eax ; and eax, [eflags] ; test eax, TF, RF, VM, AC */
	em_op_abs(e, false, 0x23, SA, &t->c->eflags);
	e8(e, 0xa9);
	e32(e, FL_TF | FL_RF | FL_VM | FL_AC);
	cold_from(k, em_jcc(e, 5));
	ring_begin(t, n, k, false);
	get_rflags(e, t->c);
	gen_put(t, 11, SA);
	em_load32(e, SC, &t->c->msr.sfmask);
	EM(e, 0xf7, 0xd1, 0x21, 0xc8);                          /* not ecx ; and eax, ecx */
	set_rflags(e, t->c);
	gen_rip(e, t, true, H_R14, tr_end(t, n));
	em_load32(e, SC, (const uint8_t *)&t->c->msr.star + 4);
	EM(e, 0x81, 0xe1, 0xfc, 0xff, 0x00, 0x00);              /* and ecx, 0xfffc */
	ring_end(t, 8, 0);
	return true;
}

static bool op_sysret(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k;

	if (!kernel(t) || t->t[n].in->aux != 8)
		return false;
	gen_flags_save(t);
	k = begin_ring0(t, n);
	byte_op(e, 7, &t->c->irq_blocked, 0);
	cold_from(k, em_jcc(e, 5));
	em_mov(e, SA, gen_get(t, 11, SA));
	e8(e, 0xa9);                                            /* test eax, TF, AC */
	e32(e, FL_TF | FL_AC);
	cold_from(k, em_jcc(e, 5));
	ring_begin(t, n, k, true);
	em_mov(e, SA, gen_get(t, 11, SA));
	e8(e, 0x25);                                            /* and eax, what it loads ; or eax, 2 */
	e32(e, 0x3c7fd7);
	EM(e, 0x83, 0xc8, FL_1);
	set_rflags(e, t->c);
	e8(e, 0x0f);                                            /* movzx ecx, word [star + 6] */
	em_op_abs(e, false, 0xb7, SC, (const uint8_t *)&t->c->msr.star + 6);
	EM(e, 0x83, 0xc1, 0x10, 0x83, 0xc9, 0x03);              /* add ecx, 16 ; or ecx, 3 ; movzx ecx, cx */
	EM(e, 0x0f, 0xb7, 0xc9);
	ring_end(t, -8, 3);
	return true;
}

/* -- memory -------------------------------------------------------------------------------------- */
/* VERW of a selector of the GDT and ring 0, on the way to user code: the descriptor is looked at each time. The other flags stay. */
static bool verw(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	struct em *e = &t->h;
	struct cold *k;

	if (i->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY || (t->k->mode & BM_AC) || !(k = begin_ring0(t, n)) || !gen_operand(t, n, k, 2, false))
		return false;
	gen_point(t, n);
	EM(e, 0x41, 0x0f, 0xb7, 0x07);                          /* movzx eax, word [r15] ; test eax, eax */
	EM(e, 0x85, 0xc0);
	cold_from(k, em_jcc(e, 4));
	EM(e, 0xa8, 0x07);                                      /* test al, 7 */
	cold_from(k, em_jcc(e, 5));
	EM(e, 0x8d, 0x48, 0x07, 0x66);                          /* lea ecx, [rax + 7] ; cmp cx, [limit] */
	em_op_abs(e, false, 0x3b, SC, &t->c->gdt.limit);
	cold_from(k, em_jcc(e, 7));
	em_load(e, ST, &t->c->gdt.base);
	EM(e, 0x49, 0x01, 0xc7);                                /* add r15, rax */
	gen_check(t, k, 8, false);
	gen_point(t, n);
	EM(e, 0x41, 0x8b, 0x47, 0x04);                          /* mov eax, [r15 + 4] ; and eax, S, code, W ; cmp eax, S and W */
	EM(e, 0x25, 0x00, 0x1a, 0x00, 0x00, 0x3d, 0x00, 0x12, 0x00, 0x00);
	EM(e, 0x0f, 0x94, 0xc0, 0x0f, 0xb6, 0xc0, 0xc1, 0xe0, 0x0e);    /* sete al ; movzx eax, al ; shl eax, 14 */
	EM(e, 0x66);                                            /* and word [aflags], ~ZF ; or [aflags], ax */
	em_op_abs(e, false, 0x81, 4, &t->c->aflags);
	EM(e, 0xff, 0xbf, 0x66);
	em_op_abs(e, false, 0x09, SA, &t->c->aflags);
	t->in_mem = true;
	cold_done(t, n, k);
	return true;
}

/* All registers but the guest's rax and rcx are where the host's instruction wants them. */
static bool cmpxchg16b(struct tr *t, unsigned n)
{
	bool lock = t->t[n].z.attributes & ZYDIS_ATTRIB_HAS_LOCK;
	struct em *e = &t->h;
	struct cold *k;
	bool ok;

	if (t->map[R_RBX] != H_RBX)
		return false;
	k = begin(t, n);
	t->align = 15;          /* before the page is looked for: as the handler */
	ok = gen_operand(t, n, k, 16, true);
	t->align = 0;
	if (!ok)
		return false;
	gen_flags_before(t, n);
	em_mov(e, H_RAX, H_R13);
	em_mov(e, H_RCX, H_R14);
	gen_point(t, n);
	if (lock)
		e8(e, 0xf0);
	EM(e, 0x49, 0x0f, 0xc7, 0x0f);                          /* cmpxchg16b [r15] */
	em_mov(e, H_R13, H_RAX);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}

/* pext rax, reg, 63: the bit's number in its word, without touching flags. */
static void bit_number(struct em *e, unsigned reg, bool w)
{
	em_imm(e, SC, w ? 63 : 31);
	EM(e, 0xc4, 0xe2);
	e8(e, 0x82 | (~reg & 15) << 3);
	EM(e, 0xf5, 0xc1);
}

/* BT and its kin with a register index, on memory: the word first, then the bit in it. */
static bool bit_string(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	bool w = i->z.operand_width == 64, lock = i->z.attributes & ZYDIS_ATTRIB_HAS_LOCK, look = i->z.mnemonic == ZYDIS_MNEMONIC_BT;
	struct em *e = &t->h;
	struct cold *k;
	unsigned reg;
	bool ok;

	if (i->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY || i->op[1].type != ZYDIS_OPERAND_TYPE_REGISTER || i->z.operand_width == 16 ||
	    i->z.address_width != 64)
		return false;
	k = begin(t, n);
	reg = gen_get(t, reg_of(&i->op[1]), SA);
	if (w) {
		em_mov(e, SA, reg);
		EM(e, 0x48, 0xc1, 0xf8, 0x06, 0x48, 0xc1, 0xe0, 0x03);  /* sar rax, 6 ; shl rax, 3 */
	} else {
		e8(e, 0x48 | reg >> 3);                                 /* movsxd rax, reg */
		e8(e, 0x63);
		e8(e, 0xc0 | (reg & 7));
		EM(e, 0x48, 0xc1, 0xf8, 0x05, 0x48, 0xc1, 0xe0, 0x02);  /* sar rax, 5 ; shl rax, 2 */
	}
	t->index = true;
	ok = gen_operand(t, n, k, w ? 8 : 4, !look);
	t->index = false;
	if (!ok)
		return false;
	gen_flags_before(t, n);
	bit_number(e, gen_get(t, reg_of(&i->op[1]), SA), w);
	gen_point(t, n);
	if (look) {
		em_mem(e, w, 0x8b, SC, ST, -1, 0, 0);
		e8(e, 0x40 | w << 3);                                   /* bt rcx, rax */
		EM(e, 0x0f, 0xa3, 0xc1);
	} else {
		if (lock)
			e8(e, 0xf0);
		e8(e, 0x41 | w << 3);                                   /* op [r15], rax */
		e8(e, 0x0f);
		e8(e, i->z.opcode);
		e8(e, 0x07);
	}
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}

/* -- which --------------------------------------------------------------------------------------- */
bool gen_sys_may(const struct tr *t, const struct tinsn *i)
{
	if (!tr_64(t) || t->j->lock)    /* lockstep: interpreted, once */
		return false;
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_PUSHFQ: case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC: case ZYDIS_MNEMONIC_SWAPGS:
	case ZYDIS_MNEMONIC_RDFSBASE: case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
	case ZYDIS_MNEMONIC_RDTSC: case ZYDIS_MNEMONIC_RDTSCP: case ZYDIS_MNEMONIC_RDPKRU: case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_SYSCALL: case ZYDIS_MNEMONIC_SYSRET:
		return true;
	case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_MOV:
		return !(i->in->flags & IF_END);
	default:
		return false;
	}
}

bool gen_sys(struct tr *t, unsigned n)
{
	switch (t->t[n].z.mnemonic) {
	case ZYDIS_MNEMONIC_CLI: return cli(t, n);
	case ZYDIS_MNEMONIC_STI: return sti(t, n);
	case ZYDIS_MNEMONIC_PUSHFQ: return pushf(t, n);
	case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC: return stac_clac(t, n);
	case ZYDIS_MNEMONIC_SWAPGS: return swapgs(t, n);
	case ZYDIS_MNEMONIC_RDFSBASE: return read_base(t, n, SEG_FS);
	case ZYDIS_MNEMONIC_RDGSBASE: return read_base(t, n, SEG_GS);
	case ZYDIS_MNEMONIC_WRFSBASE: return write_base(t, n, SEG_FS);
	case ZYDIS_MNEMONIC_WRGSBASE: return write_base(t, n, SEG_GS);
	case ZYDIS_MNEMONIC_RDTSC: return rdtsc(t, n, false);
	case ZYDIS_MNEMONIC_RDTSCP: return rdtsc(t, n, true);
	case ZYDIS_MNEMONIC_RDPKRU: return rdpkru(t, n);
	case ZYDIS_MNEMONIC_VERW: return verw(t, n);
	case ZYDIS_MNEMONIC_SYSCALL: return op_syscall(t, n);
	case ZYDIS_MNEMONIC_SYSRET: return op_sysret(t, n);
	case ZYDIS_MNEMONIC_MOV: return mov(t, n);
	default: return false;
	}
}

bool gen_odd(struct tr *t, unsigned n)
{
	if (!tr_64(t) || t->row)
		return false;
	switch (t->t[n].z.mnemonic) {
	case ZYDIS_MNEMONIC_CLD: case ZYDIS_MNEMONIC_STD: return cld_std(t, n);
	case ZYDIS_MNEMONIC_CMPXCHG16B: return cmpxchg16b(t, n);
	case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC: return bit_string(t, n);
	default: return false;
	}
}
