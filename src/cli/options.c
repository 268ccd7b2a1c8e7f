/* The table of options, and the handlers that fit nowhere else. */
#include "cli/options.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/parse.h"
#include "base/util.h"

#define BOTH (CTX_RUN | CTX_QEMU)

static const struct option_def table[] = {
	{ "kernel", "FILE", BOTH, opt_kernel, "Boot this kernel: a Linux bzImage, an ELF file with a PVH note, or a multiboot 1 image.", "Boot" },
	{ "initrd", "FILE", BOTH, opt_initrd, "Initial RAM disk; for multiboot a comma-separated list of modules, each with its arguments.", NULL },
	{ "append", "TEXT", BOTH, opt_append, "The kernel's command line.", NULL },
	{ "bios", "FILE", BOTH, opt_bios, "Firmware image, mapped to end at 4 GiB.", NULL },
	{ "boot", "OPTS", CTX_QEMU, opt_boot, "strict=on: firmware boots from nothing that has no bootindex (which devices have); menu=off: there is no boot menu.", NULL },

	{ "machine", "TYPE[,KEY=VALUE...]", BOTH, opt_machine, "Machine type, q35 or microvm ('help' lists them), and accel=.", "Machine" },
	{ "M", "TYPE[,KEY=VALUE...]", CTX_QEMU, opt_machine, NULL, NULL },
	{ "accel", "kvm|soft|auto[,mode=interp|translate|lockstep][,code-memory=SIZE][,stats=on|FILE][,perf-map=on]", BOTH, opt_accel, "What runs the guest: /dev/kvm, softkvm, or (default) the faster of the two here. 'tcg' means soft. Of softkvm: mode, how it executes guest code; code-memory, what translated code may take (default 128M); stats, what it counted and which guest code was hot, printed at the end or written to FILE as JSON; perf-map, names for perf(1).", NULL },
	{ "enable-kvm", NULL, CTX_QEMU, opt_enable_kvm, "The same as -accel kvm.", NULL },
	{ "cpu", "MODEL[,+FEATURE][,-FEATURE]", BOTH, opt_cpu, "CPU model and features; 'help' lists them. Default: host.", NULL },
	{ "cpus", "N", CTX_RUN, opt_cpus, "Number of CPUs, 1 to 64.", NULL },
	{ "smp", "[cpus=]N[,sockets=N][,cores=N][,threads=N]", CTX_QEMU, opt_smp, "Number of CPUs, 1 to 64, and their topology.", NULL },
	{ "memory", "SIZE", CTX_RUN, opt_memory, "RAM, with a suffix: 512M, 2G; a plain number counts MiB. Default: 512M.", NULL },
	{ "m", "[size=]SIZE", CTX_QEMU, opt_memory, "RAM, with a suffix: 512M, 2G; a plain number counts MiB. Default: 128M.", NULL },
	{ "hugepages", NULL, CTX_RUN, opt_hugepages, "Back RAM with huge pages; an error when the host has too few.", NULL },
	{ "mem-prealloc", NULL, CTX_QEMU, opt_mem_prealloc, "Allocate all of RAM at the start.", NULL },
	{ "rtc", "[base=utc|localtime|DATE]", CTX_QEMU, opt_rtc, "What the guest's clock starts with.", NULL },
	{ "name", "NAME", BOTH, opt_name, "The machine's name, for SMBIOS and messages.", NULL },
	{ "uuid", "UUID", BOTH, opt_uuid, "The machine's UUID, for SMBIOS.", NULL },
	{ "no-reboot", NULL, BOTH, opt_no_reboot, "End instead of rebooting.", NULL },
	{ "no-shutdown", NULL, CTX_QEMU, opt_no_shutdown, "Stop instead of ending when the guest powers off.", NULL },

	{ "disk", "FILE[,KEY=VALUE...]", CTX_RUN, opt_disk, "A virtio disk: format=raw|qcow2, readonly=on, serial=TEXT, cache=MODE, snapshot=on. May be repeated.", "Disks" },
	{ "drive", "KEY=VALUE[,...]", BOTH, opt_drive, "A disk in QEMU's words: file=, format=raw|qcow2, if=virtio|scsi|none, media=disk|cdrom, id=, cache=, readonly=, snapshot=, discard=, aio=, serial=, copy-on-read=, bps=, iops= and throttling.*, werror=, rerror=.", NULL },
	{ "blockdev", "KEY=VALUE[,...]|JSON", BOTH, opt_blockdev, "A block node: a format, file, host_device, nbd, null-co, or " BLOCK_FILTERS "; node-name=, filename= or file=NODE, read-only=, cache.direct=, discard=.", NULL },
	{ "hda", "FILE", CTX_QEMU, opt_hd, NULL, NULL },
	{ "hdb", "FILE", CTX_QEMU, opt_hd, NULL, NULL },
	{ "hdc", "FILE", CTX_QEMU, opt_hd, NULL, NULL },
	{ "hdd", "FILE", CTX_QEMU, opt_hd, NULL, NULL },
	{ "cdrom", "FILE", BOTH, opt_cdrom, "A CD image in a virtio-scsi drive (there is no IDE or AHCI controller).", NULL },
	{ "snapshot", NULL, BOTH, opt_snapshot, "Write to temporary files instead of the disk images.", NULL },

	{ "net", "user|tap|none[,KEY=VALUE...]", CTX_RUN, opt_run_net, "A virtio network card with this back end; user takes hostfwd=tcp::2222-:22 and more, tap takes ifname=.", "Network" },
	{ "nic", "user|tap|none[,model=virtio][,mac=][,KEY=VALUE...]", CTX_QEMU, opt_nic, "A network card and its back end at once.", NULL },
	{ "netdev", "user|tap,id=ID[,KEY=VALUE...]", BOTH, opt_netdev, "A network back end for -device virtio-net-pci,netdev=ID.", NULL },
	{ "net", "none", CTX_QEMU, opt_net, "Only 'none': no default network card. Otherwise use -nic.", NULL },

	{ "serial", "SPEC", BOTH, opt_serial, "Serial port: stdio, mon:stdio, null, none, file:PATH, pty, pipe:PATH, tcp:HOST:PORT, unix:PATH, chardev:ID.", "Consoles" },
	{ "chardev", "TYPE,id=ID[,KEY=VALUE...]", BOTH, opt_chardev, "A character back end: stdio, null, file, pipe, pty, socket, ringbuf; 'help' lists them.", NULL },
	{ "debugcon", "SPEC", BOTH, opt_debugcon, "Debug console on port 0xe9.", NULL },
	{ "parallel", "none", CTX_QEMU, opt_parallel, "Only 'none'.", NULL },
	{ "monitor", "none", CTX_QEMU, opt_monitor, "Only 'none': the monitor is not there yet.", NULL },
	{ "nographic", NULL, CTX_QEMU, opt_nographic, "Serial port on standard input and output; Ctrl-A x quits, Ctrl-A h helps.", NULL },
	{ "display", "none", CTX_QEMU, opt_display, "Only 'none': there is no display yet.", NULL },
	{ "vga", "none", CTX_QEMU, opt_vga, "Only 'none'.", NULL },
	{ "vnc", "none", CTX_QEMU, opt_none, "Only 'none'.", NULL },
	{ "qmp", "none", CTX_QEMU, opt_none, "Only 'none'.", NULL },

	{ "device", "CLASS[,id=ID][,KEY=VALUE...]|JSON", BOTH, opt_device, "Add a device; 'help' lists the classes, 'CLASS,help' their properties.", "Devices" },
	{ "object", "TYPE,id=ID[,KEY=VALUE...]", BOTH, opt_object, "rng-random, rng-builtin, memory-backend-ram, memory-backend-memfd, iothread or throttle-group.", NULL },
	{ "global", "CLASS.KEY=VALUE", CTX_QEMU, opt_global, "Default of a device property.", NULL },

	{ "nodefaults", NULL, BOTH, opt_nodefaults, "Only the devices that are asked for: no default serial port or network card.", "Other" },
	{ "no-user-config", NULL, CTX_QEMU, opt_ignored_config, "Accepted: there are no configuration files.", NULL },
	{ "nodefconfig", NULL, CTX_QEMU, opt_ignored_config, NULL, NULL },
	{ "pidfile", "FILE", BOTH, opt_pidfile, "Write the process id there.", NULL },
	{ "D", "FILE", CTX_QEMU, opt_logfile, "Write the log there instead of to standard error (where it is still told why a machine cannot start).", NULL },
	{ "log-file", "FILE", CTX_RUN, opt_logfile, "Write the log there instead of to standard error.", NULL },
	{ "log", "LEVEL", CTX_RUN, opt_log_level, "error, warn (default), info or debug.", NULL },
	{ "msg", "timestamp=on|off", CTX_QEMU, opt_msg, "Time stamps in messages.", NULL },
	{ "sandbox", "on|off[,obsolete=][,elevateprivileges=][,spawn=][,resourcecontrol=allow|deny]", BOTH, opt_sandbox, "System calls are filtered (seccomp), the vCPU threads' most; default: on, with all groups but resourcecontrol denied, and spawn where the network needs scripts.", NULL },
	{ "stats", NULL, BOTH, opt_stats, "At the end, print what softkvm counted on each vCPU, and the guest's speed: -accel soft,stats=on.", NULL },
	{ "version", NULL, BOTH, opt_version, "Print the version.", NULL },
	{ "help", NULL, BOTH, opt_help, "Print this.", NULL },
	{ "h", NULL, BOTH, opt_help, NULL, NULL },
};

const struct option_def *option_at(unsigned i)
{
	return i < ARRAY_SIZE(table) ? &table[i] : NULL;
}

const struct option_def *option_find(unsigned ctx, const char *name)
{
	for (unsigned i = 0; i < ARRAY_SIZE(table); i++)
		if ((table[i].ctx & ctx) && !strcmp(table[i].name, name))
			return &table[i];
	return NULL;
}

int opt_nodefaults(struct vm_opts *o, const char *arg, struct err *err)
{
	o->nodefaults = true;
	return 0;
}

int opt_ignored_config(struct vm_opts *o, const char *arg, struct err *err)
{
	return 0; /* there is no configuration file to leave out */
}

int opt_pidfile(struct vm_opts *o, const char *arg, struct err *err)
{
	o->pidfile = vmopts_printf(o, "%s", arg);
	return 0;
}

int opt_logfile(struct vm_opts *o, const char *arg, struct err *err)
{
	o->logfile = vmopts_printf(o, "%s", arg);
	return 0;
}

int opt_log_level(struct vm_opts *o, const char *arg, struct err *err)
{
	static const char *const names[] = { "error", "warn", "info", "debug" };

	for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
		if (!strcmp(arg, names[i])) {
			o->log_level = (int)i;
			return 0;
		}
	return err_set(err, -EINVAL, "--log: '%s' is none of error, warn, info, debug", arg);
}

int opt_stats(struct vm_opts *o, const char *arg, struct err *err)
{
	o->stats = o->soft.sample = true;
	return 0;
}

int opt_msg(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-msg", arg, NULL, err);

	if (!ret)
		ret = keyvals_bool(&l, "-msg", "timestamp", &o->timestamps, err);
	if (!ret)
		ret = keyvals_end(&l, "-msg", err);
	keyvals_free(&l);
	return ret;
}

/* One of QEMU's groups of calls: allow or deny. */
static int sandbox_group(struct keyvals *l, const char *key, bool *allowed, struct err *err)
{
	const char *v = keyvals_get(l, key);

	if (!v)
		return 0;
	if (!strcmp(v, "allow"))
		*allowed = true;
	else if (!strcmp(v, "deny") || (!strcmp(v, "children") && !strcmp(key, "elevateprivileges")))
		*allowed = false;       /* children: a filtered process cannot gain privileges by execve() either */
	else
		return err_set(err, -EINVAL, "-sandbox %s: '%s' is neither allow nor deny", key, v);
	return 0;
}

int opt_sandbox(struct vm_opts *o, const char *arg, struct err *err)
{
	struct sandbox_config *c = &o->sandbox;
	bool on = true;
	struct keyvals l;
	int ret = keyvals_parse(&l, "-sandbox", arg, "enable", err);

	if (ret)
		return ret;
	sandbox_default(c);
	o->spawn_given = keyvals_get(&l, "spawn") != NULL;
	ret = keyvals_bool(&l, "-sandbox", "enable", &on, err);
	if (!ret)
		ret = sandbox_group(&l, "obsolete", &c->obsolete, err);
	if (!ret)
		ret = sandbox_group(&l, "elevateprivileges", &c->elevate, err);
	if (!ret)
		ret = sandbox_group(&l, "spawn", &c->spawn, err);
	if (!ret)
		ret = sandbox_group(&l, "resourcecontrol", &c->resources, err);
	if (!ret)
		ret = keyvals_end(&l, "-sandbox", err);
	c->on = on;
	keyvals_free(&l);
	return ret;
}

int opt_version(struct vm_opts *o, const char *arg, struct err *err)
{
	printf("Lodge virtual machine monitor version %s\n", LODGE_VERSION);
	return OPT_DONE;
}

int opt_help(struct vm_opts *o, const char *arg, struct err *err)
{
	help_usage(o->qemu ? CTX_QEMU : CTX_RUN);
	return OPT_DONE;
}
