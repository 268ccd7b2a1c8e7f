/*
 * The one table of command-line options: it feeds the parser, `--help` and the manual page.
 */
#ifndef CLI_OPTIONS_H
#define CLI_OPTIONS_H

#include "cli/vmopts.h"

enum { CTX_RUN = 1, CTX_QEMU = 2 };     /* `lodge run --name`, `lodge qemu -name` */

typedef int option_fn(struct vm_opts *o, const char *arg, struct err *err);

struct option_def {
	const char *name;
	const char *arg;                /* what the argument is called; NULL: takes none */
	unsigned ctx;
	option_fn *fn;
	const char *help;               /* one sentence; NULL: a synonym, not shown */
	const char *group;              /* heading in the help, set on the first of its group */
};

/* NULL past the end. */
const struct option_def *option_at(unsigned i);
const struct option_def *option_find(unsigned ctx, const char *name);

/* Handlers, by file. */
option_fn opt_machine, opt_accel, opt_enable_kvm, opt_cpu, opt_smp, opt_memory, opt_rtc, opt_boot, opt_name, opt_uuid,
	opt_no_reboot, opt_no_shutdown, opt_kernel, opt_initrd, opt_append, opt_bios, opt_hugepages, opt_mem_prealloc,
	opt_cpus;                                                                       /* opt_machine.c */
option_fn opt_drive, opt_blockdev, opt_hd, opt_cdrom, opt_disk, opt_snapshot;           /* opt_block.c */
option_fn opt_device, opt_object, opt_global, opt_netdev, opt_nic, opt_net, opt_run_net;        /* opt_device.c */
option_fn opt_chardev, opt_serial, opt_console, opt_debugcon, opt_parallel, opt_monitor, opt_nographic, opt_display,
	opt_vga, opt_none;                                                              /* opt_chr.c */
option_fn opt_nodefaults, opt_ignored_config, opt_pidfile, opt_logfile, opt_msg, opt_sandbox, opt_log_level, opt_help,
	opt_version, opt_stats;                                                               /* options.c */

/* `lodge kvm-run` (returns only on failure) and `lodge kvm-info`: exit status. kvmrun.c, kvminfo.c */
int verb_kvm_run(int argc, char **argv);
int verb_kvm_info(int argc, char **argv);

/* help.c: to standard output. */
void help_usage(unsigned ctx);
void help_devices(void);
int help_device(const char *cls, struct err *err);
void help_manual(void);                 /* the manual page, roff */
void help_keys(void);

/* opt_throttle.c: limits under `prefix` ("throttling.", with the old names; "x-"; "limits."), checked. */
int throttle_keys(struct keyvals *l, const char *what, const char *prefix, struct throttle_limits *t, struct err *err);
int opt_throttle_group(struct vm_opts *o, struct vm_object *obj, struct err *err);

#endif
