/*
 * The interrupt chips' own declarations.
 *
 * Locking. `irqchip.lock` guards both 8259As, the I/O APIC, the 8254, the routing table and the irqfds.
 * A LAPIC has no lock: what other threads touch is atomic (IRR, TMR, the registers that take part in
 * destination matching, waiting INIT/SIPI/NMI/SMI); the rest belongs to the vCPU's thread (or to an ioctl
 * that holds the vCPU's mutex). So interrupts may be sent to LAPICs with or without the lock held, and a
 * LAPIC may take the lock (EOI). The lock is taken after vm->lock, never before; cpu_request() may be
 * called under it.
 */
#ifndef SOFTKVM_IRQ_INTERNAL_H
#define SOFTKVM_IRQ_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "softkvm/irqchip.h"
#include "softkvm/sys.h"

/* -- an interrupt message on its way to LAPICs ------------------------------------------------ */
enum apic_mode { DM_FIXED, DM_LOWEST, DM_SMI, DM_RESERVED, DM_NMI, DM_INIT, DM_SIPI, DM_EXTINT };
enum apic_shorthand { SH_NONE, SH_SELF, SH_ALL, SH_OTHERS };
struct apic_msg {
	uint32_t dest;
	uint8_t vector, mode, shorthand;
	bool logical, trig_level, assert, redir_hint;
	struct lapic *source;           /* sender of an IPI, NULL for devices */
};

/* -- local APIC ------------------------------------------------------------------------------- */
/* Register numbers: MMIO offset >> 4, which is also the x2APIC MSR number - 0x800. */
enum {
	AR_ID = 0x02, AR_VERSION = 0x03, AR_TPR = 0x08, AR_APR = 0x09, AR_PPR = 0x0a, AR_EOI = 0x0b, AR_LDR = 0x0d,
	AR_DFR = 0x0e, AR_SVR = 0x0f, AR_ISR = 0x10, AR_TMR = 0x18, AR_IRR = 0x20, AR_ESR = 0x28, AR_LVT_CMCI = 0x2f, AR_ICR = 0x30,
	AR_ICR2 = 0x31, AR_LVTT = 0x32, AR_LVT_THERMAL = 0x33, AR_LVT_PERF = 0x34, AR_LVT0 = 0x35, AR_LVT1 = 0x36,
	AR_LVT_ERROR = 0x37, AR_TMICT = 0x38, AR_TMCCT = 0x39, AR_TDCR = 0x3e, AR_SELF_IPI = 0x3f, AR_COUNT = 0x40
};
#define LVT_MASKED (1u << 16)
#define SVR_ENABLE (1u << 8)
#define SVR_DIRECTED_EOI (1u << 12)
#define LVR_DIRECTED_EOI (1u << 24)
enum { ESR_SEND_ILLEGAL = 1 << 5, ESR_RECV_ILLEGAL = 1 << 6, ESR_ILLEGAL_REG = 1 << 7 };
enum lapic_state { LAPIC_OFF, LAPIC_XAPIC, LAPIC_X2APIC };
enum timer_mode { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE, TIMER_RESERVED };

struct lapic {
	struct cpu *cpu;
	struct vm *vm;
	uint32_t id;                    /* x2APIC id: that of the vCPU */
	_Atomic uint32_t r[AR_COUNT];
	_Atomic uint32_t irr_sum;       /* bit n: IRR word n may be non-zero; a set bit without a word is cleaned up lazily */
	_Atomic uint8_t state;          /* enum lapic_state */
	_Atomic uint32_t waiting;       /* LAPIC_INIT..LAPIC_SMI; bits 8-15 the SIPI vector */
	_Atomic uint32_t errors;        /* ESR bits not yet latched by a write to ESR */
	_Atomic bool extint;            /* ExtINT came as a message: take one PIC interrupt whatever LVT0 says */
	_Atomic int ext_vector;         /* split irqchip: from KVM_INTERRUPT, -1 none */
	uint64_t base;                  /* of the MMIO page; own thread */
	int eoi_exit;                   /* own thread */
	bool cmci;                      /* MCG_CAP offers CMCI: there is an LVT entry for it */
	struct {                        /* own thread */
		bool armed;
		uint64_t target;        /* ns, not in TSC-deadline mode */
		uint64_t period;        /* ns; 0: one-shot */
		uint64_t deadline;      /* guest TSC; 0: not armed */
	} timer;
};

static inline uint32_t lapic_reg(const struct lapic *l, unsigned r)
{
	return atomic_load_explicit(&l->r[r], memory_order_relaxed);
}

static inline void lapic_put(struct lapic *l, unsigned r, uint32_t v)
{
	atomic_store_explicit(&l->r[r], v, memory_order_relaxed);
}

static inline bool lapic_sw_enabled(const struct lapic *l)
{
	return l->state != LAPIC_OFF && (lapic_reg(l, AR_SVR) & SVR_ENABLE);
}

/* lapic.c */
int lapic_mmio(struct lapic *l, uint64_t gpa, unsigned len, bool write, void *data);   /* 1 taken, 0 not mine */
void lapic_error(struct lapic *l, uint32_t bits);
/* lapic_irq.c */
int lapic_accept(struct lapic *l, const struct apic_msg *m, bool *fresh);       /* 1 accepted, 0 not */
bool lapic_local(struct lapic *l, unsigned lvt);                        /* deliver by a local vector table entry */
int lapic_highest(const struct lapic *l, unsigned first);               /* of ISR, TMR, IRR: vector or -1 */
int lapic_next(struct lapic *l);                                        /* deliverable now, or -1 */
uint32_t lapic_ppr(const struct lapic *l);
void lapic_recheck(struct lapic *l);            /* PPR may have fallen, or state was loaded */
void lapic_eoi(struct lapic *l);
void lapic_clear_irqs(struct lapic *l);
void lapic_ack_vector(struct lapic *l, int v);
/* lapic_ipi.c: number of LAPICs that accepted, -1 when no destination matched. *fresh: one of them had not held it already. */
int apic_send(struct vm *vm, const struct apic_msg *m, bool *fresh);
void lapic_send_icr(struct lapic *l, uint32_t icr, uint32_t dest);
void lapic_send_self(struct lapic *l, uint8_t vector);
/* lapic_timer.c */
enum timer_mode lapic_timer_mode(const struct lapic *l);
void lapic_timer_stop(struct lapic *l);
void lapic_timer_start(struct lapic *l, uint32_t count);        /* `count` ticks from now, period from TMICT */
void lapic_timer_restore(struct lapic *l);                      /* from TMICT and TMCCT of loaded state */
uint32_t lapic_timer_count(struct lapic *l);
void lapic_timer_set_divide(struct lapic *l, uint32_t tdcr);
void lapic_timer_set_lvtt(struct lapic *l, uint32_t lvtt);
void lapic_timer_set_deadline(struct lapic *l, uint64_t tsc);

/* -- 8259A pair ------------------------------------------------------------------------------- */
struct pic { struct kvm_pic_state s; bool slave; };
struct pics {
	struct pic c[2];
	_Atomic bool output;            /* INTR of the master */
	uint8_t sources[16];            /* per line: one bit per source that drives it high */
};

/* -- I/O APIC --------------------------------------------------------------------------------- */
struct ioapic {
	uint64_t base;
	uint32_t sel, id, irr, irr_delivered;
	uint64_t rte[KVM_IOAPIC_NUM_PINS];
	uint8_t sources[KVM_IOAPIC_NUM_PINS];
	uint8_t sent[KVM_IOAPIC_NUM_PINS];      /* vector that set remote IRR: the guest may rewrite the entry before its EOI */
};

/* -- 8254 ------------------------------------------------------------------------------------- */
struct pit_channel {
	struct kvm_pit_channel_state s; /* count: the count register, what the next trigger loads */
	int64_t frozen;                 /* ns counted when the gate stopped it, -1: counting */
	bool idle;                      /* modes 1 and 5: no trigger since the mode was set, so the output is high */
	uint32_t running;               /* modes 1 and 5: the count that the last trigger loaded */
};
struct pit {
	struct pit_channel c[3];
	uint32_t flags;                 /* KVM_PIT_FLAGS_* */
	bool dummy_speaker, speaker_on;
	bool reinject, acked, inject;   /* inject: raise GSI 0 when the chips' lock is about to be dropped */
	uint32_t pending;
	bool armed;
	uint64_t target, period;        /* ns; period 0: one-shot */
	bool thread_up, stop, no_thread /* tests step the clock */;
	pthread_t thread;
	pthread_cond_t cond;
};

/* -- routing ---------------------------------------------------------------------------------- */
#define ROUTE_MAX 4096
struct route { uint32_t gsi, type, chip, pin, data; uint64_t addr; };
struct routes {
	unsigned n;
	int16_t pin_gsi[3][24];         /* irqchip pin -> GSI, -1 none (PIC pins 0-7 of each chip) */
	uint16_t first[ROUTE_MAX + 1];  /* e[first[g]] .. e[first[g + 1] - 1] belong to GSI g */
	struct route e[];               /* sorted by GSI */
};
enum irq_source { SRC_USER, SRC_RESAMPLE, SRC_PIT };

struct irqfd {
	bool used;
	uint32_t gen;
	int fd, resample;               /* own descriptors; -1 none */
	int client_fd;                  /* number and identity of the client's */
	uint64_t ident;
	uint32_t gsi;
};

struct irqchip {
	pthread_mutex_t lock;
	struct vm *vm;
	bool split;
	unsigned nr_reserved;
	struct pics pics;
	struct ioapic ioapic;
	struct pit *_Atomic pit;
	struct routes *routes;
	_Atomic uint32_t eoi_map[8];    /* vectors whose EOI somebody besides the LAPIC wants to see */
	_Atomic bool lint_nmi;          /* some LVT0 was in NMI mode: the PIT drives it */
	struct irqfd *fds;
	unsigned nfds, nresample;
	uint32_t gen;
	int epoll, stop_fd;
	bool fd_thread_up;
	pthread_t fd_thread;
};

/* irqchip.c */
void irqchip_lock(struct irqchip *ic);
void irqchip_unlock(struct irqchip *ic);        /* does what must happen after a chip access first */
int irqchip_set_gsi(struct irqchip *ic, uint32_t gsi, int level, enum irq_source src);  /* locked */
void irqchip_acked(struct irqchip *ic, unsigned chip, unsigned pin);    /* locked: the guest EOIed this pin */
void irqchip_unmasked(struct irqchip *ic, unsigned chip, unsigned pin); /* locked */
bool irqchip_wants_ack(const struct irqchip *ic, unsigned chip, unsigned pin);  /* locked */
void irqchip_update_eoi_map(struct irqchip *ic);                        /* locked */
int irqchip_send_msi(struct vm *vm, uint64_t addr, uint32_t data, bool *fresh);
/* route.c */
int route_build(const struct kvm_irq_routing_entry *e, unsigned n, bool split, bool wide, struct routes **out);
int route_default(struct routes **out);
/* pic.c (locked) */
void pic_reset(struct pics *p);
int pic_set_line(struct irqchip *ic, unsigned line, int level, enum irq_source src);    /* -1 masked, 0 coalesced, 1 */
int pic_ack(struct irqchip *ic);                /* INTA: vector */
int pic_peek(const struct pics *p);              /* the vector INTA would give */
void pic_update(struct irqchip *ic);
bool pic_pio(struct irqchip *ic, uint16_t port, unsigned len, bool write, uint8_t *data);
bool pic_owns(uint16_t port, unsigned len);
/* ioapic.c (locked) */
void ioapic_reset(struct ioapic *io);
int ioapic_set_line(struct irqchip *ic, unsigned pin, int level, enum irq_source src);
void ioapic_eoi(struct irqchip *ic, uint8_t vector, bool level, bool suppressed);
void ioapic_mmio(struct irqchip *ic, uint64_t off, unsigned len, bool write, uint8_t *data);
void ioapic_get(struct irqchip *ic, struct kvm_ioapic_state *s);
void ioapic_set(struct irqchip *ic, const struct kvm_ioapic_state *s);
/* pit.c (locked) */
void pit_reset(struct pit *p);
bool pit_owns(const struct pit *p, uint16_t port, unsigned len);
void pit_pio(struct irqchip *ic, uint16_t port, unsigned len, bool write, uint8_t *data);
void pit_get_state(struct pit *p, struct kvm_pit_state2 *s);
void pit_set_state(struct irqchip *ic, const struct kvm_pit_state2 *s);
void pit_acked(struct pit *p);
void pit_poll(struct irqchip *ic, uint64_t now);        /* fire channel 0 if due */
void pit_stop(struct irqchip *ic);                      /* unlocked: ends the thread */
/* irqfd.c */
void irqfd_acked(struct irqchip *ic, uint32_t gsi);     /* locked */
void irqfd_stop(struct irqchip *ic);                    /* unlocked */
bool eventfd_identify(int fd, uint64_t *ident, int *err);
void eventfd_signal(int fd);

#endif
