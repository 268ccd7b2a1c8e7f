/*
 * Slow paths of guest memory accesses: misses, page crossings, MMIO, implicit accesses, probes.
 *
 * An access is cut at page boundaries; every part is translated (and so checked) before the first
 * byte moves, so a fault leaves nothing half done.
 */
#include <stdatomic.h>
#include <string.h>

#include "softkvm/bus.h"
#include "softkvm/insn.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/mmu/tlb.h"

/* One page's share of an access. */
struct part {
	uint8_t *host;          /* NULL: MMIO at gpa */
	uint64_t gpa;
	unsigned len;
};

static struct walk_as as_current(const struct cpu *c)
{
	return (struct walk_as){ .user = c->cpl == 3, .ac = c->eflags & FL_AC };
}

static bool is_write(enum access acc) { return acc == ACC_WRITE || acc == ACC_RMW; }

/* -- faults ------------------------------------------------------------------------------------ */

/* PUSH, POP and CALL of a memory operand access both: the stack's is where RSP points, or the word below. */
static bool stack_access(const struct cpu *c, uint64_t lin)
{
	const struct insn *i = c->cur;

	if (!i || !(i->flags & IF_MEM) || i->seg == SEG_SS)
		return i && (i->flags & (IF_STACK | IF_MEM));
	return (i->flags & IF_STACK) && lin - (c->gpr[R_RSP] - 8) <= 8;
}

static void check_canonical(struct cpu *c, uint64_t lin, unsigned len)
{
	if (!cpu_long(c) || (cpu_canonical(c, lin) && cpu_canonical(c, lin + len - 1)))
		return;
	cpu_raise_err(c, stack_access(c, lin) ? EXC_SS : EXC_GP, 0);
}

/*
 * #AC for a misaligned user access while CR0.AM and EFLAGS.AC are set, before anything that paging says. 10 bytes: an x87 number
 * (SDM vol. 3 table 6-7). Other sizes are exempt; whether 16 bytes and more are checked is the processor's choice.
 */
static void check_aligned(struct cpu *c, uint64_t lin, unsigned len)
{
	unsigned n = len == 10 ? 8 : len;

	if (c->tlb == c->tlbs[TLB_NONE] && n <= 8 && !(n & (n - 1)) && (lin & (n - 1)))
		cpu_raise_err(c, EXC_AC, 0);
}

/* -- data breakpoints -------------------------------------------------------------------------- */

static const unsigned bp_len[4] = { 1, 2, 8, 4 };

/* DR6 bits of the breakpoints that [lin, lin+len) hits; with `page_only`, whether the page has any. */
static uint64_t bp_match(const uint64_t *dr, uint64_t dr7, uint64_t lin, unsigned len, bool write)
{
	uint64_t hit = 0;

	for (int i = 0; i < 4; i++) {
		unsigned rw = (dr7 >> (16 + 4 * i)) & 3;
		uint64_t n = bp_len[(dr7 >> (18 + 4 * i)) & 3];

		if (!(dr7 & (3u << (2 * i))) || !(rw == 3 || (rw == 1 && write)))
			continue;
		if (ranges_overlap(lin, len, dr[i] & ~(n - 1), n))
			hit |= 1u << i;
	}
	return hit;
}

static void check_data_bp(struct cpu *c, uint64_t lin, unsigned len, enum access acc)
{
	const uint64_t *dr = c->dbg.hw_bp ? c->dbg.dr : c->dr;
	uint64_t hit = bp_match(dr, c->dbg.hw_bp ? c->dbg.dr7 : c->dr[7], lin, len, is_write(acc));

	if (!hit)
		return;
	c->trap_db = true;
	c->trap_dr6 |= hit;
	if (c->cur)
		cpu_leave_after(c);
}

static bool page_has_bp(const struct cpu *c, uint64_t lin)
{
	if (!c->data_bp)
		return false;
	const uint64_t *dr = c->dbg.hw_bp ? c->dbg.dr : c->dr;
	return bp_match(dr, c->dbg.hw_bp ? c->dbg.dr7 : c->dr[7], lin & ~4095ull, 4096, true);
}

/* -- translation of one page's share ----------------------------------------------------------- */

/* 0 or a page-fault code. Enters the translation into the TLB where that is allowed. */
static uint32_t translate(struct cpu *c, uint64_t lin, unsigned len, enum access acc, struct walk_as as,
			  struct part *out)
{
	struct walk w;
	struct slot *s;
	bool ro;
	uint32_t err = mmu_walk(c, lin, acc, as, &w);

	if (err)
		return err;
	out->gpa = w.gpa;
	out->len = len;
	out->host = tlb_phys(c, w.gpa, &ro, &s);
	if (!out->host || (ro && is_write(acc))) {
		out->host = NULL;
		return 0;
	}
	bool cache = !page_has_bp(c, lin);
	uint8_t *page = out->host - (lin & 4095);
	unsigned mode = tlb_mode_of(c, as);

	if (is_write(acc)) {
		if (unlikely(c->watch))
			c->watch->page(c, page);
		if (cache)
			tlb_writer_comes(c, page, lin);
		bool grant = tlb_grant_write(c, s, w.gpa, len, cache);

		phys_mark_dirty(c->vm, c, s, w.gpa);
		if (cache && grant)
			tlb_enter(c, mode, true, lin, page, &w);
		else if (cache)
			tlb_writer_gone(c, (uintptr_t)page);
	}
	if (cache)
		tlb_enter(c, mode, false, lin, page, &w);
	return 0;
}

/* A hit in the given table, as tlb_hit_r/w for the current one. */
static uint8_t *hit_in(struct tlb *t, uint64_t lin, unsigned len, bool write)
{
	const struct tlb_entry *e = write ? &t->w[tlb_index(lin)] : &t->r[tlb_index(lin)];
	uint64_t in_page = lin ^ e->tag;

	return in_page <= 4096 - len ? (uint8_t *)(uintptr_t)(e->host + in_page) : NULL;
}

/* One page's share, by the TLB if it has the page: 0 or a page-fault code. */
static uint32_t part(struct cpu *c, uint64_t lin, unsigned len, enum access acc, struct walk_as as, struct part *out)
{
	out->host = hit_in(c->tlbs[tlb_mode_of(c, as)], lin, len, is_write(acc));
	out->len = len;
	return out->host ? 0 : translate(c, lin, len, acc, as, out);
}

/* Both parts of [lin, lin+len), len <= 4096; raises faults. Returns the number of parts. */
static int split(struct cpu *c, uint64_t lin, unsigned len, enum access acc, struct walk_as as, struct part p[2])
{
	unsigned first = (unsigned)MIN((uint64_t)len, 4096 - (lin & 4095));
	uint64_t second = lin + first;
	uint32_t err;

	check_canonical(c, lin, len);
	if (as.user)
		check_aligned(c, lin, len);
	if (!cpu_long(c))
		second = (uint32_t)second;
	err = part(c, lin, first, acc, as, &p[0]);
	if (err)
		tlb_page_fault(c, lin, err, false);
	if (first == len)
		return 1;
	err = part(c, second, len - first, acc, as, &p[1]);
	if (err)
		tlb_page_fault(c, second, err, false);
	return 2;
}

/* -- MMIO --------------------------------------------------------------------------------------- */

static struct mmio_frag *frag_next(struct cpu *c, uint64_t gpa, unsigned len, bool write)
{
	struct mmio_log *l = &c->mmio;
	struct mmio_frag *f = &l->f[l->replay];

	if (l->replay < l->n && f->gpa == gpa && f->len == len && !!f->write == write) {
		l->replay++;
		return f;
	}
	l->n = l->replay;       /* the guest changed its mind: what follows is new */
	return NULL;
}

static struct mmio_frag *frag_new(struct cpu *c, uint64_t gpa, unsigned len)
{
	struct mmio_log *l = &c->mmio;

	if (l->n == MMIO_FRAGS)
		cpu_emulation_failed(c);
	struct mmio_frag *f = &l->f[l->n];
	*f = (struct mmio_frag){ .gpa = gpa, .len = (uint8_t)len };
	return f;
}

static void fill_exit(struct cpu *c, const struct mmio_frag *f)
{
	struct kvm_run *r = c->run;

	r->exit_reason = KVM_EXIT_MMIO;
	r->mmio.phys_addr = f->gpa;
	r->mmio.len = f->len;
	r->mmio.is_write = !!f->write;
	memset(r->mmio.data, 0, sizeof r->mmio.data);
	if (f->write)
		memcpy(r->mmio.data, f->data, f->len);
}

enum { FRAG_READ, FRAG_POSTED, FRAG_DONE };     /* mmio_frag.write */

static void mmio_read_frag(struct cpu *c, uint64_t gpa, uint8_t *buf, unsigned len)
{
	struct mmio_frag *f = frag_next(c, gpa, len, false);

	if (f) {
		memcpy(buf, f->data, len);
		return;
	}
	f = frag_new(c, gpa, len);
	if (bus_mmio(c, gpa, len, false, f->data)) {
		c->mmio.n++;
		c->mmio.replay++;
		memcpy(buf, f->data, len);
		return;
	}
	c->mmio.waiting = true;
	fill_exit(c, f);
	cpu_unwind(c, UNWIND_EXIT);
}

static void mmio_write_frag(struct cpu *c, uint64_t gpa, const uint8_t *buf, unsigned len)
{
	if (frag_next(c, gpa, len, true))
		return;
	struct mmio_frag *f = frag_new(c, gpa, len);
	memcpy(f->data, buf, len);
	f->write = bus_mmio(c, gpa, len, true, f->data) ? FRAG_DONE : FRAG_POSTED;
	c->mmio.n++;
	c->mmio.replay++;
	if (c->cur)
		cpu_leave_after(c);
}

/* Cut into what the KVM API can carry: at most 8 bytes each. */
static void mmio_part(struct cpu *c, uint64_t gpa, uint8_t *buf, unsigned len, bool write)
{
	if (unlikely(c->watch))
		c->watch->once(c);
	while (len) {
		unsigned n = MIN(len, 8u);

		if (write)
			mmio_write_frag(c, gpa, buf, n);
		else
			mmio_read_frag(c, gpa, buf, n);
		gpa += n;
		buf += n;
		len -= n;
	}
}

/* Fill kvm_run with the next posted write; false: none, the log is done with. */
static bool next_posted(struct cpu *c)
{
	struct mmio_log *l = &c->mmio;

	for (; l->next_write < l->n; l->next_write++)
		if (l->f[l->next_write].write == FRAG_POSTED) {
			fill_exit(c, &l->f[l->next_write++]);
			return true;
		}
	l->next_write = 0;
	mmio_reset(c);
	return false;
}

bool mmio_commit(struct cpu *c)
{
	c->mmio.next_write = 0;
	return next_posted(c);
}

bool mmio_complete(struct cpu *c)
{
	struct mmio_log *l = &c->mmio;

	if (l->waiting) {
		memcpy(l->f[l->n].data, c->run->mmio.data, l->f[l->n].len);
		l->n++;
		l->replay = 0;
		l->waiting = false;
		return false;
	}
	return l->next_write ? next_posted(c) : false;
}

/* -- accesses ----------------------------------------------------------------------------------- */

/* A store of a power-of-two size that is aligned is one store, as other vCPUs expect. */
static void copy_in(uint8_t *host, const uint8_t *buf, unsigned len)
{
	switch (len) {
	case 1: ram_st8(host, *buf); return;
	case 2: ram_st16(host, ld_le16(buf)); return;
	case 4: ram_st32(host, ld_le32(buf)); return;
	case 8: ram_st64(host, ld_le64(buf)); return;
	default: ram_copy(host, buf, len);
	}
}

static void copy_out(uint8_t *buf, const uint8_t *host, unsigned len)
{
	switch (len) {
	case 1: *buf = ram_ld8(host); return;
	case 2: st_le16(buf, ram_ld16(host)); return;
	case 4: st_le32(buf, ram_ld32(host)); return;
	case 8: st_le64(buf, ram_ld64(host)); return;
	default: ram_copy(buf, host, len);
	}
}

static void access_as(struct cpu *c, uint64_t lin, uint8_t *buf, unsigned len, bool write, struct walk_as as)
{
	struct part p[2];
	int n = split(c, lin, len, write ? ACC_WRITE : ACC_READ, as, p);

	for (int i = 0; i < n; i++) {
		if (!p[i].host)
			mmio_part(c, p[i].gpa, buf, p[i].len, write);
		else if (write)
			copy_in(p[i].host, buf, p[i].len);
		else
			copy_out(buf, p[i].host, p[i].len);
		buf += p[i].len;
	}
}

void mem_read_slow(struct cpu *c, uint64_t lin, void *buf, unsigned size)
{
	c->stats.slow_loads++;
	access_as(c, lin, buf, size, false, as_current(c));
	if (unlikely(c->data_bp))
		check_data_bp(c, lin, size, ACC_READ);
}

void mem_write_slow(struct cpu *c, uint64_t lin, const void *buf, unsigned size)
{
	c->stats.slow_stores++;
	access_as(c, lin, (uint8_t *)(uintptr_t)buf, size, true, as_current(c));
	if (unlikely(c->data_bp))
		check_data_bp(c, lin, size, ACC_WRITE);
}

void mem_read(struct cpu *c, uint64_t lin, void *buf, unsigned len)
{
	const uint8_t *p = tlb_hit_r(c, lin, len);

	if (likely(p))
		copy_out(buf, p, len);
	else
		mem_read_slow(c, lin, buf, len);
}

void mem_write(struct cpu *c, uint64_t lin, const void *buf, unsigned len)
{
	uint8_t *p = tlb_hit_w(c, lin, len);

	if (likely(p))
		copy_in(p, buf, len);
	else
		mem_write_slow(c, lin, buf, len);
}

static void access_fast(struct cpu *c, uint64_t lin, uint8_t *buf, unsigned len, bool write, struct walk_as as)
{
	uint8_t *p = hit_in(c->tlbs[tlb_mode_of(c, as)], lin, len, write);

	if (!p)
		access_as(c, lin, buf, len, write, as);
	else if (write)
		copy_in(p, buf, len);
	else
		copy_out(buf, p, len);
}

void mem_read_sys(struct cpu *c, uint64_t lin, void *buf, unsigned len)
{
	access_fast(c, lin, buf, len, false, (struct walk_as){ 0 });
}

void mem_write_sys(struct cpu *c, uint64_t lin, const void *buf, unsigned len)
{
	access_fast(c, lin, (uint8_t *)(uintptr_t)buf, len, true, (struct walk_as){ 0 });
}

void mem_read_cpl(struct cpu *c, unsigned cpl, uint64_t lin, void *buf, unsigned len)
{
	access_fast(c, lin, buf, len, false, (struct walk_as){ .user = cpl == 3, .ac = c->eflags & FL_AC });
}

void mem_write_cpl(struct cpu *c, unsigned cpl, uint64_t lin, const void *buf, unsigned len)
{
	access_fast(c, lin, (uint8_t *)(uintptr_t)buf, len, true,
		    (struct walk_as){ .user = cpl == 3, .ac = c->eflags & FL_AC });
}

void mem_probe(struct cpu *c, uint64_t lin, unsigned len, enum access acc)
{
	struct part p[2];

	if (!(is_write(acc) ? tlb_hit_w(c, lin, len) : tlb_hit_r(c, lin, len)))
		split(c, lin, len, acc, as_current(c), p);
}

void *mem_host(struct cpu *c, uint64_t lin, unsigned len, enum access acc)
{
	struct part p;
	void *hit = is_write(acc) ? tlb_hit_w(c, lin, len) : tlb_hit_r(c, lin, len);

	if (likely(hit))
		return hit;
	if (c->tlb == c->tlbs[TLB_NONE] || (lin & 4095) + len > 4096 || page_has_bp(c, lin) ||
	    (cpu_long(c) && !cpu_canonical(c, lin)))
		return NULL;
	return translate(c, lin, len, acc, as_current(c), &p) ? NULL : p.host;
}

void *mem_rmw(struct cpu *c, uint64_t lin, unsigned size)
{
	struct part p[2];
	void *hit = tlb_hit_w(c, lin, size);

	if (likely(hit))
		return hit;
	int n = split(c, lin, size, ACC_RMW, as_current(c), p);
	if (n != 1 || !p[0].host)
		return NULL;
	if (unlikely(c->data_bp))
		check_data_bp(c, lin, size, ACC_RMW);
	return p[0].host;
}

void mem_lock(struct cpu *c)
{
	vm_pause_all(c->vm, c);
	c->split_held = true;
}

void mem_unlock(struct cpu *c)
{
	c->split_held = false;
	vm_resume_all(c->vm, c);
}
