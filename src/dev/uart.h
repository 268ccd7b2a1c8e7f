/*
 * 16550A UART core (TI TL16C550C data sheet): registers and FIFOs, no bus and no back end.
 *
 * The attachment calls uart_read()/uart_write() and the input functions with one lock of its own
 * held; the callbacks run with that lock held too. Transmission is paced by the back end: bytes
 * that tx() does not take stay in the FIFO, THRE stays clear, and uart_tx_ready() resumes.
 */
#ifndef DEV_UART_H
#define DEV_UART_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/irq.h"
#include "loop/loop.h"

#define UART_FIFO 16

struct uart_fifo {
	uint8_t data[UART_FIFO];
	unsigned head, count;
};

struct uart {
	struct irq_line irq;
	size_t (*tx)(void *opaque, const uint8_t *buf, size_t len);     /* bytes taken */
	void (*rx_room)(void *opaque);                                  /* uart_can_receive() grew */
	void *opaque;

	uint8_t ier, iir, fcr, lcr, mcr, lsr, msr, scr;
	uint16_t divisor;
	bool thr_pending;               /* the "transmitter empty" interrupt waits to be seen */
	bool timeout_pending;           /* characters sit in the FIFO below its trigger level */
	uint64_t timeout_at;            /* ns; ~0: not running */
	struct uart_fifo rx, txq;
	struct clock *clock;
	struct timer timer;
	int level;
};

/* `timer_fn` is called with no lock held; it takes the attachment's lock and calls uart_timer(). */
void uart_init(struct uart *u, struct clock *clock, loop_fn *timer_fn, void *timer_opaque);
void uart_reset(struct uart *u);
uint8_t uart_read(struct uart *u, unsigned reg);
void uart_write(struct uart *u, unsigned reg, uint8_t val);
size_t uart_can_receive(const struct uart *u);
void uart_receive(struct uart *u, const uint8_t *buf, size_t len);
void uart_break(struct uart *u);
void uart_tx_ready(struct uart *u);
void uart_timer(struct uart *u);

#endif
