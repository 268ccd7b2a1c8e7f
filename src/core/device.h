/*
 * Device class: one constant per kind of device. Its property table feeds the command line, QMP,
 * `-device X,help` and the manual. `board` holds the one table of all classes; nothing registers
 * itself.
 */
#ifndef CORE_DEVICE_H
#define CORE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "core/io.h"
#include "core/irq.h"

enum prop_type {
	PROP_BOOL,      /* bool: on/off/yes/no/true/false */
	PROP_U8, PROP_U16, PROP_U32, PROP_U64,
	PROP_BOOTINDEX, /* int32_t place in the boot order, -1: none (the default) */
	PROP_SIZE,      /* uint64_t with a suffix */
	PROP_STR,       /* char *, owned by the device */
	PROP_MAC,       /* uint8_t[6] */
	PROP_PCI_ADDR,  /* int32_t devfn ("3", "3.1"), -1 when not given */
	PROP_DRIVE,     /* struct block *, by -drive/-blockdev id; `dflt`: the drive may be empty, which is NULL */
	PROP_NETDEV,    /* struct net_backend *, by -netdev id */
	PROP_CHARDEV,   /* struct chardev *, by -chardev id */
	PROP_IOTHREAD,  /* struct iothread *, by -object iothread id */
	PROP_IOTHREADS, /* struct iothread *[PROP_IOTHREADS_MAX], ids separated by colons; NULL behind the last */
	PROP_ENUM,      /* int, index into `values` */
};

enum { PROP_IOTHREADS_MAX = 16 };

struct prop {
	const char *name;
	enum prop_type type;
	size_t offset;              /* in the device's own struct */
	uint64_t dflt;              /* default for number-like types */
	const char *dflt_str;       /* default for PROP_STR and PROP_ENUM */
	uint64_t min, max;          /* numbers; max 0: no limit */
	const char *const *values;  /* PROP_ENUM: NULL-terminated */
	const char *help;
};

struct guest_mem;
struct loop;
struct workers;
struct clock;
struct pci_bus;

enum machine_request { MACHINE_STOP /* until machine_resume() */, MACHINE_RESET, MACHINE_POWEROFF, MACHINE_EXIT };

/* What a device may use of its machine. */
struct machine_env {
	struct guest_mem *mem;
	struct io_space *ports, *mmio;
	struct msi_sink msi;
	struct loop *loop;
	struct clock *clock;
	struct workers *workers;
	struct pci_bus *pci;                                    /* root bus */
	struct irq_line (*isa_irq)(void *opaque, int n);        /* ISA interrupt 0..15 */
	/* Any thread; takes effect soon. `status` is the process's exit status, for MACHINE_EXIT. */
	void (*request)(void *opaque, enum machine_request r, int status);
	void *opaque;
};

struct device_class;

/* First member of every device struct. */
struct device {
	const struct device_class *cls;
	char *id;                       /* from id=, or NULL */
	struct machine_env *env;
	struct device *parent;          /* who provides `cls->bus` when that is a device's own bus; set by the machine before create */
	struct device *next;            /* the machine's list */
};

struct saved_state;                     /* named fields; see core/state.h when it exists */

struct device_class {
	const char *name;               /* QEMU's name: "virtio-blk-pci" */
	const char *const *aliases;     /* NULL-terminated, or NULL */
	const char *desc;
	const char *bus;                /* "PCI", "ISA", "virtio-serial-bus"; NULL: system */
	const char *provides;           /* bus that other devices plug into ("virtio-serial-bus"), or NULL */
	const struct prop *props;       /* ends with .name == NULL; NULL: none */
	size_t size;                    /* of the device's own struct, zeroed before create */
	int (*create)(struct device *d, struct err *err);       /* properties are set; undo all on failure */
	void (*destroy)(struct device *d);
	void (*reset)(struct device *d);
	void (*pause)(struct device *d, bool paused);           /* stop and resume back-end activity */
	/*
	 * What firmware may boot from: the device's bootindex, or -1, and in `path` the name that it goes by there (an Open
	 * Firmware path as in QEMU's fw_cfg file "bootorder"). NULL: nothing to boot from.
	 */
	int32_t (*boot)(struct device *d, char *path, size_t len);
};

/* Set defaults, then one property from text. Errors name the device and the property. */
int device_set_defaults(struct device *d, struct err *err);
/* How a property finds a back end by id; the machine supplies it. NULL result: not found (err set). */
struct backend_lookup { void *(*find)(void *opaque, enum prop_type type, const char *id, struct err *err); void *opaque; };
int device_set_prop(struct device *d, const char *name, const char *value,
		    const struct backend_lookup *find, struct err *err);
/* Allocate with defaults; -ENOMEM. */
int device_alloc(struct device **out, const struct device_class *cls, struct machine_env *env,
		 const char *id, struct err *err);
int device_create(struct device *d, struct err *err);   /* runs cls->create */
void device_free(struct device *d);                      /* runs cls->destroy when created; frees props */
const struct prop *device_class_prop(const struct device_class *cls, const char *name);

#endif
