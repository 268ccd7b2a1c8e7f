/* -device, -object, -global, and network cards with their back ends. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "cli/options.h"

static int unknown_class(const char *what, const char *name, struct err *err)
{
	const char *names[256];
	unsigned n = 0;

	for (const struct device_class *c; n < ARRAY_SIZE(names) && (c = device_class_at(n)); n++)
		names[n] = c->name;
	const char *near = parse_nearest(name, names, n);
	return err_set(err, -ENODEV, "%s: there is no device '%s'%s%s%s; '-device help' lists them", what, name,
		       near ? " (did you mean " : "", near ? near : "", near ? "?)" : "");
}

int opt_device(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals *l = &vmopts_add(o, devices)->opts;
	int ret = keyvals_parse(l, "-device", arg, "driver", err);

	if (ret)
		return ret;
	const char *cls = keyvals_get(l, "driver");
	if (!cls)
		return err_set(err, -EINVAL, "-device: name a device class; '-device help' lists them");
	if (!strcmp(cls, "help") || !strcmp(cls, "?"))
		return help_devices(), OPT_DONE;
	if (!device_class_find(cls))
		return unknown_class("-device", cls, err);
	if (keyvals_wants_help(l)) {
		ret = help_device(cls, err);
		return ret ? ret : OPT_DONE;
	}
	return 0;
}

int opt_global(struct vm_opts *o, const char *arg, struct err *err)
{
	const char *dot = strchr(arg, '.'), *eq = strchr(arg, '=');

	if (!dot || !eq || eq < dot)
		return err_set(err, -EINVAL, "-global: '%s' is not CLASS.KEY=VALUE", arg);
	char *driver = vmopts_printf(o, "%.*s", (int)(dot - arg), arg), *prop = vmopts_printf(o, "%.*s", (int)(eq - dot - 1), dot + 1);
	const struct device_class *c = device_class_find(driver);
	if (!c)
		return unknown_class("-global", driver, err);
	if (!device_class_prop(c, prop))
		return err_set(err, -EINVAL, "-global: device '%s' has no property '%s'", driver, prop);
	struct vm_global *g = vmopts_add(o, globals);
	*g = (struct vm_global){ driver, prop, vmopts_printf(o, "%s", eq + 1) };
	return 0;
}

static int check_memory_backend(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	const char *type = keyvals_get(l, "qom-type");
	bool share = type && !strcmp(type, "memory-backend-memfd"), huge = false;
	int ret;

	if ((ret = keyvals_bool(l, "-object memory-backend", "share", &share, err)) ||
	    (ret = keyvals_bool(l, "-object memory-backend", "hugetlb", &huge, err)) ||
	    (ret = keyvals_bool(l, "-object memory-backend", "prealloc", &o->prealloc, err)))
		return ret;
	o->hugepages |= huge;
	o->mem_private |= !share;
	return keyvals_get(l, "size") ? 0 : err_set(err, -EINVAL, "-object memory-backend: size= is missing");
}

int opt_object(struct vm_opts *o, const char *arg, struct err *err)
{
	struct vm_object *obj = vmopts_add(o, objects);
	struct keyvals *l = &obj->opts;
	int ret = keyvals_parse(l, "-object", arg, "qom-type", err);

	if (ret)
		return ret;
	const char *type = keyvals_get(l, "qom-type"), *id = keyvals_get(l, "id");
	if (type && !strcmp(type, "help"))
		return puts("iothread\nmemory-backend-memfd\nmemory-backend-ram\nrng-builtin\nrng-random\nsecret\nthrottle-group\n"
			    "tls-creds-psk\ntls-creds-x509"), OPT_DONE;
	if (!type || !id)
		return err_set(err, -EINVAL, "-object: %s is missing", type ? "id=" : "the type");
	obj->type = vmopts_printf(o, "%s", type);
	obj->id = vmopts_printf(o, "%s", id);
	if (!strcmp(type, "rng-random"))
		ret = keyvals_only(l, "-object rng-random", "filename", "/dev/urandom|/dev/random", err);
	else if (!strcmp(type, "memory-backend-ram") || !strcmp(type, "memory-backend-memfd"))
		ret = check_memory_backend(o, l, err);
	else if (!strcmp(type, "throttle-group"))
		ret = opt_throttle_group(o, obj, err);
	else if (tls_is_object(type))
		ret = tls_store_add(&o->tls, l, err);
	else if (strcmp(type, "rng-builtin") && strcmp(type, "iothread"))
		return err_set(err, -ENOTSUP, "-object: type '%s' is not supported (rng-builtin, rng-random, memory-backend-ram, memory-backend-memfd, "
			       "iothread, throttle-group, tls-creds-x509, tls-creds-psk, secret)", type);
	return ret ? ret : keyvals_end(l, "-object", err);
}

/* -- network ----------------------------------------------------------------------------------- */

static bool netdev_help(const char *arg)
{
	return (!strcmp(arg, "help") || !strcmp(arg, "?")) && puts("user\ntap") >= 0;
}

int opt_netdev(struct vm_opts *o, const char *arg, struct err *err)
{
	if (netdev_help(arg))
		return OPT_DONE;
	struct vm_spec *n = vmopts_add(o, netdevs);
	struct keyvals l;
	int ret = keyvals_parse(&l, "-netdev", arg, "type", err);

	if (ret)
		return ret;
	const char *id = keyvals_get(&l, "id");
	if (!keyvals_get(&l, "type") || !id)
		ret = err_set(err, -EINVAL, "-netdev: %s is missing", id ? "the type (user, tap)" : "id=");
	else
		*n = (struct vm_spec){ vmopts_printf(o, "%s", id), NULL };
	if (!ret) {
		char *text = keyvals_text(&l, "type", NULL);
		n->text = vmopts_printf(o, "%s", text ? text : "");
		free(text);
	}
	keyvals_free(&l);
	return ret;
}

/* A back end and its virtio card from one option's text. */
static int card(struct vm_opts *o, const char *what, const char *arg, struct err *err)
{
	static const char *const skip[] = { "model", "mac", "macaddr", "addr", "id", NULL };
	if (netdev_help(arg))
		return OPT_DONE;
	struct keyvals l;
	int ret = keyvals_parse(&l, what, arg, "type", err);

	if (ret)
		return ret;
	o->net_given = true;
	const char *type = keyvals_get(&l, "type"), *model = keyvals_get(&l, "model"), *mac = keyvals_get(&l, "mac");
	const char *addr = keyvals_get(&l, "addr"), *id = keyvals_get(&l, "id");
	if (!mac)
		mac = keyvals_get(&l, "macaddr");
	if (type && !strcmp(type, "none")) {
		ret = keyvals_end(&l, what, err);
		goto out;
	}
	if (model && strncmp(model, "virtio", 6)) {
		ret = err_set(err, -ENOTSUP, "%s: model=%s is not supported, only virtio", what, model);
		goto out;
	}
	char *text = keyvals_text(&l, "type", skip);
	char *name = id ? vmopts_printf(o, "%s", id) : vmopts_printf(o, "#net%u", o->auto_ids++);
	struct vm_spec *n = vmopts_add(o, netdevs);
	*n = (struct vm_spec){ name, vmopts_printf(o, "%s,id=%s", text ? text : "", name) };
	free(text);
	struct keyvals *d = &vmopts_add(o, devices)->opts;
	ret = keyvals_parse(d, what, vmopts_printf(o, "virtio-net-pci,netdev=%s%s%s%s%s", name, mac ? ",mac=" : "",
						   mac ? mac : "", addr ? ",addr=" : "", addr ? addr : ""), "driver", err);
out:
	keyvals_free(&l);
	return ret;
}

int opt_nic(struct vm_opts *o, const char *arg, struct err *err)
{
	return card(o, "-nic", arg, err);
}

int opt_run_net(struct vm_opts *o, const char *arg, struct err *err)
{
	return card(o, "--net", arg, err);
}

int opt_net(struct vm_opts *o, const char *arg, struct err *err)
{
	if (strcmp(arg, "none"))
		return err_set(err, -ENOTSUP, "-net %s is not supported; use -nic, or -netdev with -device virtio-net-pci", arg);
	o->net_given = true;
	return 0;
}
