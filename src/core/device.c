/* Devices from their property tables: defaults, one property from text, create and free. */
#include "core/device.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"

const struct prop *device_class_prop(const struct device_class *cls, const char *name)
{
	for (const struct prop *p = cls->props; p && p->name; p++) {
		if (!strcmp(p->name, name))
			return p;
	}
	return NULL;
}

static void *field(struct device *d, const struct prop *p)
{
	return (char *)d + p->offset;
}

static const char *label(const struct device *d, char *buf, size_t len)
{
	snprintf(buf, len, d->id ? "device '%s' (%s)" : "device %s%s", d->id ? d->id : d->cls->name,
		 d->id ? d->cls->name : "");
	return buf;
}

/* A value that does not fit the property: what it was, and what would. */
static int bad_value(struct device *d, const struct prop *p, const char *value, int code, struct err *err,
		     const char *valid)
{
	char l[128];
	return err_set(err, code, "%s: property '%s': '%s' is not valid; valid: %s", label(d, l, sizeof l), p->name,
		       value, valid);
}

static int store_u64(struct device *d, const struct prop *p, uint64_t v)
{
	void *f = field(d, p);
	switch (p->type) {
	case PROP_U8:
		*(uint8_t *)f = (uint8_t)v;
		return v > UINT8_MAX ? -ERANGE : 0;
	case PROP_U16:
		*(uint16_t *)f = (uint16_t)v;
		return v > UINT16_MAX ? -ERANGE : 0;
	case PROP_U32:
		*(uint32_t *)f = (uint32_t)v;
		return v > UINT32_MAX ? -ERANGE : 0;
	default:
		*(uint64_t *)f = v;
		return 0;
	}
}

static uint64_t type_max(enum prop_type t)
{
	return t == PROP_U8 ? UINT8_MAX : t == PROP_U16 ? UINT16_MAX : t == PROP_U32 ? UINT32_MAX : UINT64_MAX;
}

static int set_number(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	uint64_t v, max = p->max ? p->max : type_max(p->type);
	int r = p->type == PROP_SIZE ? parse_size(value, 1, &v) : parse_u64(value, &v);
	if (!r && (v < p->min || v > max))
		r = -ERANGE;
	if (!r)
		return store_u64(d, p, v);
	char valid[96];
	const char *kind = p->type == PROP_SIZE ? "a size such as 512, 64K or 1G" : "a number";
	if (max == UINT64_MAX && !p->min)
		snprintf(valid, sizeof valid, "%s", kind);
	else
		snprintf(valid, sizeof valid, "%s from %llu to %llu", kind, (unsigned long long)p->min, (unsigned long long)max);
	return bad_value(d, p, value, r, err, valid);
}

static int set_enum(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	char valid[256] = "";
	size_t n = 0;
	for (int i = 0; p->values[i]; i++) {
		if (!strcmp(p->values[i], value)) {
			*(int *)field(d, p) = i;
			return 0;
		}
		if (n < sizeof valid)
			n += (size_t)snprintf(valid + n, sizeof valid - n, "%s%s", i ? ", " : "", p->values[i]);
	}
	return bad_value(d, p, value, -EINVAL, err, valid);
}

/* "3", "3.1", "0x1f.7", also "03.0": slot in hexadecimal as everywhere in PCI. */
static int set_pci_addr(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	char *end;
	unsigned long slot = 32, fn = 0;
	if (isxdigit((unsigned char)value[0]))
		slot = strtoul(value, &end, 16);
	if (slot < 32 && *end == '.' && isdigit((unsigned char)end[1]))
		fn = strtoul(end + 1, &end, 10);
	if (slot > 31 || fn > 7 || *end)
		return bad_value(d, p, value, -EINVAL, err, "slot or slot.function in hexadecimal, up to 1f.7");
	*(int32_t *)field(d, p) = (int32_t)(slot << 3 | fn);
	return 0;
}

static int set_str(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	char **f = field(d, p);
	char *copy = value ? strdup(value) : NULL;
	if (value && !copy)
		return err_set(err, -ENOMEM, "out of memory");
	free(*f);
	*f = copy;
	return 0;
}

static int set_backend(struct device *d, const struct prop *p, const char *value, const struct backend_lookup *find,
		       struct err *err)
{
	static const char *const option[] = { [PROP_DRIVE] = "-drive or -blockdev", [PROP_NETDEV] = "-netdev",
					      [PROP_CHARDEV] = "-chardev", [PROP_IOTHREAD] = "-object iothread" };
	char l[128];
	struct err why = { 0 };
	void *b = find && find->find ? find->find(find->opaque, p->type, value, &why) : NULL;
	if (b || (why.code == -ENOMEDIUM && p->dflt)) {
		*(void **)field(d, p) = b;
		return 0;
	}
	if (why.code)
		return err_set(err, why.code, "%s: property '%s': %s", label(d, l, sizeof l), p->name, why.msg);
	return err_set(err, -ENOENT, "%s: property '%s': no %s has id '%s'", label(d, l, sizeof l), p->name,
		       option[p->type], value);
}

/* "io0:io1": a colon is in no id. */
static int set_iothreads(struct device *d, const struct prop *p, const char *value, const struct backend_lookup *find, struct err *err)
{
	const char *all = value;
	void **f = field(d, p);
	char id[128];

	for (unsigned n = 0; n < PROP_IOTHREADS_MAX; n++, value++) {
		struct prop one = *p;
		size_t len = strcspn(value, ":");
		snprintf(id, sizeof id, "%.*s", (int)MIN(len, sizeof id - 1), value);
		one.type = PROP_IOTHREAD;
		one.offset += n * sizeof *f;
		int r = set_backend(d, &one, id, find, err);
		if (r)
			return r;
		value += len;
		if (*value)
			continue;
		for (n++; n < PROP_IOTHREADS_MAX; n++)
			f[n] = NULL;
		return 0;
	}
	return bad_value(d, p, all, -E2BIG, err, "at most 16 ids");
}

static int set_bool(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	int r = parse_bool(value, field(d, p));
	return r ? bad_value(d, p, value, r, err, "on, off") : 0;
}

static int set_mac(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	uint8_t mac[6];
	if (parse_mac(value, mac))
		return bad_value(d, p, value, -EINVAL, err, "six bytes such as 52:54:00:12:34:56");
	if (mac[0] & 1)
		return bad_value(d, p, value, -EINVAL, err, "a unicast address (the first byte is even)");
	memcpy(field(d, p), mac, 6);
	return 0;
}

static int set_bootindex(struct device *d, const struct prop *p, const char *value, struct err *err)
{
	uint64_t v = 0;
	bool none = !strcmp(value, "-1");
	int r = none ? 0 : parse_u64(value, &v);

	if (r || v > INT32_MAX)
		return bad_value(d, p, value, r ? r : -ERANGE, err, "a number from 0 to 2147483647, or -1 for none");
	*(int32_t *)field(d, p) = none ? -1 : (int32_t)v;
	return 0;
}

static int set_value(struct device *d, const struct prop *p, const char *value, const struct backend_lookup *find,
		     struct err *err)
{
	switch (p->type) {
	case PROP_BOOL:
		return set_bool(d, p, value, err);
	case PROP_U8:
	case PROP_U16:
	case PROP_U32:
	case PROP_U64:
	case PROP_SIZE:
		return set_number(d, p, value, err);
	case PROP_BOOTINDEX:
		return set_bootindex(d, p, value, err);
	case PROP_STR:
		return set_str(d, p, value, err);
	case PROP_MAC:
		return set_mac(d, p, value, err);
	case PROP_PCI_ADDR:
		return set_pci_addr(d, p, value, err);
	case PROP_DRIVE:
	case PROP_NETDEV:
	case PROP_CHARDEV:
	case PROP_IOTHREAD:
		return set_backend(d, p, value, find, err);
	case PROP_IOTHREADS:
		return set_iothreads(d, p, value, find, err);
	case PROP_ENUM:
		return set_enum(d, p, value, err);
	}
	return -EINVAL;
}

static int set_default(struct device *d, const struct prop *p, struct err *err)
{
	switch (p->type) {
	case PROP_BOOL:
		*(bool *)field(d, p) = p->dflt != 0;
		return 0;
	case PROP_U8:
	case PROP_U16:
	case PROP_U32:
	case PROP_U64:
	case PROP_SIZE:
		return store_u64(d, p, p->dflt);
	case PROP_STR:
		return set_str(d, p, p->dflt_str, err);
	case PROP_ENUM:
		*(int *)field(d, p) = (int)p->dflt;
		return p->dflt_str ? set_enum(d, p, p->dflt_str, err) : 0;
	case PROP_BOOTINDEX:
		*(int32_t *)field(d, p) = -1;
		return 0;
	case PROP_PCI_ADDR:
		*(int32_t *)field(d, p) = -1;
		return p->dflt_str ? set_pci_addr(d, p, p->dflt_str, err) : 0;
	case PROP_MAC:
		memset(field(d, p), 0, 6);
		return p->dflt_str ? set_mac(d, p, p->dflt_str, err) : 0;
	case PROP_DRIVE:
	case PROP_NETDEV:
	case PROP_CHARDEV:
	case PROP_IOTHREAD:
		*(void **)field(d, p) = NULL;
		return 0;
	case PROP_IOTHREADS:
		memset(field(d, p), 0, PROP_IOTHREADS_MAX * sizeof(void *));
		return 0;
	}
	return -EINVAL;
}

int device_set_defaults(struct device *d, struct err *err)
{
	for (const struct prop *p = d->cls->props; p && p->name; p++) {
		int r = set_default(d, p, err);
		if (r)
			return r;
	}
	return 0;
}

static int unknown_prop(struct device *d, const char *name, struct err *err)
{
	const char *names[64] = { NULL };
	size_t n = 0;
	char l[128], list[320] = "";
	size_t used = 0;
	for (const struct prop *p = d->cls->props; p && p->name && n < ARRAY_SIZE(names); p++) {
		names[n++] = p->name;
		if (used < sizeof list)
			used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", p->name);
	}
	const char *near = parse_nearest(name, names, n);
	if (near)
		return err_set(err, -ENOENT, "%s has no property '%s'; did you mean '%s'?", label(d, l, sizeof l), name, near);
	return err_set(err, -ENOENT, "%s has no property '%s'; valid: %s", label(d, l, sizeof l), name,
		       n ? list : "none");
}

int device_set_prop(struct device *d, const char *name, const char *value, const struct backend_lookup *find,
		    struct err *err)
{
	const struct prop *p = device_class_prop(d->cls, name);
	return p ? set_value(d, p, value, find, err) : unknown_prop(d, name, err);
}

/* Private header in front of every device: not part of the contract, so that nobody relies on it. */
struct holder {
	bool created;
	_Alignas(64) char dev[];
};

static struct holder *holder_of(struct device *d)
{
	return container_of((char (*)[])d, struct holder, dev);
}

int device_alloc(struct device **out, const struct device_class *cls, struct machine_env *env, const char *id,
		 struct err *err)
{
	size_t size = sizeof(struct holder) + MAX(cls->size, sizeof(struct device));
	struct holder *h = aligned_alloc(64, ALIGN_UP(size, 64));
	if (!h)
		return err_set(err, -ENOMEM, "device %s: out of memory", cls->name);
	memset(h, 0, ALIGN_UP(size, 64));
	struct device *d = (struct device *)h->dev;
	d->cls = cls;
	d->env = env;
	if (id && !(d->id = strdup(id))) {
		free(h);
		return err_set(err, -ENOMEM, "device %s: out of memory", cls->name);
	}
	int r = device_set_defaults(d, err);
	if (r) {
		device_free(d);
		return r;
	}
	*out = d;
	return 0;
}

int device_create(struct device *d, struct err *err)
{
	char l[128];
	struct err why = { 0 };
	int r = d->cls->create ? d->cls->create(d, &why) : 0;
	holder_of(d)->created = !r;
	if (!r)
		return 0;
	if (!why.code)
		return err_set_errno(err, r, "%s: cannot be created", label(d, l, sizeof l));
	return err_set(err, r, "%s: %s", label(d, l, sizeof l), why.msg);
}

void device_free(struct device *d)
{
	if (!d)
		return;
	if (holder_of(d)->created && d->cls->destroy)
		d->cls->destroy(d);
	for (const struct prop *p = d->cls->props; p && p->name; p++) {
		if (p->type == PROP_STR)
			free(*(char **)field(d, p));
	}
	free(d->id);
	free(holder_of(d));
}
