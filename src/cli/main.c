/* main(): which personality, which verb. The only place that turns errors into an exit status. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/img.h"
#include "cli/options.h"
#include "cli/serve.h"

static void print_log(enum log_level level, const char *line, void *opaque)
{
	static const char *const names[] = { "error", "warning", "info", "debug" };
	const struct vm_opts *o = opaque;
	char stamp[32] = "";

	if (o->timestamps) {
		struct timespec ts;
		struct tm tm;
		clock_gettime(CLOCK_REALTIME, &ts);
		gmtime_r(&ts.tv_sec, &tm);
		strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ ", &tm);
	}
	fprintf(o->log, "%slodge: %s: %s\n", stamp, names[level], line);
}

static int fail(const struct err *err)
{
	fprintf(stderr, "lodge: %s\n", err->msg);
	return 1;
}

/* `lodge run` and `lodge qemu`. */
static int verb_vm(bool qemu, int argc, char **argv)
{
	struct vm_opts o;
	struct err err = { 0 };
	int status = 0;

	vmopts_init(&o, qemu);
	int ret = vmopts_parse(&o, argc, argv, &err);
	if (!ret)
		ret = vmopts_finish(&o, &err);
	/* Why there is no machine is still told on standard error. */
	o.log = !ret && o.logfile ? fopen(o.logfile, "ae") : stderr;
	if (!o.log)
		ret = err_set_errno(&err, -errno, "cannot open the log file %s", o.logfile);
	if (ret < 0) {
		status = fail(&err);
	} else if (!ret) {
		setvbuf(o.log, NULL, _IOLBF, 0);
		log_set_sink(print_log, &o, (enum log_level)o.log_level);
		status = vm_run(&o);
		log_set_sink(NULL, NULL, LOG_ERROR);
	}
	if (o.log && o.log != stderr)
		fclose(o.log);
	vmopts_free(&o);
	return status;
}

static void usage(FILE *f)
{
	fputs("Usage: lodge VERB [OPTION...]\n\n"
	      "  run       start a virtual machine            (lodge run --help)\n"
	      "  qemu      the same in QEMU's words           (lodge qemu -help)\n"
	      "  kvm-run   run a program with softkvm as its /dev/kvm    (lodge kvm-run -- COMMAND...)\n"
	      "  kvm-info  what /dev/kvm is here and what softkvm offers (lodge kvm-info [--json])\n"
	      "  img       make, check and convert disk images (lodge img --help)\n"
	      "  io        read and write a disk image, for tests (lodge io -h)\n"
	      "  nbd       serve a disk image over NBD         (lodge nbd --help)\n"
	      "  storage-daemon   serve disks over NBD and vhost-user (lodge storage-daemon --help)\n"
	      "  version   print the version\n"
	      "  help      this, or 'help VERB', 'help devices', 'help DEVICE', 'help man' (the manual page's source)\n", f);
}

static int verb_help(int argc, char **argv)
{
	struct err err = { 0 };

	if (!argc)
		return usage(stdout), 0;
	if (!strcmp(argv[0], "run"))
		return help_usage(CTX_RUN), 0;
	if (!strcmp(argv[0], "qemu"))
		return help_usage(CTX_QEMU), 0;
	if (!strcmp(argv[0], "devices"))
		return help_devices(), 0;
	if (!strcmp(argv[0], "man"))
		return help_manual(), 0;
	if (!strcmp(argv[0], "kvm-run"))
		return verb_kvm_run(1, (char *[]){ "--help", NULL });
	if (!strcmp(argv[0], "kvm-info"))
		return verb_kvm_info(1, (char *[]){ "--help", NULL });
	if (!strcmp(argv[0], "img"))
		return img_main(2, (char *[]){ "img", "--help", NULL });
	if (!strcmp(argv[0], "nbd"))
		return nbd_main(2, (char *[]){ "nbd", "--help", NULL });
	if (!strcmp(argv[0], "storage-daemon"))
		return storage_main(2, (char *[]){ "storage-daemon", "--help", NULL });
	return help_device(argv[0], &err) ? fail(&err) : 0;
}

static bool ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), m = strlen(end);
	return n >= m && !strcmp(s + n - m, end);
}

int main(int argc, char **argv)
{
	signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is an error of that write, not the end of the program */
	if (ends_with(argv[0], "qemu-system-x86_64"))
		return verb_vm(true, argc - 1, argv + 1);
	if (ends_with(argv[0], "qemu-img"))
		return img_main(argc, argv);
	if (ends_with(argv[0], "qemu-io"))
		return io_main(argc, argv);
	if (ends_with(argv[0], "qemu-nbd"))
		return nbd_main(argc, argv);
	if (ends_with(argv[0], "qemu-storage-daemon"))
		return storage_main(argc, argv);
	if (argc < 2)
		return usage(stderr), 2;

	const char *verb = argv[1];
	if (!strcmp(verb, "run"))
		return verb_vm(false, argc - 2, argv + 2);
	if (!strcmp(verb, "qemu"))
		return verb_vm(true, argc - 2, argv + 2);
	if (!strcmp(verb, "kvm-run"))
		return verb_kvm_run(argc - 2, argv + 2);
	if (!strcmp(verb, "kvm-info"))
		return verb_kvm_info(argc - 2, argv + 2);
	if (!strcmp(verb, "img"))
		return img_main(argc - 1, argv + 1);
	if (!strcmp(verb, "io"))
		return io_main(argc - 1, argv + 1);
	if (!strcmp(verb, "nbd"))
		return nbd_main(argc - 1, argv + 1);
	if (!strcmp(verb, "storage-daemon"))
		return storage_main(argc - 1, argv + 1);
	if (!strcmp(verb, "help") || !strcmp(verb, "--help") || !strcmp(verb, "-h"))
		return verb_help(argc - 2, argv + 2);
	if (!strcmp(verb, "version") || !strcmp(verb, "--version"))
		return puts("lodge " LODGE_VERSION), 0;
	fprintf(stderr, "lodge: unknown verb '%s'; 'lodge help' lists them\n", verb);
	return 2;
}
