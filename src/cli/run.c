/* From options to a running machine: loop, back ends, machine; signals; and everything undone in turn. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/backends.h"
#include "cli/options.h"
#include "cli/stats.h"
#include "loop/loop.h"

struct session {
	struct vm_opts *o;
	struct loop *loop;
	struct workers *workers;
	struct backends backends;
	struct machine *machine;
	struct machine_device *devices;
	int signal_fd;
	struct loop_watch *signal_watch;
	bool pidfile_written;
	struct sandbox *sandbox;
	FILE *stats;                    /* for JSON */
};

static void quit(void *opaque)
{
	struct session *s = opaque;

	if (s->machine)
		machine_request(s->machine, MACHINE_EXIT, 0);
}

static void on_signal(void *opaque, int fd, unsigned events)
{
	struct session *s = opaque;
	struct signalfd_siginfo si;

	if (read(fd, &si, sizeof si) != sizeof si)
		return;
	if (si.ssi_signo == SIGCONT) {
		if (s->machine)
			machine_resume(s->machine);
		return;
	}
	log_info("ending on signal %u (%s)", si.ssi_signo, strsignal((int)si.ssi_signo));
	quit(s);
}

/* SIGINT, SIGTERM and SIGHUP become events of the loop. Before any thread exists, so that all inherit the mask. */
static int signals_start(struct session *s, struct err *err)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGCONT);       /* go on after an I/O error that stopped the machine */
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	s->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (s->signal_fd < 0)
		return err_set_errno(err, -errno, "signalfd");
	s->signal_watch = loop_watch_fd(s->loop, s->signal_fd, LOOP_IN, on_signal, s);
	return s->signal_watch ? 0 : err_set(err, -ENOMEM, "out of memory");
}

/* -- devices ------------------------------------------------------------------------------------ */

static bool known_bus(struct vm_opts *o, const char *bus)
{
	size_t n = strlen(bus);

	if (!strcmp(bus, "pcie.0") || !strcmp(bus, "pci.0") || !strcmp(bus, "isa.0"))
		return true;
	for (unsigned i = 0; i < o->ndevices; i++) {
		const char *id = keyvals_get(&o->devices[i].opts, "id");
		if (id && n == strlen(id) + 2 && !strncmp(bus, id, n - 2) && !strcmp(bus + n - 2, ".0"))
			return true;
	}
	return false;
}

static void add_prop(struct machine_prop **props, unsigned *n, const char *name, const char *value)
{
	struct machine_prop *p = vmopts_grow(props, n, sizeof *p);
	*p = (struct machine_prop){ name, value };
}

/* -device text to what the board takes; -global values come first, so that the device's own win. */
static int convert(struct vm_opts *o, struct keyvals *l, struct machine_device *d, struct err *err)
{
	struct machine_prop *props = NULL;

	d->cls = keyvals_get(l, "driver");
	d->id = keyvals_get(l, "id");
	for (unsigned i = 0; i < o->nglobals; i++)
		if (device_class_find(o->globals[i].driver) == device_class_find(d->cls))
			add_prop(&props, &d->nprops, o->globals[i].prop, o->globals[i].value);
	d->props = props;
	for (unsigned i = 0; i < l->n; i++) {
		const char *k = l->o[i].key;

		if (!strcmp(k, "driver") || !strcmp(k, "id"))
			continue;
		if (!strcmp(k, "bus")) {
			if (!known_bus(o, l->o[i].val))
				return err_set(err, -ENOENT, "-device %s: there is no bus '%s' (only pcie.0 and those of devices)",
					       d->cls, l->o[i].val);
		}
		add_prop(&props, &d->nprops, k, l->o[i].val);
		d->props = props;
	}
	return 0;
}

static int convert_devices(struct session *s, struct err *err)
{
	struct vm_opts *o = s->o;

	s->devices = calloc(o->ndevices + 1, sizeof *s->devices);
	if (!s->devices)
		return err_set(err, -ENOMEM, "out of memory");
	for (unsigned i = 0; i < o->ndevices; i++) {
		int ret = convert(o, &o->devices[i].opts, &s->devices[i], err);
		if (ret)
			return ret;
	}
	return 0;
}

/* -- life --------------------------------------------------------------------------------------- */

static int pidfile_write(struct session *s, struct err *err)
{
	const char *path = s->o->pidfile;

	if (!path)
		return 0;
	FILE *f = fopen(path, "we");
	if (!f || fprintf(f, "%ld\n", (long)getpid()) < 0 || fclose(f))
		return err_set_errno(err, -errno, "cannot write the pid file %s", path);
	s->pidfile_written = true;
	return 0;
}

static int session_start(struct session *s, struct err *err)
{
	struct vm_opts *o = s->o;
	int ret = loop_create(&s->loop, err);

	if (!ret)
		ret = signals_start(s, err);
	if (!ret)
		ret = workers_create(&s->workers, s->loop, 8, err);
	if (!ret)
		ret = convert_devices(s, err);
	if (ret)
		return ret;
	struct chr_env env = { s->loop, quit, s };
	ret = backends_open(&s->backends, o, s->loop, s->workers, &env, err);
	if (ret)
		return ret;
	struct machine_config cfg = {
		.type = o->type, .accel = o->accel, .soft = o->soft, .cpu_model = o->cpu_model, .cpus = o->cpus, .sockets = o->sockets,
		.cores = o->cores, .threads = o->threads, .mem_size = o->mem_size,
		.mem_backing = { .huge = o->hugepages, .prealloc = o->prealloc, .private = o->mem_private, .no_dump = !o->dump_guest_core },
		.kernel = o->kernel, .initrd = o->initrd, .append = o->append, .bios = o->bios,
		.boot_strict = o->boot_strict, .rtc_localtime = o->localtime, .rtc_offset = o->rtc_offset, .no_reboot = o->no_reboot,
		.no_shutdown = o->no_shutdown, .name = o->name, .uuid = o->uuid, .devices = s->devices,
		.ndevices = o->ndevices, .loop = s->loop, .workers = s->workers, .backends = backends_lookup(&s->backends),
	};
	if (o->stats_file && (ret = stats_open(&s->stats, o->stats_file, err)))
		return ret;
	ret = machine_create(&s->machine, &cfg, err);
	return ret ? ret : pidfile_write(s, err);
}

/* Does something that was asked for start programs later: a tap's script at the end, a command behind the user network? */
static bool starts_programs(const struct vm_opts *o)
{
	for (unsigned i = 0; i < o->nnetdevs; i++) {
		const char *t = o->netdevs[i].text;

		if (strstr(t, "cmd:") || (!strncmp(t, "tap", 3) && !strstr(t, "downscript=no") && !strstr(t, "fd=")))
			return true;
	}
	return false;
}

/* Everything is open, the guest did not run yet. */
static int session_sandbox(struct session *s, struct err *err)
{
	struct sandbox_config *c = &s->o->sandbox;
	int ret;

	if (!c->on)
		return 0;
	if (!s->o->spawn_given && starts_programs(s->o))
		c->spawn = true;
	tzset();        /* reads its file now */
	ret = workers_spawn_on_loop(s->workers);
	if (ret)
		return err_set_errno(err, ret, "cannot start a thread");
	ret = sandbox_enter(&s->sandbox, c, err);
	if (!ret)
		machine_on_vcpu_start(s->machine, sandbox_enter_vcpu, s->sandbox);
	return ret;
}

static void session_end(struct session *s)
{
	if (s->machine)
		machine_destroy(s->machine);
	backends_close(&s->backends);
	if (s->workers)
		workers_destroy(s->workers);
	if (s->signal_watch)
		loop_unwatch(s->signal_watch);
	if (s->signal_fd >= 0)
		close(s->signal_fd);
	if (s->loop)
		loop_destroy(s->loop);
	for (unsigned i = 0; s->devices && i < s->o->ndevices; i++)
		free((void *)(uintptr_t)s->devices[i].props);
	free(s->devices);
	sandbox_free(s->sandbox);
	if (s->stats)
		fclose(s->stats);
	if (s->pidfile_written)
		unlink(s->o->pidfile);
}

static void print_stats(struct session *s)
{
	if (s->o->stats)
		stats_words(s->machine, stderr);
	if (s->stats)
		stats_json(s->machine, s->stats);
}

int vm_run(struct vm_opts *o)
{
	struct session s = { .o = o, .signal_fd = -1 };
	struct err err = { 0 };
	int status = 1;

	if (session_start(&s, &err) || session_sandbox(&s, &err)) {
		session_end(&s);        /* first, so that the terminal is sane when the message appears */
		fprintf(stderr, "lodge: %s\n", err.msg);
		return 1;
	}
	status = machine_run(s.machine);
	print_stats(&s);
	session_end(&s);
	return status;
}
