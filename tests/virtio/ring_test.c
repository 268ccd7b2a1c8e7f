/* Rings of both formats against a small driver, and every way of breaking one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "virtio/virtio.h"
#include "vt.h"

enum { NEEDS_RESET = 0x40 };
#define F_INDIRECT BIT(28)
#define F_EVENT BIT(29)
#define F_PACKED BIT(34)

static void start(struct vt *t, struct vq *q, uint64_t features, unsigned size)
{
	static const char *const props[] = { "packed", "on", NULL };

	vt_start(t);
	assert_int_equal(vt_device(t, &virtio_rng_pci_class, NULL, NULL, NULL, props), 0);
	vt_map(t);
	assert_true(vt_negotiate(t, features));
	vq_setup(q, t, 0, size, features & F_PACKED, features & F_EVENT);
	vt_driver_ok(t);
}

/* Many turns of the ring, chains of changing shape, some kicked in groups. */
static void turns(uint64_t features, unsigned size)
{
	struct vt t;
	struct vq q;
	uint64_t buf;

	start(&t, &q, features, size);
	buf = vt_alloc(&t, 4096);
	for (unsigned i = 0; i < 70000 / (features & F_EVENT ? 1 : 10); i++) {
		unsigned n = 1 + i % 2, group = n == 2 ? 1 : 1 + i % 3;
		bool ind = (features & F_INDIRECT) && i % 5 == 0;
		uint16_t ids[4], id;
		uint32_t len;

		for (unsigned g = 0; g < group; g++) {
			struct vseg s[2] = { { buf + g * 64, 16, true }, { buf + 32 + g * 64, 5, true } };

			ids[g] = vq_add(&q, s, n, ind);
		}
		vq_kick(&q);
		for (unsigned g = 0; g < group; g++) {
			assert_true(vq_used(&q, &id, &len));
			assert_int_equal(id, ids[g]);
			assert_int_equal(len, n == 2 ? 21 : 16);
		}
		assert_false(vq_used(&q, &id, &len));
	}
	assert_int_equal(vt_status(&t), 15);
	vt_stop(&t);
}

static void test_split(void **s) { turns(0, 4); turns(F_EVENT | F_INDIRECT, 8); }
static void test_packed(void **s) { turns(F_PACKED, 4); turns(F_PACKED | F_EVENT | F_INDIRECT, 7); }

typedef void break_fn(struct vt *t, struct vq *q);

static void put(struct vq *q, uint64_t gpa, uint32_t len, uint16_t flags)
{
	if (q->packed)
		vq_desc(q, 0, gpa, len, 0, flags | 1 << 7);
	else
		vq_desc(q, 0, gpa, len, flags, 0);
	if (!q->packed)
		vq_publish(q, 0);
}

static void b_outside(struct vt *t, struct vq *q) { put(q, VT_RAM, 16, 2); }
static void b_edge(struct vt *t, struct vq *q) { put(q, VT_RAM - 8, 16, 2); }
static void b_wrap(struct vt *t, struct vq *q) { put(q, UINT64_MAX - 7, 16, 2); }
static void b_zero(struct vt *t, struct vq *q) { put(q, 0x1000, 0, 2); }
static void b_indirect_next(struct vt *t, struct vq *q) { put(q, q->table, 16, 4 | 1); }
static void b_indirect_len(struct vt *t, struct vq *q) { put(q, q->table, 17, 4); }
static void b_indirect_none(struct vt *t, struct vq *q) { put(q, q->table, 0, 4); }
static void b_indirect_long(struct vt *t, struct vq *q) { put(q, q->table, 0xfffffff0, 4); }
static void b_indirect_out(struct vt *t, struct vq *q) { put(q, UINT64_MAX - 15, 32, 4); }

static void table(struct vq *q, unsigned i, uint64_t gpa, uint32_t len, uint16_t flags, uint16_t next)
{
	uint8_t *p = (uint8_t *)vt_ptr(q->t, q->table) + i * 16;

	st_le64(p, gpa);
	st_le32(p + 8, len);
	st_le16(p + 12, q->packed ? 0 : flags);
	st_le16(p + 14, q->packed ? flags : next);
}

static void b_nested(struct vt *t, struct vq *q)
{
	table(q, 0, q->table, 16, 4, 0);
	put(q, q->table, 16, 4);
}

static void b_order(struct vt *t, struct vq *q)
{
	table(q, 0, 0x1000, 16, 2 | 1, 1);
	table(q, 1, 0x2000, 16, 0, 0);
	put(q, q->table, 32, 4);
}

static void b_loop(struct vt *t, struct vq *q)
{
	if (q->packed) {
		for (unsigned i = 0; i < q->size; i++)
			vq_desc(q, i, 0x1000, 16, 0, 2 | 1 | 1 << 7);
		return;
	}
	put(q, 0x1000, 16, 2 | 1);
}

static void b_table_loop(struct vt *t, struct vq *q)
{
	table(q, 0, 0x1000, 16, 2 | 1, 1);
	table(q, 1, 0x1000, 16, 2 | 1, 0);
	put(q, q->table, 32, 4);
	if (q->packed)
		put(q, 0, 0, 2);        /* NEXT means nothing there; break it otherwise */
}

static void b_head(struct vt *t, struct vq *q) { vq_publish(q, q->size); }
static void b_next(struct vt *t, struct vq *q) { vq_desc(q, 0, 0x1000, 16, 2 | 1, q->size); vq_publish(q, 0); }
static void b_jump(struct vt *t, struct vq *q) { q->avail += q->size; vq_publish(q, 0); }
static void b_table_next(struct vt *t, struct vq *q)
{
	table(q, 0, 0x1000, 16, 2 | 1, 2);
	put(q, q->table, 32, 4);
}

static void broken(break_fn *fn, uint64_t features)
{
	struct vt t;
	struct vq q;
	uint16_t id;
	uint32_t len;

	start(&t, &q, features, 8);
	vt_msix(&t, 2);
	vt_wr(&t, 16, 1, 2);
	fn(&t, &q);
	vq_kick(&q);
	assert_true(vt_status(&t) & NEEDS_RESET);
	assert_int_equal(t.msi[1], 1);
	assert_false(vq_used(&q, &id, &len));
	vq_kick(&q);
	/* A reset mends it. */
	assert_true(vt_negotiate(&t, features));
	vq_setup(&q, &t, 0, 8, features & F_PACKED, false);
	vt_driver_ok(&t);
	vq_add(&q, &(struct vseg){ 0x1000, 16, true }, 1, false);
	vq_kick(&q);
	assert_true(vq_used(&q, &id, &len));
	vt_stop(&t);
}

static void test_broken(void **s)
{
	static break_fn *const both[] = { b_outside, b_edge, b_wrap, b_zero, b_indirect_next, b_indirect_len,
		b_indirect_none, b_indirect_long, b_indirect_out, b_nested, b_order, b_loop, b_table_loop };
	static break_fn *const split[] = { b_head, b_next, b_jump, b_table_next };

	for (unsigned i = 0; i < ARRAY_SIZE(both); i++) {
		broken(both[i], F_INDIRECT);
		broken(both[i], F_INDIRECT | F_PACKED);
	}
	for (unsigned i = 0; i < ARRAY_SIZE(split); i++)
		broken(split[i], F_INDIRECT);
	/* Indirect without the feature. */
	broken(b_indirect_len, 0);
	broken(b_indirect_len, F_PACKED);
}

/* A buffer across two neighbouring slots of RAM is one buffer. */
static void test_span(void **s)
{
	struct vt t;
	struct vq q;
	uint16_t id;
	uint32_t len;

	start(&t, &q, 0, 8);
	vq_add(&q, &(struct vseg){ VT_RAM / 2 - 100, 200, true }, 1, false);
	vq_kick(&q);
	assert_true(vq_used(&q, &id, &len));
	assert_int_equal(len, 200);
	vt_stop(&t);
}

/* Notifications: none when the driver says so, one when used_event is passed. */
static void test_suppress(void **st)
{
	for (int mode = 0; mode < 4; mode++) {
		bool packed = mode & 1, event = mode & 2;
		struct vt t;
		struct vq q;
		uint16_t id;
		uint32_t len;

		start(&t, &q, (packed ? F_PACKED : 0) | (event ? F_EVENT : 0), 8);
		vt_msix(&t, 2);
		vt_wr(&t, 22, 0, 2);
		vt_wr(&t, 26, 1, 2);
		for (unsigned i = 0; i < 6; i++) {
			uint8_t *drv = vt_ptr(&t, q.driver);

			if (packed) {
				st_le16(drv, 5 | 1 << 15);
				st_le16(drv + 2, event ? 2 : 1);
			} else if (event) {
				st_le16(drv + 4 + 2 * q.size, 5);
				q.event_idx = false;
			} else {
				st_le16(drv, 1);
			}
			vq_add(&q, &(struct vseg){ 0x1000, 16, true }, 1, false);
			vq_kick(&q);
			assert_true(vq_used(&q, &id, &len));
			if (i == 0)     /* nothing was signalled before: the first may be */
				t.msi[1] = 0;
		}
		assert_int_equal(t.msi[1], event ? 1 : 0);
		vt_stop(&t);
	}
}

/* Register machine: bad features, sizes, addresses, status order, queue reset. */
static void test_registers(void **s)
{
	struct vt t;
	struct vq q;
	uint16_t id;
	uint32_t len;

	start(&t, &q, 0, 8);
	vt_wr(&t, 20, 0, 1);
	assert_int_equal(vt_status(&t), 0);
	vt_wr(&t, 20, 3, 1);
	vt_wr(&t, 20, 11, 1);           /* no VERSION_1 */
	assert_int_equal(vt_status(&t), 3);
	vt_wr(&t, 20, 15, 1);
	assert_int_equal(vt_status(&t), 3);
	vt_wr(&t, 8, 1, 4);
	vt_wr(&t, 12, 0x8001, 4);       /* one that is not offered */
	vt_wr(&t, 20, 11, 1);
	assert_int_equal(vt_status(&t), 3);
	assert_true(vt_negotiate(&t, BIT(40)));
	vt_wr(&t, 22, 7, 2);            /* no such queue */
	assert_int_equal(vt_rd(&t, 24, 2), 0);
	vt_wr(&t, 28, 1, 2);
	vt_wr(&t, 22, 0, 2);
	vt_wr(&t, 24, 4096, 2);
	assert_int_equal(vt_rd(&t, 24, 2), 8);
	vt_wr(&t, 26, 77, 2);
	assert_int_equal(vt_rd(&t, 26, 2), 0xffff);
	vq_setup(&q, &t, 0, 8, false, false);
	vt_driver_ok(&t);
	assert_int_equal(vt_rd(&t, 28, 2), 1);
	vt_wr(&t, 58, 1, 2);
	assert_int_equal(vt_rd(&t, 58, 2), 0);
	assert_int_equal(vt_rd(&t, 28, 2), 0);
	vq_setup(&q, &t, 0, 4, false, false);
	vq_add(&q, &(struct vseg){ 0x1000, 16, true }, 1, false);
	vq_kick(&q);
	assert_true(vq_used(&q, &id, &len));
	/* INTx: the ISR says why and lowers the line. */
	assert_int_equal(t.intx, 1);
	assert_int_equal(vt_rd(&t, 0x1000, 1), 1);
	assert_int_equal(t.intx, 0);
	assert_int_equal(vt_rd(&t, 0x1000, 1), 0);
	/* A ring outside of RAM. */
	assert_true(vt_negotiate(&t, 0));
	vt_wr(&t, 22, 0, 2);
	vt_wr(&t, 32, UINT64_MAX - 15, 8);
	vt_wr(&t, 28, 1, 2);
	assert_true(vt_status(&t) & NEEDS_RESET);
	assert_int_equal(vt_rd(&t, 28, 2), 0);
	vt_stop(&t);
}

/* The window in config space reaches the same registers. */
static void test_cfg_window(void **s)
{
	struct vt t;
	struct vq q;
	unsigned c;

	start(&t, &q, 0, 8);
	for (c = t.pci->cfg[0x34]; c && !(t.pci->cfg[c] == 9 && t.pci->cfg[c + 3] == 5); c = t.pci->cfg[c + 1])
		;
	assert_true(c);
	pci_config_write(t.env.pci, t.pci->devfn, c + 4, 4, 1);
	pci_config_write(t.env.pci, t.pci->devfn, c + 8, 20, 4);
	pci_config_write(t.env.pci, t.pci->devfn, c + 12, 1, 4);
	assert_int_equal(pci_config_read(t.env.pci, t.pci->devfn, c + 16, 1), 15);
	pci_config_write(t.env.pci, t.pci->devfn, c + 16, 0, 1);
	assert_int_equal(vt_status(&t), 0);
	pci_config_write(t.env.pci, t.pci->devfn, c + 8, 0xfffffffc, 4);
	pci_config_write(t.env.pci, t.pci->devfn, c + 12, 4, 4);
	pci_config_read(t.env.pci, t.pci->devfn, c + 16, 4);
	pci_config_write(t.env.pci, t.pci->devfn, c + 16, 1, 4);
	vt_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_split), cmocka_unit_test(test_packed), cmocka_unit_test(test_broken),
		cmocka_unit_test(test_span), cmocka_unit_test(test_suppress), cmocka_unit_test(test_registers),
		cmocka_unit_test(test_cfg_window),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
