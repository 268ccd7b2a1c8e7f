/* A machine for chips alone: port space, a stepped clock, lines and requests that are recorded. */
#ifndef DEV_FIX_H
#define DEV_FIX_H

#include "core/device.h"
#include "core/io.h"
#include "loop/loop.h"

struct fix { struct machine_env env; int level[16], rises[16], requests; enum machine_request last; };

static void fix_set(void *o, int n, int level)
{
	struct fix *f = o;

	f->rises[n] += level && !f->level[n];
	f->level[n] = level;
}
static struct irq_line fix_irq(void *o, int n) { return (struct irq_line){ fix_set, o, n }; }
static void fix_request(void *o, enum machine_request r, int status)
{
	((struct fix *)o)->requests++;
	((struct fix *)o)->last = r;
}
static inline void fix_init(struct fix *f)
{
	*f = (struct fix){ .env = { .isa_irq = fix_irq, .request = fix_request, .opaque = f } };
	io_space_create(&f->env.ports, "ports", 0x10000, NULL);
	io_space_create(&f->env.mmio, "mmio", UINT64_MAX, NULL);
	f->env.clock = clock_stepped_create();
}
static inline void fix_done(struct fix *f)
{
	clock_stepped_destroy(f->env.clock);
	io_space_destroy(f->env.mmio);
	io_space_destroy(f->env.ports);
}
static inline uint32_t in(struct fix *f, uint16_t p, unsigned n)
{
	uint32_t v = 0;

	io_read(f->env.ports, p, &v, n);
	return v;
}
static inline void out(struct fix *f, uint16_t p, uint32_t v, unsigned n) { io_write(f->env.ports, p, &v, n); }

#endif
