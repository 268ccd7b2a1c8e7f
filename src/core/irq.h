/*
 * Interrupt line: a small value passed by copy. The interrupt chips live below the KVM API; `board`
 * makes lines whose set() is a KVM_IRQ_LINE, tests make lines that record.
 */
#ifndef CORE_IRQ_H
#define CORE_IRQ_H

#include <stdint.h>

struct irq_line {
	void (*set)(void *opaque, int n, int level);    /* any thread; NULL: not connected */
	void *opaque;
	int n;
};

static inline void irq_set(struct irq_line l, int level)
{
	if (l.set)
		l.set(l.opaque, l.n, level);
}

/* Where message-signalled interrupts go. `send` is KVM_SIGNAL_MSI on a real machine; any thread. */
struct msi_sink {
	void (*send)(void *opaque, uint64_t addr, uint32_t data, uint32_t requester);
	void *opaque;
};

#endif
