/*
 * A machine: what `cli` asks for and how it is run.
 *
 * `cli` parses the command line into a machine_config, opens every back end (files, sockets,
 * interfaces) on the loop it made, and hands both over; creating devices comes last, so nothing is
 * half made when an option is wrong.
 */
#ifndef BOARD_MACHINE_H
#define BOARD_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "core/device.h"
#include "core/mem.h"
#include "kvm/kvm.h"

struct machine;

struct machine_prop { const char *name, *value; };

/* One -device (or what a shorthand like -drive if=virtio stands for). */
struct machine_device {
	const char *cls, *id;
	const struct machine_prop *props;
	unsigned nprops;
};

struct machine_config {
	const char *type;               /* "q35" ("pc" is an alias) or "microvm" */
	enum kvm_accel accel;
	struct kvm_soft_config soft;
	const char *cpu_model;          /* "host,+avx2,-smap"; NULL: host */
	unsigned cpus;                  /* 1..64 */
	unsigned sockets, cores, threads;       /* 0: derived; else the product is `cpus` */
	uint64_t mem_size;
	struct mem_backing mem_backing;
	const char *kernel, *initrd, *append;   /* initrd: multiboot modules are comma separated as in QEMU */
	const char *bios;
	bool rtc_localtime;
	int64_t rtc_offset;             /* seconds from now, -rtc base=DATE */
	bool boot_strict;               /* firmware tries nothing that has no bootindex */
	bool no_reboot, no_shutdown, paused;
	const char *name, *uuid;        /* for SMBIOS */
	const struct machine_device *devices;
	unsigned ndevices;
	struct loop *loop;
	struct workers *workers;
	struct backend_lookup backends; /* by id, for device properties */
};

/* Everything but running: 0 with *out set, or -errno with nothing left behind. */
int machine_create(struct machine **out, const struct machine_config *cfg, struct err *err);
/* Before machine_run(): see vcpus_on_start(). */
void machine_on_vcpu_start(struct machine *m, int (*fn)(void *opaque), void *opaque);
/* Start the vCPUs and run the loop until the machine ends; the process's exit status. */
int machine_run(struct machine *m);
/* Any thread. `status` is for MACHINE_EXIT (the debug exit device). MACHINE_STOP stops vCPUs and devices (an I/O error whose
   policy is to stop); machine_resume() goes on and tries again what failed. */
void machine_request(struct machine *m, enum machine_request r, int status);
/* On the loop's thread: go on after MACHINE_STOP; nothing when it runs. */
void machine_resume(struct machine *m);
bool machine_stopped(const struct machine *m);
/* A virtual CPU by number; NULL past the last. */
struct kvm_vcpu *machine_vcpu(struct machine *m, unsigned i);
void machine_destroy(struct machine *m);

/* The one table of device classes; NULL past the end, in the order of the manual. */
const struct device_class *device_class_at(unsigned i);
/* By name or alias; NULL: unknown. */
const struct device_class *device_class_find(const char *name);
/* CPU models and feature names for `-cpu help`; NULL past the end. */
const char *cpu_model_at(unsigned i);
const char *cpu_feature_at(unsigned i);

#endif
