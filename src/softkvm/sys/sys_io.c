/*
 * IN, OUT, INS, OUTS (SDM vol. 1 ch. 19): permission, in-engine ports, exits and their completion.
 *
 * An exit leaves RIP and the registers as they were; pio_complete() finishes the instruction, unless user space has
 * moved RIP meanwhile (a reset through a port, for instance). REP strings go out in batches of up to a page.
 */
#include "softkvm/bus.h"
#include "softkvm/sys/sysint.h"

#define PIO_PAGE 4096u
#define STRING_BATCH 4096u      /* elements before the loop may look around */

static uint8_t *pio_data(struct cpu *c) { return (uint8_t *)c->run + KVM_PIO_PAGE_OFFSET * PIO_PAGE; }

static uint64_t linear_rip(const struct cpu *c)
{
	return c->flat ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip);
}

static void check_port(struct cpu *c, uint16_t port, unsigned size)
{
	const struct seg *tr = &c->seg[SEG_TR];
	uint16_t map, bits;

	if (c->real || (!c->vm86 && c->cpl <= cpu_iopl(c)))
		return;
	if (tr->unusable || !(tr->type & 8) || tr->limit < 103)
		cpu_gp(c, 0);
	mem_read_sys(c, cpu_long(c) ? tr->base + 102 : (uint32_t)(tr->base + 102), &map, 2);
	if (map + port / 8u + 1 > tr->limit)
		cpu_gp(c, 0);
	map += port / 8;
	mem_read_sys(c, cpu_long(c) ? tr->base + map : (uint32_t)(tr->base + map), &bits, 2);
	if (bits >> (port & 7) & ((1u << size) - 1))
		cpu_gp(c, 0);
}

static bool bus_try(struct cpu *c, uint16_t port, unsigned size, bool write, void *data)
{
	return c->vm && c->vm->bus && bus_pio(c, port, size, write, data);
}

static _Noreturn void pio_exit(struct cpu *c, uint16_t port, unsigned size, uint32_t count, bool in, const struct insn *i)
{
	struct kvm_run *r = c->run;

	mmio_reset(c);          /* what OUTS read from MMIO is gathered: no part of the next instruction */
	r->exit_reason = KVM_EXIT_IO;
	r->io.direction = in ? KVM_EXIT_IO_IN : KVM_EXIT_IO_OUT;
	r->io.size = (uint8_t)size;
	r->io.port = port;
	r->io.count = count;
	r->io.data_offset = KVM_PIO_PAGE_OFFSET * PIO_PAGE;
	c->pio.active = true;
	c->pio.kind = PIO_IO;
	c->pio.in = in;
	c->pio.size = (uint8_t)size;
	c->pio.count = count;
	c->pio.port = port;
	c->pio.next_rip = c->rip;
	c->rip = cpu_cur_rip(c);
	c->pio.lin_rip = linear_rip(c);
	c->pio.insn_flags = i->flags;
	cpu_unwind(c, UNWIND_EXIT);
}

static void set_acc(struct cpu *c, unsigned size, const void *data)
{
	uint64_t v = 0;

	memcpy(&v, data, size);
	if (size == 4)
		c->gpr[R_RAX] = v;
	else
		memcpy(&c->gpr[R_RAX], &v, size);
}

/* aux: size; src: 1 when the port is imm rather than DX. */
static uint16_t port_of(const struct cpu *c, const struct insn *i) { return i->src ? (uint16_t)i->imm : (uint16_t)c->gpr[R_RDX]; }

static void op_in(struct cpu *c, const struct insn *i)
{
	uint16_t port = port_of(c, i);
	uint32_t v = 0;

	check_port(c, port, i->aux);
	debug_io_access(c, port, i->aux);
	if (bus_try(c, port, i->aux, false, &v)) {
		set_acc(c, i->aux, &v);
		return;
	}
	c->pio.string = false;
	pio_exit(c, port, i->aux, 1, true, i);
}

static void op_out(struct cpu *c, const struct insn *i)
{
	uint16_t port = port_of(c, i);
	uint32_t v = (uint32_t)c->gpr[R_RAX];

	check_port(c, port, i->aux);
	debug_io_access(c, port, i->aux);
	if (bus_try(c, port, i->aux, true, &v))
		return;
	memcpy(pio_data(c), &v, i->aux);
	c->pio.string = false;
	pio_exit(c, port, i->aux, 1, false, i);
}

/* -- strings ---------------------------------------------------------------------------------- */
static uint64_t addr_mask(uint16_t flags)
{
	return flags & IF_A16 ? 0xffff : flags & IF_A32 ? 0xffffffff : ~0ull;
}

static void reg_add(struct cpu *c, unsigned r, int64_t n, uint16_t flags)
{
	uint64_t m = addr_mask(flags), v = c->gpr[r] + (uint64_t)n;

	if (flags & IF_A16)
		c->gpr[r] = (c->gpr[r] & ~m) | (v & m);
	else
		c->gpr[r] = v & m;
}

/* `n` elements are done. True: the instruction is complete. */
static bool string_advance(struct cpu *c, unsigned reg, uint32_t n, unsigned size, uint16_t flags)
{
	int64_t step = (c->eflags & FL_DF ? -(int64_t)size : (int64_t)size) * n;

	reg_add(c, reg, step, flags);
	if (!(flags & (IF_REP | IF_REPNE)))
		return true;
	reg_add(c, R_RCX, -(int64_t)n, flags);
	c->rep_begun = c->gpr[R_RCX] & addr_mask(flags);
	return !c->rep_begun;
}

static uint64_t element_lin(struct cpu *c, const struct insn *i, bool in, uint32_t k)
{
	int64_t step = c->eflags & FL_DF ? -(int64_t)i->aux : (int64_t)i->aux;
	uint64_t off = (c->gpr[in ? R_RDI : R_RSI] + (uint64_t)(step * k)) & addr_mask(i->flags);

	return seg_lin(c, in ? SEG_ES : i->seg, off, i->aux, in ? ACC_WRITE : ACC_READ);
}

static uint32_t batch(const struct cpu *c, const struct insn *i)
{
	uint64_t n = i->flags & (IF_REP | IF_REPNE) ? c->gpr[R_RCX] & addr_mask(i->flags) : 1;

	return (uint32_t)MIN(n, (uint64_t)PIO_PAGE / i->aux);
}

/* Elements that devices inside the engine take. False: the first must leave. */
static bool string_in_engine(struct cpu *c, const struct insn *i, bool in, uint16_t port)
{
	for (uint32_t k = 0; k < STRING_BATCH; k++) {
		uint64_t lin = element_lin(c, i, in, 0);
		uint32_t v = 0;

		if (in)
			mem_probe(c, lin, i->aux, ACC_WRITE);
		else
			mem_read(c, lin, &v, i->aux);
		if (!bus_try(c, port, i->aux, !in, &v)) {
			if (!k)
				return false;
			break;
		}
		if (in)
			mem_write(c, lin, &v, i->aux);
		if (string_advance(c, in ? R_RDI : R_RSI, 1, i->aux, i->flags))
			return true;
		if (mmio_pending(c) || c->trap_db)
			break;
	}
	c->rip = cpu_cur_rip(c);        /* not finished: once more */
	return true;
}

/* How many of the next `n` elements can be reached without a fault: at least one, or the fault is raised. */
static uint32_t string_gather(struct cpu *c, const struct insn *i, bool in, uint32_t n)
{
	uint64_t first = element_lin(c, i, in, 0);
	bool device = false;

	for (uint32_t k = 0; k < n; k++) {
		uint64_t off = (c->gpr[in ? R_RDI : R_RSI] & addr_mask(i->flags));
		uint64_t room = c->eflags & FL_DF ? off : addr_mask(i->flags) - off;
		uint64_t lin;

		/* MMIO goes one element at a time. */
		if (k && (mmio_pending(c) || device))
			return k;
		/* Later elements only in the first one's page, where they fault no more than it does. */
		if (k && room < (uint64_t)k * i->aux + i->aux)
			return k;
		lin = first + (uint64_t)((c->eflags & FL_DF ? -(int64_t)i->aux : (int64_t)i->aux) * k);
		if (k && ((lin ^ first) >> 12 || (lin & 4095) > 4096u - i->aux ||
			  (!c->flat && !seg_range_ok(&c->seg[in ? SEG_ES : i->seg], lin - first + off, i->aux))))
			return k;
		if (in) {
			mem_probe(c, lin, i->aux, ACC_WRITE);
			device = !mem_host(c, lin, i->aux, ACC_WRITE);
		} else {
			mem_read(c, lin, pio_data(c) + (size_t)k * i->aux, i->aux);
		}
	}
	return n;
}

static void op_string_io(struct cpu *c, const struct insn *i)
{
	uint16_t port = (uint16_t)c->gpr[R_RDX];
	bool in = i->dst;
	uint32_t n;

	check_port(c, port, i->aux);
	n = batch(c, i);
	if (!n)
		return;
	debug_io_access(c, port, i->aux);
	if (c->one_insn || c->data_bp)
		n = 1;          /* traps come between elements */
	c->rep_rip = cpu_cur_rip(c);
	if (string_in_engine(c, i, in, port))
		return;
	n = string_gather(c, i, in, n);
	c->pio.string = true;
	pio_exit(c, port, i->aux, n, in, i);
}

/* -- completion ------------------------------------------------------------------------------- */
/* User space may have lowered the count register meanwhile: no more elements than it says. */
static uint32_t elements_left(const struct cpu *c)
{
	uint64_t left = c->gpr[R_RCX] & addr_mask(c->pio.insn_flags);

	if (!(c->pio.insn_flags & (IF_REP | IF_REPNE)))
		return c->pio.count;
	return (uint32_t)MIN(left, (uint64_t)c->pio.count);
}

static int store_try(struct cpu *c, const uint8_t *data)
{
	unsigned size = c->pio.size;
	int why = _setjmp(c->unwind);

	if (why)
		return why;
	while (c->pio.count) {
		uint64_t off = c->gpr[R_RDI] & addr_mask(c->pio.insn_flags);
		uint64_t lin = seg_lin(c, SEG_ES, off, size, ACC_WRITE);

		mem_write(c, lin, data + (size_t)c->pio.done * size, size);
		c->pio.done++;
		c->pio.count--;
		if (string_advance(c, R_RDI, 1, size, c->pio.insn_flags))
			c->rip = c->pio.next_rip;
	}
	return 0;
}

/* INS: what came goes to memory, as far as it is still mapped. */
static void complete_ins(struct cpu *c)
{
	jmp_buf saved;
	bool scope = c->in_unwind_scope;

	c->pio.done = 0;
	c->pio.count = elements_left(c);
	memcpy(&saved, &c->unwind, sizeof saved);
	c->in_unwind_scope = true;
	c->cur = NULL;
	if (store_try(c, pio_data(c)) != 0 && !c->ev.valid)
		c->pio.count = 0;       /* not a fault: the rest of the data is lost, as after a reset device */
	memcpy(&c->unwind, &saved, sizeof saved);
	c->in_unwind_scope = scope;
}

static void complete_msr(struct cpu *c)
{
	if (c->run->msr.error) {
		c->ev = (struct event){ .valid = true, .vector = EXC_GP, .type = EV_EXC, .has_error = !c->real };
		return;
	}
	if (c->pio.kind == PIO_RDMSR) {
		c->gpr[R_RAX] = (uint32_t)c->run->msr.data;
		c->gpr[R_RDX] = c->run->msr.data >> 32;
	}
	c->rip = c->pio.next_rip;
}

static void complete_io(struct cpu *c)
{
	if (c->pio.string && c->pio.in) {
		complete_ins(c);
	} else if (c->pio.string) {
		if (string_advance(c, R_RSI, elements_left(c), c->pio.size, c->pio.insn_flags))
			c->rip = c->pio.next_rip;
	} else {
		if (c->pio.in)
			set_acc(c, c->pio.size, pio_data(c));
		c->rip = c->pio.next_rip;
	}
}

void pio_complete(struct cpu *c)
{
	if (!c->pio.active)
		return;
	c->pio.active = false;
	if (linear_rip(c) != c->pio.lin_rip)
		return;
	switch (c->pio.kind) {
	case PIO_IO:
		complete_io(c);
		break;
	case PIO_RDMSR:
	case PIO_WRMSR:
		complete_msr(c);
		break;
	case PIO_HYPERCALL:
		c->gpr[R_RAX] = c->run->hypercall.ret;
		c->rip = c->pio.next_rip;
		break;
	}
	if (!c->ev.valid)
		event_completed_outside(c);
}

/* -- decoding --------------------------------------------------------------------------------- */
static bool decode_string(struct insn *i, const struct decoded *d, bool in, unsigned size)
{
	i->aux = (uint8_t)size;
	i->dst = in;
	i->fn = op_string_io;
	i->seg = SEG_DS;
	for (unsigned n = 0; n < d->z.operand_count; n++)
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !in)
			insn_set_mem(i, d, &d->op[n]);
	i->flags &= ~(IF_MEM | IF_STACK);
	return true;
}

bool sys_decode_io(struct insn *i, const struct decoded *d)
{
	const ZydisDecodedOperand *port;

	i->flags |= IF_END;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_INSB: return decode_string(i, d, true, 1);
	case ZYDIS_MNEMONIC_INSW: return decode_string(i, d, true, 2);
	case ZYDIS_MNEMONIC_INSD: return decode_string(i, d, true, 4);
	case ZYDIS_MNEMONIC_OUTSB: return decode_string(i, d, false, 1);
	case ZYDIS_MNEMONIC_OUTSW: return decode_string(i, d, false, 2);
	case ZYDIS_MNEMONIC_OUTSD: return decode_string(i, d, false, 4);
	case ZYDIS_MNEMONIC_IN:
		port = &d->op[1];
		i->aux = d->op[0].size / 8;
		i->fn = op_in;
		break;
	case ZYDIS_MNEMONIC_OUT:
		port = &d->op[0];
		i->aux = d->op[1].size / 8;
		i->fn = op_out;
		break;
	default:
		return false;
	}
	i->src = port->type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
	if (i->src)
		i->imm = (uint8_t)port->imm.value.u;
	return true;
}
