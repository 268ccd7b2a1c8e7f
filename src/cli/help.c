/* Help and the manual page, made from the tables of options and device classes. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "cli/options.h"

static void print_option(const struct option_def *d, const char *dash)
{
	int n = printf("  %s%s%s%s", dash, d->name, d->arg ? " " : "", d->arg ? d->arg : "");

	if (n > 30)
		printf("\n%32s%s\n", "", d->help);
	else
		printf("%*s%s\n", 32 - n, "", d->help);
}

void help_usage(unsigned ctx)
{
	const char *dash = ctx == CTX_QEMU ? "-" : "--", *group = NULL;
	const struct option_def *d;

	if (ctx == CTX_QEMU)
		puts("Usage: lodge qemu [OPTION...]      (or call the program qemu-system-x86_64)\n\nA virtual machine in QEMU's words.");
	else
		puts("Usage: lodge run [OPTION...]\n\nStart a virtual machine. Example:\n"
		     "  lodge run --kernel vmlinuz --initrd initrd.img --append console=ttyS0 \\\n"
		     "            --cpus 4 --memory 1G --disk disk.img --net user,hostfwd=tcp::2222-:22");
	for (unsigned i = 0; (d = option_at(i)); i++) {
		if (d->group)
			group = d->group;
		if (!(d->ctx & ctx) || !d->help)
			continue;
		if (group)
			printf("\n%s:\n", group);
		group = NULL;
		print_option(d, dash);
	}
	puts("");
	help_keys();
}

void help_keys(void)
{
	puts("With the console on a terminal: Ctrl-A x quits, Ctrl-A h lists the other keys, Ctrl-A Ctrl-A sends Ctrl-A.");
}

void help_devices(void)
{
	const struct device_class *c;

	for (unsigned i = 0; (c = device_class_at(i)); i++)
		printf("name \"%s\"%s%s%s, desc \"%s\"\n", c->name, c->bus ? ", bus " : "", c->bus ? c->bus : "",
		       c->aliases && c->aliases[0] ? ", has an alias" : "", c->desc);
}

static const char *type_name(enum prop_type t)
{
	static const char *const names[] = {
		[PROP_BOOL] = "bool", [PROP_U8] = "uint8", [PROP_U16] = "uint16", [PROP_U32] = "uint32", [PROP_U64] = "uint64",
		[PROP_BOOTINDEX] = "int32", [PROP_SIZE] = "size", [PROP_STR] = "str", [PROP_MAC] = "mac address", [PROP_PCI_ADDR] = "pci slot[.function]",
		[PROP_DRIVE] = "id of a drive", [PROP_NETDEV] = "id of a netdev", [PROP_CHARDEV] = "id of a chardev", [PROP_IOTHREAD] = "id of an iothread",
		[PROP_IOTHREADS] = "ids of iothreads", [PROP_ENUM] = "enum",
	};
	return (unsigned)t < ARRAY_SIZE(names) && names[t] ? names[t] : "value";
}

static void print_prop(const struct prop *p, const char *fmt)
{
	char dflt[64] = "";

	if (p->dflt_str)
		snprintf(dflt, sizeof dflt, " (default: %s)", p->dflt_str);
	else if (p->type == PROP_BOOL)
		snprintf(dflt, sizeof dflt, " (default: %s)", p->dflt ? "on" : "off");
	else if (p->type <= PROP_SIZE && p->dflt)
		snprintf(dflt, sizeof dflt, " (default: %llu)", (unsigned long long)p->dflt);
	printf(fmt, p->name, type_name(p->type), p->help ? p->help : "", dflt);
	if (p->type == PROP_ENUM && p->values) {
		printf(" [");
		for (unsigned i = 0; p->values[i]; i++)
			printf("%s%s", i ? "|" : "", p->values[i]);
		printf("]");
	}
	puts("");
}

int help_device(const char *cls, struct err *err)
{
	const struct device_class *c = device_class_find(cls);

	if (!c)
		return err_set(err, -ENODEV, "there is no device '%s'", cls);
	printf("%s options:\n", c->name);
	for (const struct prop *p = c->props; p && p->name; p++)
		print_prop(p, "  %s=<%s> - %s%s");
	return 0;
}

/* -- the manual page ---------------------------------------------------------------------------- */

/* Text for roff: a dash is a minus, a line never starts with a dot. */
static void roff(const char *s)
{
	for (; *s; s++) {
		if (*s == '-' || *s == '\\')
			putchar('\\');
		putchar(*s);
	}
}

static void manual_options(unsigned ctx)
{
	const char *dash = ctx == CTX_QEMU ? "-" : "--", *group = NULL;
	const struct option_def *d;

	for (unsigned i = 0; (d = option_at(i)); i++) {
		if (d->group)
			group = d->group;
		if (!(d->ctx & ctx) || !d->help)
			continue;
		if (group)
			printf(".SS %s\n", group);
		group = NULL;
		printf(".TP\n.B ");
		roff(dash);
		roff(d->name);
		if (d->arg) {
			printf(" \\fI");
			roff(d->arg);
			printf("\\fR");
		}
		puts("");
		roff(d->help);
		puts("");
	}
}

static void manual_devices(void)
{
	const struct device_class *c;

	for (unsigned i = 0; (c = device_class_at(i)); i++) {
		printf(".TP\n.B %s\n", c->name);
		roff(c->desc);
		puts(".\n.RS");
		for (const struct prop *p = c->props; p && p->name; p++) {
			puts(".PD 0\n.TP");
			print_prop(p, ".I %s\n(%s) %s%s");
		}
		puts(".PD\n.RE");
	}
}

void help_manual(void)
{
	puts(".TH LODGE 1 \"\" \"Lodge " LODGE_VERSION "\" \"User Commands\"\n.SH NAME\nlodge \\- virtual machine monitor\n"
	     ".SH SYNOPSIS\n.B lodge run\n.RI [ options ]\n.br\n.B lodge qemu\n.RI [ options ]\n.br\n.B lodge kvm\\-run \\-\\-\n.IR command ...\n.br\n.B lodge kvm\\-info\n.RB [ \\-\\-json ]\n.br\n.B lodge nbd\n.RI [ options ]\n.I file\n.br\n.B lodge storage\\-daemon\n.RI [ options ]\n.br\n.B lodge help\n.RI [ verb ]\n"
	     ".SH DESCRIPTION\nLodge runs x86\\-64 virtual machines, on Linux KVM where there is one and in user space, with its own\n"
	     "implementation of the KVM interface, where there is none.\n"
	     ".B lodge run\ntakes options made for people,\n.B lodge qemu\n(also when the program is called under a name that ends in\n"
	     ".BR qemu\\-system\\-x86_64 )\ntakes QEMU's. An option or a key that is not supported is an error that names it.\n"
	     ".PP\n.B lodge kvm\\-run\nstarts another program, such as QEMU or kvmtool, whose\n.I /dev/kvm\nis then Lodge's implementation, whether the\n"
	     "host has one or not. The program must be dynamically linked, for x86\\-64 and not set\\-user\\-id: it is reached with\n"
	     ".BR LD_PRELOAD ,\nwhich is kept and added to. Its exit status is the program's; 126 or 127 when it cannot be started.\n"
	     ".B lodge kvm\\-info\ntells what\n.I /dev/kvm\nis here (absent, not permitted, hardware or emulated, and how fast) and what Lodge's own\n"
	     "implementation offers: capabilities, limits, CPUID features; with\n.B \\-\\-json\nfor programs.\n"
	     ".PP\n.B lodge nbd\n(or a name that ends in\n.BR qemu\\-nbd )\nserves a disk image to NBD clients over TCP, a Unix socket, sockets of a service manager, or as\n.I /dev/nbdN\n"
	     "of this host, or lists the exports of another server; it takes\n.BR qemu\\-nbd (8)'s\noptions, which\n.B lodge nbd \\-\\-help\nlists.\n"
	     ".B lodge storage\\-daemon\n(or a name that ends in\n.BR qemu\\-storage\\-daemon )\nserves block nodes over NBD and as vhost\\-user\\-blk devices to other virtual machine monitors.\n"
	     ".PP\nA disk's name may be that of an NBD export:\n.BR nbd:HOST:PORT[:exportname=X] ,\n.BR nbd:unix:PATH ,\n.BR nbd://HOST[:PORT]/EXPORT ,\n"
	     ".BR nbd+unix:///EXPORT?socket=PATH ,\nor options as JSON,\n.BR json:{\\(dqdriver\\(dq:\\(dqnbd\\(dq,...} .\n"
	     ".SH OPTIONS OF LODGE RUN");
	manual_options(CTX_RUN);
	puts(".SH OPTIONS OF LODGE QEMU");
	manual_options(CTX_QEMU);
	puts(".SH DEVICES");
	manual_devices();
	puts(".SH KEYS\nWith the console on a terminal: Ctrl\\-A x quits, Ctrl\\-A h lists the keys, Ctrl\\-A b sends a break, Ctrl\\-A Ctrl\\-A\n"
	     "sends Ctrl\\-A.\n"
	     ".SH EXIT STATUS\n0 after the guest powered off or Lodge was told to end (Ctrl\\-A x, SIGINT, SIGTERM); 1 after an error, with a line on\n"
	     "standard error; with\n.B isa\\-debug\\-exit\nthe value the guest wrote, times two, plus one; 2 for a wrong command line of\n.BR \"lodge\" .\n"
	     ".SH SEE ALSO\n.BR qemu\\-system\\-x86_64 (1)");
}
