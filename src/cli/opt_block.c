/* Disks: -drive and -blockdev as in QEMU, --disk for people. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/backends.h"
#include "cli/options.h"

static int set_cache(struct block_opts *b, const char *what, const char *mode, struct err *err)
{
	static const struct { const char *name; enum block_cache c; } modes[] = {
		{ "writeback", CACHE_WRITEBACK }, { "none", CACHE_NONE }, { "off", CACHE_NONE },
		{ "writethrough", CACHE_WRITETHROUGH }, { "directsync", CACHE_DIRECTSYNC }, { "unsafe", CACHE_UNSAFE },
	};

	for (unsigned i = 0; i < ARRAY_SIZE(modes); i++)
		if (!strcmp(mode, modes[i].name)) {
			b->cache = modes[i].c;
			return 0;
		}
	return err_set(err, -EINVAL, "%s: cache=%s is none of writeback, none, writethrough, directsync, unsafe", what, mode);
}

int detect_zeroes_key(const char *what, const char *v, struct block_opts *b, struct err *err)
{
	if (!v)
		return 0;
	b->detect_zeroes = !strcmp(v, "on") || !strcmp(v, "unmap");
	if (!b->detect_zeroes && strcmp(v, "off"))
		return err_set(err, -EINVAL, "%s: detect-zeroes=%s is none of off, on, unmap", what, v);
	return strcmp(v, "unmap") || b->discard_unmap ? 0 : err_set(err, -EINVAL, "%s: detect-zeroes=unmap is not allowed without discard=unmap", what);
}

/* Keys that say how a file is used, shared by all three options. */
static int common_keys(struct vm_drive *d, const char *what, struct err *err)
{
	struct keyvals *l = &d->text;
	struct block_opts *b = &d->b;
	const char *v;
	int ret;

	b->format = keyvals_get(l, "format");
	if ((v = keyvals_get(l, "driver"))) {
		if (b->format && strcmp(b->format, v))
			return err_set(err, -EINVAL, "%s: format=%s and driver=%s are both given", what, b->format, v);
		b->format = !strcmp(v, "file") || !strcmp(v, "host_device") ? "raw" : v;
		d->whole = strcmp(b->format, "raw") && block_check_format(what, v, NULL);
		if (d->whole) /* a node of another kind, described by the keys that are no drive's */
			b->format = NULL;
	}
	if (b->format && (ret = block_check_format(what, b->format, err)))
		return ret;
	if ((v = keyvals_get(l, "cache")) && (ret = set_cache(b, what, v, err)))
		return ret;
	bool writeback = b->cache != CACHE_WRITETHROUGH && b->cache != CACHE_DIRECTSYNC;
	if ((ret = keyvals_bool(l, what, "cache.writeback", &writeback, err)))
		return ret;
	if (keyvals_get(l, "cache.writeback") && b->cache != CACHE_UNSAFE) {
		bool direct = b->cache == CACHE_NONE || b->cache == CACHE_DIRECTSYNC;
		b->cache = writeback ? (direct ? CACHE_NONE : CACHE_WRITEBACK) : direct ? CACHE_DIRECTSYNC : CACHE_WRITETHROUGH;
	}
	if ((ret = keyvals_bool(l, what, "readonly", &b->read_only, err)) ||
	    (ret = block_node_keys(l, what, b, err)) ||
	    (ret = keyvals_bool(l, what, "snapshot", &b->snapshot, err)) ||
	    (ret = detect_zeroes_key(what, keyvals_get(l, "detect-zeroes"), b, err)) ||
	    (ret = block_aio_key(what, keyvals_get(l, "aio"), b, err)) ||
	    (ret = throttle_keys(l, what, "throttling.", &d->limits, err)) ||
	    (!d->whole && (ret = block_format_keys(l, what, b, err))) ||
	    (ret = keyvals_bool(l, what, "copy-on-read", &b->copy_on_read, err)))
		return ret;
	if (b->copy_on_read && b->read_only) {
		log_warn("%s: disabling copy-on-read on a read-only drive", what);
		b->copy_on_read = false;
	}
	d->group = keyvals_get(l, "throttling.group");
	if (!d->group)
		d->group = keyvals_get(l, "group");
	return 0;
}

/* The adapter for if=scsi and for CD drives: virtio-scsi, since there is no IDE or AHCI controller. */
static void add_scsi(struct vm_opts *o)
{
	if (!o->scsi_added)
		vmopts_device(o, "virtio-scsi-pci", "id", "lodge-scsi", NULL);
	o->scsi_added = true;
}

/* The device behind if=virtio, if=scsi or a CD, with what -drive says about it. */
static int drive_device(struct vm_opts *o, struct vm_drive *d, const char *what, const char *cls, struct err *err)
{
	static const char *const pass[] = { "serial", "werror", "rerror", "addr" };
	bool scsi = !strncmp(cls, "scsi", 4);

	if (scsi)
		add_scsi(o);
	struct keyvals *l = &vmopts_add(o, devices)->opts;
	char *text = vmopts_printf(o, "%s,drive=%s%s%s%s", cls, d->id, scsi ? ",bus=lodge-scsi.0" : "", scsi && d->place ? ",scsi-id=" : "",
				   scsi && d->place ? d->place : "");

	for (unsigned i = 0; i < ARRAY_SIZE(pass); i++) {
		const char *v = keyvals_get(&d->text, pass[i]);
		if (v)
			text = vmopts_printf(o, "%s,%s=%s", text, pass[i], v);
	}
	return keyvals_parse(l, what, text, "driver", err);
}

/* What nobody took describes the node. */
static int whole_node(struct vm_drive *d, struct err *err)
{
	int ret = keyvals_add(&d->node, "driver", keyvals_get(&d->text, "driver"));

	for (unsigned i = 0; !ret && i < d->text.n; i++) {
		struct keyval *kv = &d->text.o[i];

		if (!kv->used)
			ret = keyvals_add(&d->node, kv->key, kv->val);
		kv->used = true;
	}
	return ret ? err_set(err, -ENOMEM, "out of memory") : 0;
}

/* `device`: the class behind it, NULL: a -device will name it. */
static int finish_drive(struct vm_opts *o, struct vm_drive *d, const char *what, const char *device, struct err *err)
{
	const char *v = keyvals_get(&d->text, "id"), *node = keyvals_get(&d->text, "node-name");
	int ret = common_keys(d, what, err);

	v = v ? v : node;

	if (ret)
		return ret;
	d->id = v ? vmopts_printf(o, "%s", v) : vmopts_printf(o, "#drive%u", o->auto_ids++);
	if (d->whole) {
		if (device && (ret = drive_device(o, d, what, device, err)))
			return ret;
		return whole_node(d, err);
	}
	d->file = vmopts_printf(o, "%s", keyvals_get(&d->text, "file") ? keyvals_get(&d->text, "file") : "");
	if (!*d->file && keyvals_get(&d->text, "filename"))
		d->file = vmopts_printf(o, "%s", keyvals_get(&d->text, "filename"));
	if (keyvals_sub(&d->leaf, &d->text, "file.") && *d->file) { /* one names the file, the others say how it is used */
		if (keyvals_get(&d->leaf, "filename"))
			return err_set(err, -EINVAL, "%s: file= and file.filename= are both given", what);
		if (keyvals_add(&d->leaf, "filename", d->file))
			return err_set(err, -ENOMEM, "out of memory");
		d->file = vmopts_printf(o, "%s", "");
	}
	keyvals_sub(&d->backing, &d->text, "backing.");
	keyvals_sub(&d->data, &d->text, "data-file.");
	d->empty = !*d->file && !d->leaf.n;
	if (d->empty && device && strcmp(device, "scsi-cd"))
		return err_set(err, -EINVAL, "%s: file= is missing: the disk needs media, but the drive is empty (only a CD drive may be)", what);
	if (device && (ret = drive_device(o, d, what, device, err)))
		return ret;
	return keyvals_end(&d->text, what, err);
}

/*
 * index= or unit=: the target on the SCSI bus. virtio disks stand on the PCI bus in the order of the command line, as with QEMU;
 * there the number only has to be one of its own.
 */
static int drive_place(struct vm_opts *o, struct vm_drive *d, struct err *err)
{
	uint64_t index = UINT64_MAX, unit = UINT64_MAX;
	int ret = keyvals_u64(&d->text, "-drive", "index", 0, 255, &index, err);

	if (!ret)
		ret = keyvals_u64(&d->text, "-drive", "unit", 0, 255, &unit, err);
	if (ret || (index == UINT64_MAX && unit == UINT64_MAX))
		return ret;
	if (index != UINT64_MAX && unit != UINT64_MAX)
		return err_set(err, -EINVAL, "-drive: index= and unit= are both given");
	d->place = vmopts_printf(o, "%u", (unsigned)(unit == UINT64_MAX ? index : unit));
	for (struct vm_drive *e = o->drives; e < d; e++)
		if (e->place && d->cls && e->cls && !strncmp(d->cls, e->cls, 4) && !strcmp(d->place, e->place))
			return err_set(err, -EEXIST, "-drive: index %s (or unit) is used twice", d->place);
	return 0;
}

int opt_drive(struct vm_opts *o, const char *arg, struct err *err)
{
	struct vm_drive *d = vmopts_add(o, drives);
	int ret = keyvals_parse(&d->text, "-drive", arg, "file", err);

	if (ret)
		return ret;
	const char *bus = keyvals_get(&d->text, "if"), *media = keyvals_get(&d->text, "media");
	bool cd = media && !strcmp(media, "cdrom");
	if (media && !cd && strcmp(media, "disk"))
		return err_set(err, -EINVAL, "-drive: media=%s is neither disk nor cdrom", media);
	if (bus ? strcmp(bus, "virtio") && strcmp(bus, "scsi") && strcmp(bus, "none") && !(cd && !strcmp(bus, "ide")) : !cd)
		return err_set(err, -ENOTSUP, "-drive: if=%s is not supported; write if=virtio or if=scsi, or if=none with -device",
			       bus ? bus : "ide (the default)");
	if (bus && cd && !strcmp(bus, "virtio"))
		return err_set(err, -EINVAL, "-drive: there is no virtio CD drive; write if=scsi,media=cdrom");
	d->b.read_only = cd;
	d->cls = bus && !strcmp(bus, "none") ? NULL : cd ? "scsi-cd" : !strcmp(bus, "scsi") ? "scsi-hd" : "virtio-blk-pci";
	ret = drive_place(o, d, err);
	return ret ? ret : finish_drive(o, d, "-drive", d->cls, err);
}

int opt_disk(struct vm_opts *o, const char *arg, struct err *err)
{
	struct vm_drive *d = vmopts_add(o, drives);
	int ret = keyvals_parse(&d->text, "--disk", arg, "file", err);

	return ret ? ret : finish_drive(o, d, "--disk", "virtio-blk-pci", err);
}

int opt_blockdev(struct vm_opts *o, const char *arg, struct err *err)
{
	struct vm_node *n = vmopts_add(o, nodes);
	int ret = keyvals_parse(&n->opts, "-blockdev", arg, "driver", err);

	if (ret)
		return ret;
	const char *name = keyvals_get(&n->opts, "node-name");
	return name && *name ? 0 : err_set(err, -EINVAL, "-blockdev: node-name= is missing");
}

int opt_hd(struct vm_opts *o, const char *arg, struct err *err)
{
	return err_set(err, -ENOTSUP, "-hda to -hdd need an IDE controller, which is not there yet; use -drive file=%s,if=virtio,format=raw", arg);
}

int opt_cdrom(struct vm_opts *o, const char *arg, struct err *err)
{
	struct vm_drive *d = vmopts_add(o, drives);
	char *text = vmopts_printf(o, "format=raw,readonly=on");
	int ret = keyvals_parse(&d->text, "-cdrom", text, NULL, err);

	if (ret)
		return ret;
	struct keyval *kv = vmopts_grow(&d->text.o, &d->text.n, sizeof *kv); /* the name as it is, commas and all */
	*kv = (struct keyval){ strdup("file"), strdup(arg), false };
	d->b.read_only = true;
	return kv->key && kv->val ? finish_drive(o, d, "-cdrom", "scsi-cd", err) : err_set(err, -ENOMEM, "out of memory");
}

int opt_snapshot(struct vm_opts *o, const char *arg, struct err *err)
{
	o->snapshot = true;
	return 0;
}
