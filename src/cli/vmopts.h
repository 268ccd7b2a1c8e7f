/*
 * What the command line asks for, before anything is opened: filled in by the option handlers of
 * `lodge run` and `lodge qemu` alike, then turned into back ends and a machine_config.
 */
#ifndef CLI_VMOPTS_H
#define CLI_VMOPTS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/err.h"
#include "block/block.h"
#include "block/throttle.h"
#include "board/machine.h"
#include "tls/tls.h"
#include "base/keyvals.h"
#include "cli/sandbox.h"

struct vm_device { struct keyvals opts; };              /* "driver" is the class */
struct vm_throttle { char *name; struct throttle_limits limits; };  /* -object throttle-group */
struct vm_drive {
	struct block_opts b;            /* strings owned by `text` */
	struct keyvals text;
	struct keyvals leaf, backing, data; /* file.driver=..., backing.*, data-file.*, for the block layer */
	struct keyvals node;            /* whole: driver= names no format and no file, and this describes it */
	bool whole;
	char *id, *file;
	const char *place;              /* index= or unit=, on the bus of `cls`; NULL: the next free one */
	bool empty;                     /* a drive without a medium */
	const char *cls;                /* of the device behind it, NULL: a -device names it */
	struct throttle_limits limits;
	const char *group;              /* throttling.group */
};
struct vm_node { struct keyvals opts, flat; };          /* -blockdev; flat: with the nodes it refers to, for the block layer */
struct vm_spec { char *id, *text; };                    /* -netdev, -chardev: text for the back end */
struct vm_object { struct keyvals opts; char *type, *id; };
struct vm_global { char *driver, *prop, *value; };

#define VM_LIST(type, name) struct type *name; unsigned n##name

struct vm_opts {
	bool qemu;                      /* QEMU's words (else `lodge run`'s) */
	char *type, *cpu_model, *kernel, *initrd, *append, *bios, *name, *uuid, *pidfile, *logfile, *mem_backend;
	enum kvm_accel accel;
	struct kvm_soft_config soft;
	char *stats_file;               /* -accel stats=FILE */
	uint64_t mem_size;
	unsigned cpus, sockets, cores, threads;
	bool boot_strict, dump_guest_core;
	bool hugepages, prealloc, mem_private, localtime, no_reboot, no_shutdown, snapshot, nodefaults, nographic, display_none,
	     timestamps, stats;
	int64_t rtc_offset;
	int log_level;
	FILE *log;                      /* where messages of a running machine go; main.c's */
	struct sandbox_config sandbox;
	bool spawn_given;               /* -sandbox spawn= was said */
	VM_LIST(vm_device, devices);
	VM_LIST(vm_drive, drives);
	VM_LIST(vm_node, nodes);
	VM_LIST(vm_spec, netdevs);
	VM_LIST(vm_spec, chardevs);
	VM_LIST(vm_object, objects);
	struct tls_store tls;
	VM_LIST(vm_global, globals);
	VM_LIST(vm_throttle, throttles);
	bool serial_given, net_given, scsi_added;
	unsigned auto_ids;
	char **pool;                    /* strings that live as long as this */
	unsigned npool;
};

enum { OPT_DONE = 1 };  /* from a handler: help was printed, end with status 0 */

void vmopts_init(struct vm_opts *o, bool qemu);
void vmopts_free(struct vm_opts *o);
/* printf into a string that lives as long as `o`; never NULL (ends the program when memory is out). */
char *vmopts_printf(struct vm_opts *o, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* One more zeroed element of a VM_LIST. */
void *vmopts_grow(void *list, unsigned *n, size_t size);
#define vmopts_add(o, list) ((__typeof__((o)->list))vmopts_grow(&(o)->list, &(o)->n##list, sizeof *(o)->list))

/* A -device from parts: key, value, key, value, NULL. */
void vmopts_device(struct vm_opts *o, const char *cls, ...) __attribute__((sentinel));

/* Parse a command line of either kind; 0, OPT_DONE, or -errno. */
int vmopts_parse(struct vm_opts *o, int argc, char **argv, struct err *err);
/* What a machine has without being asked (console, network), and what was asked twice or in conflict. */
int vmopts_finish(struct vm_opts *o, struct err *err);
/* Open back ends, create the machine, run it; the process's exit status. */
int vm_run(struct vm_opts *o);

#endif
