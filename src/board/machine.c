/*
 * Putting a machine together, running it and taking it apart.
 *
 * Requests (reset, power-off, exit) come from any thread, often from inside a device's handler with
 * its lock held. They are recorded, vCPUs are asked to stop, and the loop's thread acts on them.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "board/internal.h"
#include "dev/acpi_pm.h"
#include "dev/fw_cfg.h"
#include "dev/misc.h"
#include "dev/q35.h"
#include "dev/rtc.h"

/* --- lines into the chips --- */

static void set_gsi(void *opaque, int n, int level)
{
	kvm_vm_irq_line(((struct machine *)opaque)->vm, n, level);
}

static struct irq_line isa_irq(void *opaque, int n)
{
	return (struct irq_line){ set_gsi, opaque, n };
}

static void set_pirq(void *opaque, int n, int level)
{
	struct machine *m = opaque;

	kvm_vm_irq_line(m->vm, 16 + n, level);
	if (m->q35)
		q35_set_pirq(m->q35, n, level);
}

static struct irq_line route_intx(void *opaque, int dev, int pin)
{
	return (struct irq_line){ set_pirq, opaque, q35_pirq(dev, pin) };
}

static void send_msi(void *opaque, uint64_t addr, uint32_t data, uint32_t requester)
{
	kvm_vm_signal_msi(((struct machine *)opaque)->vm, addr, data);
}

static uint8_t rst_read(void *opaque)
{
	struct machine *m = opaque;

	return m->ports ? pc_reset_control_read(m->ports) : 0xff;
}

static void rst_write(void *opaque, uint8_t val)
{
	struct machine *m = opaque;

	if (m->ports)
		pc_reset_control_write(m->ports, val);
}

/* --- requests --- */

static int reset_machine(struct machine *m, struct err *err);

static void end(struct machine *m, int status)
{
	m->ended = true;
	loop_stop(m->cfg.loop, status);
}

/* vCPUs first: what they asked for is with the devices then. */
static void stop(struct machine *m)
{
	vcpus_pause(m->vcpus);
	if (m->stopped)
		return;
	m->stopped = true;
	for (struct device *d = m->devices; d; d = d->next)
		if (d->cls->pause)
			d->cls->pause(d, true);
	log_warn("the machine is stopped; SIGCONT continues it");
}

void machine_resume(struct machine *m)
{
	if (!m->stopped || m->ended)
		return;
	m->stopped = false;
	for (struct device *d = m->devices; d; d = d->next)
		if (d->cls->pause)
			d->cls->pause(d, false);
	vcpus_resume(m->vcpus);
}

bool machine_stopped(const struct machine *m)
{
	return m->stopped;
}

static void act(void *opaque)
{
	struct machine *m = opaque;
	struct err err = { 0 };

	pthread_mutex_lock(&m->req_lock);
	enum machine_request r = m->req;
	int status = m->req_status;
	bool pending = m->req_pending;
	m->req_pending = m->req_posted = false;
	pthread_mutex_unlock(&m->req_lock);
	if (!pending || m->ended)
		return;
	if (r == MACHINE_EXIT) {
		end(m, status);
	} else if (r == MACHINE_STOP) {
		stop(m);
	} else if (r == MACHINE_POWEROFF || m->cfg.no_reboot) {
		if (m->cfg.no_shutdown)
			vcpus_pause(m->vcpus);
		else
			end(m, 0);
	} else {
		vcpus_pause(m->vcpus);
		if (reset_machine(m, &err)) {
			log_error("reset: %s", err.msg);
			end(m, 1);
			return;
		}
		if (!m->stopped)
			vcpus_resume(m->vcpus);
	}
}

void machine_request(struct machine *m, enum machine_request r, int status)
{
	bool post;

	pthread_mutex_lock(&m->req_lock);
	/* The stronger request wins; of two exits the first. */
	if (!m->req_pending || r > m->req) {
		m->req = r;
		m->req_status = status;
	}
	m->req_pending = true;
	post = !m->req_posted;
	m->req_posted = true;
	pthread_mutex_unlock(&m->req_lock);
	vcpus_request_pause(m->vcpus);
	if (post)
		loop_post(m->cfg.loop, act, m);
}

static void env_request(void *opaque, enum machine_request r, int status)
{
	machine_request(opaque, r, status);
}

/* --- exits --- */

static void on_pio(void *opaque, uint16_t port, void *data, unsigned size, bool write)
{
	struct machine *m = opaque;

	if (write)
		io_write(m->env.ports, port, data, size);
	else
		io_read(m->env.ports, port, data, size);
}

static void on_mmio(void *opaque, uint64_t gpa, void *data, unsigned len, bool write)
{
	struct machine *m = opaque;

	if (write)
		io_write(m->env.mmio, gpa, data, len);
	else
		io_read(m->env.mmio, gpa, data, len);
}

static enum vcpu_action on_shutdown(void *opaque, unsigned cpu)
{
	log_info("vCPU %u: triple fault, the machine resets", cpu);
	machine_request(opaque, MACHINE_RESET, 0);
	return VCPU_STOP;
}

static enum vcpu_action on_system_event(void *opaque, unsigned cpu, uint32_t type, uint64_t data)
{
	machine_request(opaque, type == KVM_SYSTEM_EVENT_SHUTDOWN ? MACHINE_POWEROFF : MACHINE_RESET, 0);
	return VCPU_STOP;
}

static enum vcpu_action on_internal_error(void *opaque, unsigned cpu, struct kvm_run *run, int error)
{
	struct machine *m = opaque;
	struct kvm_regs regs = { 0 };

	kvm_vcpu_ioctl(vcpus_get(m->vcpus, cpu), KVM_GET_REGS, &regs);
	log_error("vCPU %u: %s cannot continue: exit reason %u, suberror %u, error %d, rip %#llx", cpu,
		  kvm_provider_name(m->kvm), run->exit_reason,
		  run->exit_reason == KVM_EXIT_INTERNAL_ERROR ? run->internal.suberror : 0, error,
		  (unsigned long long)regs.rip);
	machine_request(m, MACHINE_EXIT, 1);
	return VCPU_STOP;
}

static const struct vcpu_handlers handlers = {
	.pio = on_pio, .mmio = on_mmio, .shutdown = on_shutdown, .system_event = on_system_event,
	.internal_error = on_internal_error,
};

/* --- creation --- */

static int check_config(struct machine *m, struct err *err)
{
	const struct machine_config *c = &m->cfg;

	if (c->type && !strcmp(c->type, "microvm"))
		m->pci = false;
	else if (!c->type || !strcmp(c->type, "q35") || !strcmp(c->type, "pc"))
		m->pci = true;
	else
		return err_set(err, -EINVAL, "unknown machine type '%s': there are q35 (pc) and microvm", c->type);
	if (c->cpus < 1 || c->cpus > 64)
		return err_set(err, -ERANGE, "%u vCPUs: a machine has 1 to 64", c->cpus);
	if (c->mem_size < (1u << 20) || c->mem_size > (1ULL << 40) || c->mem_size % 4096)
		return err_set(err, -ERANGE, "memory size %llu: 1 MiB to 1 TiB in whole pages",
			       (unsigned long long)c->mem_size);
	return cpuid_topology(c, &m->topo, err);
}

static void add_range(struct boot *b, uint64_t base, uint64_t end, uint32_t type)
{
	if (end > base && b->nmap < BOOT_RANGES)
		b->map[b->nmap++] = (struct boot_range){ base, end - base, type };
}

static void memory_map(struct machine *m)
{
	struct boot *b = &m->boot;

	b->mem = m->env.mem;
	b->low_ram = m->low_ram;
	b->high_ram = m->high_ram;
	add_range(b, 0, MIN((uint64_t)BOOT_LOW_END, m->low_ram), E820_TYPE_RAM);
	add_range(b, BOOT_LOW_END, 0xa0000, E820_TYPE_RESERVED);
	add_range(b, BOOT_ACPI, 0x100000, E820_TYPE_RESERVED);
	add_range(b, 0x100000, m->low_ram, E820_TYPE_RAM);
	if (m->pci)
		add_range(b, ECAM_BASE, ECAM_BASE + ECAM_SIZE, E820_TYPE_RESERVED);
	add_range(b, KVM_IDENTITY, KVM_IDENTITY + 0x4000, E820_TYPE_RESERVED);
	add_range(b, HIGH_BASE, HIGH_BASE + m->high_ram, E820_TYPE_RAM);
}

static int create_memory(struct machine *m, struct err *err)
{
	int r = guest_mem_check(&m->cfg.mem_backing, m->cfg.mem_size, err);

	if (!r)
		r = guest_mem_create(&m->env.mem, m->vm, err);
	if (r)
		return r;
	m->low_ram = m->cfg.mem_size >= LOW_SPLIT ? LOW_MAX : m->cfg.mem_size;
	m->high_ram = m->cfg.mem_size - m->low_ram;
	m->pci64_base = ALIGN_UP(HIGH_BASE + m->high_ram, PCI64_SIZE);
	r = guest_mem_add_ram(m->env.mem, "ram", 0, m->low_ram, &m->cfg.mem_backing, err);
	if (!r && m->high_ram)
		r = guest_mem_add_ram(m->env.mem, "ram-high", HIGH_BASE, m->high_ram, &m->cfg.mem_backing, err);
	if (!r)
		memory_map(m);
	return r;
}

static int create_bus(struct machine *m, struct err *err)
{
	struct pci_bus_config c = {
		.ports = m->env.ports, .mmio = m->env.mmio, .msi = m->env.msi, .ecam_base = ECAM_BASE,
		.mmio32_base = PCI32_BASE, .mmio32_size = PCI32_SIZE,
		.mmio64_base = m->pci64_base, .mmio64_size = PCI64_SIZE,
		.route_intx = route_intx, .rst_read = rst_read, .rst_write = rst_write, .opaque = m,
	};
	int r;

	if (!m->pci)
		return 0;
	r = pci_bus_create(&m->bus, &c, err);
	m->env.pci = m->bus;
	return r ? r : q35_create(&m->q35, &m->env, ECAM_BASE, err);
}

/* The RTC counts from the host's time now, in the zone asked for. */
static int64_t rtc_epoch(struct machine *m)
{
	struct timespec ts;
	struct tm tm;

	clock_gettime(CLOCK_REALTIME, &ts);
	if (m->cfg.rtc_localtime && localtime_r(&ts.tv_sec, &tm))
		ts.tv_sec += tm.tm_gmtoff;
	return ((int64_t)ts.tv_sec + m->cfg.rtc_offset) * 1000000000LL + ts.tv_nsec -
	       (int64_t)clock_now(m->env.clock);
}

static int create_chipset(struct machine *m, struct err *err)
{
	int r = create_bus(m, err);

	if (!r)
		r = pc_ports_create(&m->ports, &m->env, err);
	if (!r)
		r = acpi_pm_create(&m->pm, &m->env, err);
	if (!r)
		r = rtc_create(&m->rtc, &m->env, rtc_epoch(m), err);
	if (!r)
		r = fw_cfg_create(&m->fw_cfg, &m->env, err);
	if (!r)
		rtc_set_memory(m->rtc, m->low_ram, m->high_ram);
	return r;
}

/* By bootindex; two with one are an error. Ends with `next` NULL. */
static int boot_after(struct machine *m, int32_t last, struct device **next, char *path, size_t len, struct err *err)
{
	char p[128];
	int32_t best = INT32_MAX;

	*next = NULL;
	for (struct device *d = m->devices; d; d = d->next) {
		int32_t i = d->cls->boot ? d->cls->boot(d, p, sizeof(p)) : -1;

		if (i <= last || i > best)
			continue;
		if (*next && i == best)
			return err_set(err, -EEXIST, "%s%s%s: bootindex %d is used by another device", d->cls->name, d->id ? " " : "",
				       d->id ? d->id : "", i);
		*next = d;
		best = i;
		snprintf(path, len, "%s", p);
	}
	return best;
}

/* The file "bootorder" as QEMU has it: a path a line, the last ended by NUL; HALT: try nothing else. */
static int add_bootorder(struct machine *m, struct err *err)
{
	char path[128], *text = NULL;
	struct device *d;
	size_t len = 0;
	int r = 0;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		return err_set(err, -ENOMEM, "no memory for the boot order");
	for (int32_t at = -1; (r = boot_after(m, at, &d, path, sizeof(path), err)) >= 0 && d && at < INT32_MAX; at = r)
		fprintf(f, "%s%s", at < 0 ? "" : "\n", path);
	if (m->cfg.boot_strict)
		fprintf(f, "%sHALT", ftell(f) > 0 ? "\n" : "");
	if (fclose(f))
		r = err_set(err, -ENOMEM, "no memory for the boot order");
	if (r >= 0)
		r = fw_cfg_add_file(m->fw_cfg, "bootorder", text, len ? len + 1 : 0, err);
	free(text);
	return r;
}

static int fill_fw_cfg(struct machine *m, struct err *err)
{
	uint64_t ram = m->cfg.mem_size;
	uint16_t cpus = m->cfg.cpus;
	struct { uint64_t base, size; uint32_t type; } __attribute__((packed)) e820[BOOT_RANGES];
	int r;

	for (unsigned i = 0; i < m->boot.nmap; i++) {
		e820[i].base = m->boot.map[i].base;
		e820[i].size = m->boot.map[i].size;
		e820[i].type = m->boot.map[i].type;
	}
	r = fw_cfg_add(m->fw_cfg, FW_CFG_RAM_SIZE, &ram, 8, err);
	if (!r)
		r = fw_cfg_add(m->fw_cfg, FW_CFG_NB_CPUS, &cpus, 2, err);
	if (!r)
		r = fw_cfg_add(m->fw_cfg, FW_CFG_MAX_CPUS, &cpus, 2, err);
	if (!r)
		r = fw_cfg_add_file(m->fw_cfg, "etc/e820", e820, m->boot.nmap * sizeof(e820[0]), err);
	if (!r)
		r = add_bootorder(m, err);
	if (!r)
		r = fw_cfg_add(m->fw_cfg, FW_CFG_CMDLINE_DATA, m->boot.cmdline, strlen(m->boot.cmdline) + 1, err);
	return r;
}

/* The device that provides `bus`: by "ID.0" or "ID" when named, else the newest. */
static struct device *find_parent(struct machine *m, const char *bus, const char *name)
{
	size_t len = name ? strcspn(name, ".") : 0;
	struct device *found = NULL;

	for (struct device *d = m->devices; d; d = d->next) {
		if (!d->cls->provides || strcmp(d->cls->provides, bus))
			continue;
		if (!name || (d->id && strlen(d->id) == len && !strncmp(d->id, name, len)))
			found = d;
	}
	return found;
}

static int place_device(struct machine *m, struct device *d, const char *bus_name, struct err *err)
{
	const char *bus = d->cls->bus;

	if (!bus || !strcmp(bus, "ISA"))
		return 0;
	if (!strcmp(bus, "PCI")) {
		if (!m->bus)
			return err_set(err, -ENODEV, "%s: this machine has no PCI bus", d->cls->name);
		if (bus_name && strcmp(bus_name, "pcie.0") && strcmp(bus_name, "pci.0"))
			return err_set(err, -ENODEV, "%s: no bus '%s' (there is pcie.0)", d->cls->name, bus_name);
		return 0;
	}
	d->parent = find_parent(m, bus, bus_name);
	if (!d->parent)
		return err_set(err, -ENODEV, "%s: no '%s' bus%s%s; add the device that provides it first", d->cls->name,
			       bus, bus_name ? " named " : "", bus_name ? bus_name : "");
	return 0;
}

static int create_device(struct machine *m, const struct machine_device *md, struct err *err)
{
	const struct device_class *cls = device_class_find(md->cls);
	const char *bus = NULL;
	struct device *d;
	int r;

	if (!cls)
		return err_set(err, -EINVAL, "unknown device '%s'", md->cls);
	for (struct device *o = m->devices; o && md->id; o = o->next)
		if (o->id && !strcmp(o->id, md->id))
			return err_set(err, -EEXIST, "two devices with id '%s'", md->id);
	r = device_alloc(&d, cls, &m->env, md->id, err);
	if (r)
		return r;
	for (unsigned i = 0; i < md->nprops && !r; i++) {
		if (!strcmp(md->props[i].name, "bus") && !device_class_prop(cls, "bus"))
			bus = md->props[i].value;
		else
			r = device_set_prop(d, md->props[i].name, md->props[i].value, &m->cfg.backends, err);
	}
	if (!r)
		r = place_device(m, d, bus, err);
	if (!r)
		r = device_create(d, err);
	if (r) {
		device_free(d);
		return r;
	}
	*m->devices_tail = d;
	m->devices_tail = &d->next;
	return 0;
}

static int load_bios(struct machine *m, struct err *err)
{
	struct boot_file f = { 0 };
	uint64_t low;
	int r = boot_file_open(&f, m->cfg.bios, err);

	if (r)
		return r;
	low = MIN(f.len, 0x20000u);
	if (f.len % 4096 || f.len > (16u << 20))
		r = err_set(err, -EINVAL, "%s: firmware of %zu bytes; whole pages up to 16 MiB", m->cfg.bios, f.len);
	if (!r)
		r = guest_mem_add_rom(m->env.mem, "bios", HIGH_BASE - f.len, f.len, err);
	if (!r && (gm_write_rom(m->env.mem, HIGH_BASE - f.len, f.data, f.len) ||
		   gm_write(m->env.mem, 0x100000 - low, f.data + f.len - low, low)))
		r = err_set(err, -EFBIG, "%s: does not fit in guest memory", m->cfg.bios);
	boot_file_close(&f);
	return r;
}

/* Whatever a firmware would have done, and the first instruction. */
static int load_boot(struct machine *m, struct err *err)
{
	struct boot_entry e;
	int r;

	if (m->cfg.bios)
		return 0;
	if (m->bus) {
		r = pci_bus_assign(m->bus, err);
		if (r)
			return r;
		q35_route_legacy(m->q35, m->bus);
	}
	if (!m->boot.kernel.data)
		return 0;
	if (m->acpi_low && gm_write(m->env.mem, BOOT_ACPI, m->acpi_low, TABLES_SIZE))
		return err_set(err, -EFBIG, "no guest memory for ACPI tables: 1 MiB at least");
	r = boot_load(&m->boot, &e, err);
	return r ? r : boot_set_cpu(vcpus_get(m->vcpus, 0), &e, err);
}

static void reset_devices(struct machine *m)
{
	for (struct device *d = m->devices; d; d = d->next)
		if (d->cls->reset)
			d->cls->reset(d);
	if (m->bus)
		pci_bus_reset(m->bus);
	if (m->q35)
		q35_reset(m->q35);
	pc_ports_reset(m->ports);
	acpi_pm_reset(m->pm);
	rtc_reset(m->rtc);
	fw_cfg_reset(m->fw_cfg);
}

struct late { struct machine *m; struct err *err; int r; };

/* Registers may be set from the vCPU's own thread only once it runs. */
static void load_on_cpu(struct kvm_vcpu *v, void *opaque)
{
	struct late *l = opaque;

	l->r = load_boot(l->m, l->err);
}

static int reset_machine(struct machine *m, struct err *err)
{
	struct late l = { m, err, 0 };
	int r;

	reset_devices(m);
	r = chips_reset(m, err);
	if (r)
		return r;
	vcpus_run_on(m->vcpus, 0, load_on_cpu, &l);
	return l.r;
}

static int create_vm(struct machine *m, struct err *err)
{
	int r = kvm_open(&m->kvm, m->cfg.accel, err);

	if (!r)
		r = kvm_vm_create(&m->vm, m->kvm, err);
	if (!r)
		r = kvm_vm_soft(m->vm, &m->cfg.soft, m->cfg.cpus, err);
	if (!r)
		r = io_space_create(&m->env.ports, "ports", 0x10000, err);
	if (!r)
		r = io_space_create(&m->env.mmio, "mmio", UINT64_MAX, err);
	if (!r)
		r = chips_create(m, err);
	if (!r)
		r = create_memory(m, err);
	if (!r)
		r = vcpus_create(&m->vcpus, m->vm, m->cfg.cpus, &handlers, m, err);
	if (!r)
		r = machine_set_cpuid(m, err);
	return r ? r : chips_save(m, err);
}

static int create_all(struct machine *m, struct err *err)
{
	int r = check_config(m, err);

	if (!r && m->cfg.bios && m->cfg.kernel)
		r = err_set(err, -ENOTSUP, "-bios and -kernel together are not supported yet");
	if (!r)
		r = boot_open(&m->boot, m->cfg.kernel, m->cfg.initrd, m->cfg.append, err);
	if (!r)
		r = create_vm(m, err);
	if (!r)
		r = create_chipset(m, err);
	for (unsigned i = 0; i < m->cfg.ndevices && !r; i++)
		r = create_device(m, &m->cfg.devices[i], err);
	if (!r)
		r = fill_fw_cfg(m, err);
	if (!r)
		r = acpi_build(m, err);
	if (!r)
		r = smbios_build(m, err);
	if (!r && m->cfg.bios)
		r = load_bios(m, err);
	return r ? r : load_boot(m, err);
}

int machine_create(struct machine **out, const struct machine_config *cfg, struct err *err)
{
	struct machine *m = calloc(1, sizeof(*m));
	int r;

	if (!m)
		return err_set(err, -ENOMEM, "no memory for the machine");
	m->cfg = *cfg;
	m->devices_tail = &m->devices;
	pthread_mutex_init(&m->req_lock, NULL);
	m->env = (struct machine_env){ .msi = { send_msi, m }, .loop = cfg->loop, .clock = clock_host(cfg->loop),
				       .workers = cfg->workers, .isa_irq = isa_irq, .request = env_request,
				       .opaque = m };
	r = create_all(m, err);
	if (r) {
		machine_destroy(m);
		return r;
	}
	*out = m;
	return 0;
}

void machine_on_vcpu_start(struct machine *m, int (*fn)(void *opaque), void *opaque)
{
	vcpus_on_start(m->vcpus, fn, opaque);
}

int machine_run(struct machine *m)
{
	struct err err = { 0 };
	int status;

	if (vcpus_start(m->vcpus, &err)) {
		log_error("%s", err.msg);
		return 1;
	}
	if (!m->cfg.paused)
		vcpus_resume(m->vcpus);
	status = loop_run(m->cfg.loop);
	m->ended = true;
	vcpus_stop(m->vcpus);
	return status;
}

struct kvm_vcpu *machine_vcpu(struct machine *m, unsigned i)
{
	return vcpus_get(m->vcpus, i);
}

/* A device may provide another's bus, so the newest goes first. */
static void destroy_devices(struct machine *m)
{
	while (m->devices) {
		struct device **p = &m->devices;

		while ((*p)->next)
			p = &(*p)->next;
		device_free(*p);
		*p = NULL;
	}
}

void machine_destroy(struct machine *m)
{
	if (!m)
		return;
	if (m->vcpus)
		vcpus_stop(m->vcpus);
	destroy_devices(m);
	fw_cfg_destroy(m->fw_cfg);
	rtc_destroy(m->rtc);
	acpi_pm_destroy(m->pm);
	pc_ports_destroy(m->ports);
	q35_destroy(m->q35);
	pci_bus_destroy(m->bus);
	chips_free(m);
	if (m->vcpus)
		vcpus_destroy(m->vcpus);
	guest_mem_destroy(m->env.mem);
	io_space_destroy(m->env.ports);
	io_space_destroy(m->env.mmio);
	if (m->vm)
		kvm_vm_destroy(m->vm);
	if (m->kvm)
		kvm_close(m->kvm);
	boot_close(&m->boot);
	free(m->acpi_low);
	pthread_mutex_destroy(&m->req_lock);
	free(m);
}
