/*
 * A tiny machine and a tiny driver for the virtio tests: real guest memory, I/O space, PCI bus,
 * block layer and stepped clock; network and character back ends that record.
 */
#ifndef TESTS_VT_H
#define TESTS_VT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/util.h"
#include "chr/chr.h"
#include "core/device.h"
#include "core/mem.h"
#include "loop/loop.h"
#include "net/net.h"
#include "pci/pci.h"

#define VT_RAM (16u << 20)
#define VT_BAR 0xe0000000u
#define VT_MSIX 0xe1000000u

struct vt {
	struct machine_env env;
	struct pci_device *pci;
	struct device *dev;
	struct net_client net_client;
	struct chr_client chr_client;
	uint64_t heap;                  /* next free guest byte */
	uint32_t msi[64];               /* messages per data value; atomic */
	int intx;
	struct vt_net { int sent; uint8_t last[2048]; size_t last_len; int resumed; bool full; } net;
	struct vt_chr { uint8_t out[4096]; size_t n_out; size_t room; int accepted; } chr;
};

void vt_start(struct vt *t);
void vt_stop(struct vt *t);
/* Create a device from "name=value" properties, NULL ended; back ends by pointer. */
int vt_device(struct vt *t, const struct device_class *cls, struct device *parent, struct device **out,
	      const struct backend_lookup *find, const char *const *props);
void vt_map(struct vt *t);              /* BARs and bus mastering of the only device */
uint64_t vt_rd(struct vt *t, unsigned off, unsigned size);
void vt_wr(struct vt *t, unsigned off, uint64_t val, unsigned size);
uint64_t vt_alloc(struct vt *t, size_t len);
void *vt_ptr(struct vt *t, uint64_t gpa);
/* Reset, negotiate (want & offered) with VERSION_1 added; false when FEATURES_OK did not stick. */
bool vt_negotiate(struct vt *t, uint64_t want);
void vt_driver_ok(struct vt *t);
uint8_t vt_status(struct vt *t);
void vt_msix(struct vt *t, unsigned vectors);
/* The back ends' side. */
bool vt_net_receive(struct vt *t, const void *f, size_t n);
void vt_net_can_send(struct vt *t);
void vt_chr_event(struct vt *t, int e);
size_t vt_chr_input(struct vt *t, const char *s);

/* The driver's side of a queue. */
struct vq {
	struct vt *t;
	unsigned index, size;
	bool packed, event_idx;
	uint64_t desc, driver, device, table;
	uint16_t avail, used;           /* split: free running; packed: slot */
	bool avail_wrap, used_wrap;
	uint16_t next_free;
	uint16_t skip[1024];            /* packed: slots by id */
};
struct vseg { uint64_t gpa; uint32_t len; bool write; };
void vq_setup(struct vq *q, struct vt *t, unsigned index, unsigned size, bool packed, bool event_idx);
uint16_t vq_add(struct vq *q, const struct vseg *s, unsigned n, bool indirect);
void vq_kick(struct vq *q);
bool vq_used(struct vq *q, uint16_t *id, uint32_t *len);
/* Raw access for malformed rings. */
void vq_desc(struct vq *q, unsigned i, uint64_t addr, uint32_t len, uint16_t a, uint16_t b);
void vq_publish(struct vq *q, uint16_t head);   /* split */

#endif
