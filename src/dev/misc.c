#include "dev/misc.h"

#include <errno.h>
#include <stdlib.h>

#include "base/util.h"

enum { KBD_OBF = 1, KBD_IBF = 2, KBD_SYS = 4, KBD_CMD = 8, KBD_UNLOCKED = 0x10, KBD_AUX = 0x20 };

struct pc_ports {
	struct machine_env *env;
	pthread_mutex_t lock;
	struct io_window win92, win80, win60, win64;
	uint8_t p92, post, rst;
	uint8_t kbd_status, kbd_data, kbd_mode, kbd_outport, kbd_cmd;
};

static void reset_machine(struct pc_ports *p)
{
	p->env->request(p->env->opaque, MACHINE_RESET, 0);
}

/* Bit 0 resets on a rising edge, bit 1 is A20, which is always open. */
static uint64_t p92_read(void *opaque, uint64_t off, unsigned size)
{
	return ((struct pc_ports *)opaque)->p92;
}

static void p92_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pc_ports *p = opaque;

	if ((val & 1) && !(p->p92 & 1))
		reset_machine(p);
	p->p92 = val & ~1u;
}

static uint64_t post_read(void *opaque, uint64_t off, unsigned size)
{
	return ((struct pc_ports *)opaque)->post;
}

static void post_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	((struct pc_ports *)opaque)->post = val;
}

uint8_t pc_reset_control_read(void *opaque)
{
	return __atomic_load_n(&((struct pc_ports *)opaque)->rst, __ATOMIC_RELAXED);
}

/* ICH9, 13.7.5: a rising edge of bit 2 resets; bit 1 chooses how hard, which is all the same here. */
void pc_reset_control_write(void *opaque, uint8_t val)
{
	struct pc_ports *p = opaque;

	if (val & 4)
		reset_machine(p);
	__atomic_store_n(&p->rst, val & 0x0a, __ATOMIC_RELAXED);
}

static void kbd_reply(struct pc_ports *p, uint8_t v)
{
	p->kbd_data = v;
	p->kbd_status |= KBD_OBF;
}

static uint64_t kbd_data_read(void *opaque, uint64_t off, unsigned size)
{
	struct pc_ports *p = opaque;

	p->kbd_status &= ~KBD_OBF;
	return p->kbd_data;
}

static void kbd_data_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pc_ports *p = opaque;
	uint8_t cmd = p->kbd_cmd;

	p->kbd_cmd = 0;
	p->kbd_status &= ~KBD_CMD;
	if (cmd == 0x60)
		p->kbd_mode = val;
	else if (cmd == 0xd1)
		p->kbd_outport = val | 1;
	if (cmd == 0xd1 && !(val & 1))
		reset_machine(p);
	if (cmd == 0xd2)
		kbd_reply(p, val);
	/* Otherwise meant for a keyboard or mouse that is not there: no answer. */
}

static uint64_t kbd_status_read(void *opaque, uint64_t off, unsigned size)
{
	return ((struct pc_ports *)opaque)->kbd_status;
}

static void kbd_command(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct pc_ports *p = opaque;

	p->kbd_status |= KBD_CMD;
	switch (val & 0xff) {
	case 0x20: kbd_reply(p, p->kbd_mode); break;
	case 0xa7: p->kbd_mode |= 0x20; break;
	case 0xa8: p->kbd_mode &= ~0x20; break;
	case 0xa9: case 0xab: kbd_reply(p, 0x01); break;        /* interface test: clock line stuck low */
	case 0xaa: p->kbd_status |= KBD_SYS; kbd_reply(p, 0x55); break;
	case 0xad: p->kbd_mode |= 0x10; break;
	case 0xae: p->kbd_mode &= ~0x10; break;
	case 0xc0: kbd_reply(p, 0x80); break;
	case 0xd0: kbd_reply(p, p->kbd_outport); break;
	case 0x60: case 0xd1: case 0xd2: case 0xd3: case 0xd4: p->kbd_cmd = val; break;
	case 0xdd: p->kbd_outport &= ~2; break;
	case 0xdf: p->kbd_outport |= 2; break;
	default:
		if ((val & 0xf1) == 0xf0)                       /* pulse output bit 0: the reset line */
			reset_machine(p);
	}
}

static const struct io_ops p92_ops = { p92_read, p92_write, 1, 1 };
static const struct io_ops post_ops = { post_read, post_write, 1, 1 };
static const struct io_ops kbd_data_ops = { kbd_data_read, kbd_data_write, 1, 1 };
static const struct io_ops kbd_status_ops = { kbd_status_read, kbd_command, 1, 1 };

static void ports_init(struct pc_ports *p)
{
	p->p92 = 2;
	p->post = 0;
	__atomic_store_n(&p->rst, 0, __ATOMIC_RELAXED);
	p->kbd_status = KBD_UNLOCKED;
	p->kbd_data = p->kbd_cmd = 0;
	p->kbd_mode = 0x30;
	p->kbd_outport = 3;
}

void pc_ports_reset(struct pc_ports *p)
{
	pthread_mutex_lock(&p->lock);
	ports_init(p);
	pthread_mutex_unlock(&p->lock);
}

static int map(struct pc_ports *p, struct io_window *w, const char *name, const struct io_ops *ops, uint16_t port,
	       struct err *err)
{
	*w = (struct io_window){ .name = name, .ops = ops, .opaque = p, .lock = &p->lock, .size = 1 };
	return io_map(p->env->ports, w, port, err);
}

int pc_ports_create(struct pc_ports **out, struct machine_env *env, struct err *err)
{
	struct pc_ports *p = calloc(1, sizeof(*p));
	int r;

	if (!p)
		return err_set(err, -ENOMEM, "no memory for the system ports");
	p->env = env;
	pthread_mutex_init(&p->lock, NULL);
	ports_init(p);
	r = map(p, &p->win92, "port92", &p92_ops, 0x92, err);
	if (!r)
		r = map(p, &p->win80, "post", &post_ops, 0x80, err);
	if (!r)
		r = map(p, &p->win60, "i8042-data", &kbd_data_ops, 0x60, err);
	if (!r)
		r = map(p, &p->win64, "i8042-command", &kbd_status_ops, 0x64, err);
	if (r) {
		pc_ports_destroy(p);
		return r;
	}
	*out = p;
	return 0;
}

void pc_ports_destroy(struct pc_ports *p)
{
	if (!p)
		return;

	struct io_window *w[] = { &p->win92, &p->win80, &p->win60, &p->win64 };

	for (unsigned i = 0; i < ARRAY_SIZE(w); i++)
		if (w[i]->mapped)
			io_unmap(p->env->ports, w[i]);
	pthread_mutex_destroy(&p->lock);
	free(p);
}
