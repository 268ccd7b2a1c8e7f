/* Random port accesses, back-end events and resets on the ISA device classes, with back ends that push back. */
#include <string.h>

#include "../pci/fuzz.h"
#include "base/util.h"
#include "chr/chr.h"
#include "dev/dev.h"
#include "fix.h"

static const struct device_class *const classes[] = { &isa_serial_class, &isa_debugcon_class, &isa_debug_exit_class,
						      &pc_testdev_class };

struct chardev { struct chr_client cl; size_t room; };

int chr_attach(struct chardev *c, const struct chr_client *cl, const char *owner, struct err *err)
{
	c->cl = *cl;
	return 0;
}
void chr_detach(struct chardev *c, const void *opaque) { }
void chr_accept_input(struct chardev *c) { }
size_t chr_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	size_t n = MIN(len, c->room);

	c->room -= n;
	return n;
}
static void *find_chr(void *opaque, enum prop_type type, const char *id, struct err *err) { return opaque; }

static void step(struct fix *f, struct device **d, struct chardev *c, const uint8_t *p)
{
	static const uint16_t base[] = { 0x3f8, 0x3f8, 0xe9, 0x501, 0x3f8, 0x3f8, 0xe0, 0x2000 };
	uint16_t port = base[p[1] & 7] + ((p[1] & 7) == 7 ? p[2] & 31 : (p[1] & 7) == 6 ? p[2] & 15 : p[1] & 2 ? p[2] & 1 : p[2] & 7);
	uint8_t buf[64] = { 0 };

	c += p[3] >> 7; /* the serial port's back end or the debug console's */
	switch (p[0] & 7) {
	case 0: case 1: case 2:
		out(f, port, ld_le32(p + 4), 1u << (p[3] % 3));
		break;
	case 3:
		in(f, port, 1u << (p[3] % 3));
		break;
	case 4:
		c->room = p[2];
		c->cl.event(c->cl.opaque, p[1] & 3);
		break;
	case 5:
		c->cl.receive(c->cl.opaque, buf, MIN(c->cl.can_receive(c->cl.opaque), MIN((size_t)p[1], sizeof(buf))));
		break;
	case 6:
		if (p[1] < 8)
			d[0]->cls->reset(d[0]);
		break;
	case 7:
		io_write(f->env.mmio, 0xff000000 + ld_le16(p + 1), p, 1u << (p[3] & 3));
		io_read(f->env.mmio, 0xff000000 + ld_le16(p + 4), buf, 1u << (p[6] & 3));
		/* fall through */
	default:
		clock_step(f->env.clock, ld_le32(p + 4) & 0xffffff);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct chardev c[ARRAY_SIZE(classes)] = { 0 };
	struct device *d[ARRAY_SIZE(classes)];
	struct err err;
	struct fix f;

	fix_init(&f);
	for (unsigned i = 0; i < ARRAY_SIZE(classes); i++) {
		struct backend_lookup find = { find_chr, &c[i] };

		if (device_alloc(&d[i], classes[i], &f.env, NULL, &err) ||
		    (device_class_prop(classes[i], "chardev") && device_set_prop(d[i], "chardev", "x", &find, &err)) ||
		    device_create(d[i], &err))
			abort();
	}
	FUZZ_EACH(data, len, 8)
		step(&f, d, c, data);
	for (unsigned i = 0; i < ARRAY_SIZE(classes); i++)
		device_free(d[i]);
	fix_done(&f);
	return 0;
}
