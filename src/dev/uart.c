#include "dev/uart.h"

#include <linux/serial_reg.h>

#include "base/util.h"

#define LSR_ERRORS (UART_LSR_OE | UART_LSR_PE | UART_LSR_FE | UART_LSR_BI)
#define NEVER UINT64_MAX

static void fifo_push(struct uart_fifo *f, uint8_t c)
{
	f->data[(f->head + f->count++) % UART_FIFO] = c;
}

static uint8_t fifo_pop(struct uart_fifo *f)
{
	uint8_t c = f->data[f->head];

	f->head = (f->head + 1) % UART_FIFO;
	f->count--;
	return c;
}

static bool fifo_on(const struct uart *u)
{
	return u->fcr & UART_FCR_ENABLE_FIFO;
}

static unsigned rx_trigger(const struct uart *u)
{
	static const uint8_t level[] = { 1, 4, 8, 14 };

	return fifo_on(u) ? level[u->fcr >> 6] : 1;
}

/* Four character times (start, 5-8 data, parity, stop bits) without traffic. Clock is 1.8432 MHz / 16. */
static uint64_t timeout_ns(const struct uart *u)
{
	unsigned bits = 1 + 5 + (u->lcr & 3) + !!(u->lcr & UART_LCR_PARITY) + (u->lcr & UART_LCR_STOP ? 2 : 1);
	unsigned div = u->divisor ? u->divisor : 1;

	return 4ULL * bits * div * 1000000000ULL / 115200;
}

static void update_irq(struct uart *u)
{
	uint8_t id = UART_IIR_NO_INT;
	int level;

	if ((u->ier & UART_IER_RLSI) && (u->lsr & LSR_ERRORS))
		id = UART_IIR_RLSI;
	else if ((u->ier & UART_IER_RDI) && u->rx.count >= rx_trigger(u))
		id = UART_IIR_RDI;
	else if ((u->ier & UART_IER_RDI) && u->timeout_pending)
		id = UART_IIR_RX_TIMEOUT;
	else if ((u->ier & UART_IER_THRI) && u->thr_pending)
		id = UART_IIR_THRI;
	else if ((u->ier & UART_IER_MSI) && (u->msr & UART_MSR_ANY_DELTA))
		id = UART_IIR_MSI;
	u->iir = id | (fifo_on(u) ? 0xc0 : 0);
	level = id != UART_IIR_NO_INT;
	if (level != u->level) {
		u->level = level;
		irq_set(u->irq, level);
	}
}

/* Restart the character timeout; it only matters with FIFOs on and a trigger above what is there. */
static void timeout_restart(struct uart *u)
{
	u->timeout_pending = false;
	if (!fifo_on(u) || !u->rx.count || rx_trigger(u) == 1) {
		u->timeout_at = NEVER;
		return;
	}
	u->timeout_at = clock_now(u->clock) + timeout_ns(u);
	timer_arm(&u->timer, u->timeout_at);
}

void uart_timer(struct uart *u)
{
	if (u->timeout_at == NEVER)
		return;
	if (clock_now(u->clock) < u->timeout_at) {
		timer_arm(&u->timer, u->timeout_at);
		return;
	}
	u->timeout_at = NEVER;
	u->timeout_pending = u->rx.count > 0;
	update_irq(u);
}

static void receive_one(struct uart *u, uint8_t c)
{
	unsigned room = fifo_on(u) ? UART_FIFO : 1;

	if (u->rx.count >= room) {
		u->lsr |= UART_LSR_OE;
		if (fifo_on(u))
			return;                 /* the FIFO keeps what it has, the shift register is lost */
		fifo_pop(&u->rx);
	}
	fifo_push(&u->rx, c);
	u->lsr |= UART_LSR_DR;
}

static void tx_empty(struct uart *u)
{
	u->lsr |= UART_LSR_THRE | UART_LSR_TEMT;
	u->thr_pending = true;
}

/* Hand the FIFO to the back end, in at most two runs as it is a ring. */
static void tx_drain(struct uart *u)
{
	while (u->txq.count) {
		struct uart_fifo *f = &u->txq;
		size_t run = MIN(f->count, UART_FIFO - f->head), n = run;

		if (u->tx)
			n = u->tx(u->opaque, f->data + f->head, run);
		if (n > run)
			n = run;
		f->head = (f->head + n) % UART_FIFO;
		f->count -= n;
		if (n < run)
			return;
	}
	tx_empty(u);
}

static void write_thr(struct uart *u, uint8_t c)
{
	u->thr_pending = false;
	if (u->mcr & UART_MCR_LOOP) {
		receive_one(u, c);
		timeout_restart(u);
		tx_empty(u);
		return;
	}
	if (u->txq.count < (fifo_on(u) ? UART_FIFO : 1))
		fifo_push(&u->txq, c);          /* into a full FIFO: lost, as on the chip */
	u->lsr &= ~(UART_LSR_THRE | UART_LSR_TEMT);
	tx_drain(u);
}

static void rx_clear(struct uart *u)
{
	u->rx.count = u->rx.head = 0;
	u->lsr &= ~(UART_LSR_DR | UART_LSR_BI);
	u->timeout_pending = false;
	u->timeout_at = NEVER;
	if (u->rx_room)
		u->rx_room(u->opaque);
}

static void write_fcr(struct uart *u, uint8_t v)
{
	bool toggled = (v ^ u->fcr) & UART_FCR_ENABLE_FIFO;

	if (toggled || (v & UART_FCR_CLEAR_RCVR))
		rx_clear(u);
	if (toggled || (v & UART_FCR_CLEAR_XMIT)) {
		u->txq.count = u->txq.head = 0;
		tx_empty(u);
	}
	u->fcr = v & UART_FCR_ENABLE_FIFO ? v & (UART_FCR_ENABLE_FIFO | UART_FCR_DMA_SELECT | UART_FCR_TRIGGER_MASK) : 0;
}

/* Modem inputs: in loopback the modem outputs, otherwise a peer that is always there and ready. */
static void update_msr(struct uart *u)
{
	uint8_t in = UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS, old = u->msr & 0xf0, delta;

	if (u->mcr & UART_MCR_LOOP)
		in = (u->mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) | (u->mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
		     (u->mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) | (u->mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0);
	delta = (in ^ old) >> 4;
	if (!(old & UART_MSR_RI) || (in & UART_MSR_RI))
		delta &= ~UART_MSR_TERI;        /* trailing edge only */
	u->msr = in | (u->msr & UART_MSR_ANY_DELTA) | delta;
}

static uint8_t read_rbr(struct uart *u)
{
	uint8_t c;

	if (!u->rx.count)
		return 0;
	c = fifo_pop(&u->rx);
	if (!u->rx.count)
		u->lsr &= ~UART_LSR_DR;
	timeout_restart(u);
	if (u->rx_room)
		u->rx_room(u->opaque);
	return c;
}

uint8_t uart_read(struct uart *u, unsigned reg)
{
	bool dlab = u->lcr & UART_LCR_DLAB;
	uint8_t v;

	switch (reg & 7) {
	case UART_RX:
		v = dlab ? u->divisor & 0xff : read_rbr(u);
		break;
	case UART_IER:
		v = dlab ? u->divisor >> 8 : u->ier;
		break;
	case UART_IIR:
		v = u->iir;
		if ((v & 0x0f) == UART_IIR_THRI)
			u->thr_pending = false;
		break;
	case UART_LCR:
		v = u->lcr;
		break;
	case UART_MCR:
		v = u->mcr;
		break;
	case UART_LSR:
		v = u->lsr;
		u->lsr &= ~LSR_ERRORS;
		break;
	case UART_MSR:
		v = u->msr;
		u->msr &= ~UART_MSR_ANY_DELTA;
		break;
	default:
		v = u->scr;
	}
	update_irq(u);
	return v;
}

static void write_ier(struct uart *u, uint8_t v)
{
	/* Enabling the transmit interrupt while the register is empty raises it (data sheet, "THRE"). */
	if ((v & UART_IER_THRI) && !(u->ier & UART_IER_THRI) && (u->lsr & UART_LSR_THRE))
		u->thr_pending = true;
	u->ier = v & 0x0f;
}

void uart_write(struct uart *u, unsigned reg, uint8_t v)
{
	bool dlab = u->lcr & UART_LCR_DLAB;

	switch (reg & 7) {
	case UART_TX:
		if (dlab)
			u->divisor = (u->divisor & 0xff00) | v;
		else
			write_thr(u, v);
		break;
	case UART_IER:
		if (dlab)
			u->divisor = (u->divisor & 0xff) | v << 8;
		else
			write_ier(u, v);
		break;
	case UART_FCR:
		write_fcr(u, v);
		break;
	case UART_LCR:
		u->lcr = v;
		break;
	case UART_MCR:
		u->mcr = v & 0x1f;
		update_msr(u);
		break;
	case UART_SCR:
		u->scr = v;
		break;
	}
	update_irq(u);
}

size_t uart_can_receive(const struct uart *u)
{
	unsigned room = fifo_on(u) ? UART_FIFO : 1;

	if (u->mcr & UART_MCR_LOOP)
		return 0;
	return u->rx.count < room ? room - u->rx.count : 0;
}

void uart_receive(struct uart *u, const uint8_t *buf, size_t len)
{
	for (size_t i = 0; i < len; i++)
		receive_one(u, buf[i]);
	timeout_restart(u);
	update_irq(u);
}

void uart_break(struct uart *u)
{
	receive_one(u, 0);
	u->lsr |= UART_LSR_BI;
	timeout_restart(u);
	update_irq(u);
}

void uart_tx_ready(struct uart *u)
{
	if (!u->txq.count)
		return;
	tx_drain(u);
	update_irq(u);
}

void uart_init(struct uart *u, struct clock *clock, loop_fn *timer_fn, void *timer_opaque)
{
	u->clock = clock;
	timer_init(&u->timer, clock, timer_fn, timer_opaque);
	uart_reset(u);
}

void uart_reset(struct uart *u)
{
	u->ier = u->fcr = u->lcr = u->mcr = u->scr = 0;
	u->lsr = UART_LSR_THRE | UART_LSR_TEMT;
	u->msr = UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
	u->divisor = 12;                                        /* 9600 baud */
	u->thr_pending = u->timeout_pending = false;
	u->timeout_at = NEVER;
	u->rx.count = u->rx.head = u->txq.count = u->txq.head = 0;
	update_irq(u);
}
