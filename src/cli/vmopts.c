#include "cli/vmopts.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/parse.h"
#include "base/util.h"
#include "cli/options.h"

static _Noreturn void out_of_memory(void)
{
	fputs("lodge: out of memory\n", stderr);
	exit(1);
}

void vmopts_init(struct vm_opts *o, bool qemu)
{
	*o = (struct vm_opts){
		.qemu = qemu, .type = "q35", .accel = ACCEL_AUTO, .cpus = 1, .log_level = LOG_WARN, .dump_guest_core = true,
		.mem_size = qemu ? 128ull << 20 : 512ull << 20,
	};
	sandbox_default(&o->sandbox);
}

char *vmopts_printf(struct vm_opts *o, const char *fmt, ...)
{
	va_list ap;
	char *s = NULL;

	va_start(ap, fmt);
	int n = vasprintf(&s, fmt, ap);
	va_end(ap);
	char **p = n < 0 ? NULL : realloc(o->pool, (o->npool + 1) * sizeof *p);
	if (!p)
		out_of_memory();
	o->pool = p;
	return p[o->npool++] = s;
}

void *vmopts_grow(void *list, unsigned *n, size_t size)
{
	char **l = list, *p = realloc(*l, (*n + 1) * size);

	if (!p)
		out_of_memory();
	*l = p;
	return memset(p + (*n)++ * size, 0, size);
}

void vmopts_device(struct vm_opts *o, const char *cls, ...)
{
	struct keyvals *l = &vmopts_add(o, devices)->opts;
	char *text = vmopts_printf(o, "%s", cls);
	const char *k;
	va_list ap;

	va_start(ap, cls);
	while ((k = va_arg(ap, const char *)))
		text = vmopts_printf(o, "%s,%s=%s", text, k, va_arg(ap, const char *));
	va_end(ap);
	if (keyvals_parse(l, cls, text, "driver", NULL))
		out_of_memory();
}

void vmopts_free(struct vm_opts *o)
{
	for (unsigned i = 0; i < o->ndevices; i++)
		keyvals_free(&o->devices[i].opts);
	for (unsigned i = 0; i < o->ndrives; i++) {
		keyvals_free(&o->drives[i].text);
		keyvals_free(&o->drives[i].leaf);
		keyvals_free(&o->drives[i].backing);
		keyvals_free(&o->drives[i].data);
		keyvals_free(&o->drives[i].node);
	}
	for (unsigned i = 0; i < o->nnodes; i++) {
		keyvals_free(&o->nodes[i].opts);
		keyvals_free(&o->nodes[i].flat);
	}
	for (unsigned i = 0; i < o->nobjects; i++)
		keyvals_free(&o->objects[i].opts);
	for (unsigned i = 0; i < o->npool; i++)
		free(o->pool[i]);
	tls_store_free(&o->tls);
	free(o->devices);
	free(o->drives);
	free(o->nodes);
	free(o->netdevs);
	free(o->chardevs);
	free(o->objects);
	free(o->globals);
	free(o->pool);
}

/* -- the command line --------------------------------------------------------------------------- */

static int unknown_option(const struct vm_opts *o, const char *arg, struct err *err)
{
	unsigned ctx = o->qemu ? CTX_QEMU : CTX_RUN, n = 0;
	const char *names[128], *name = arg + strspn(arg, "-");
	const struct option_def *d;

	for (unsigned i = 0; (d = option_at(i)) && n < ARRAY_SIZE(names); i++)
		if (d->ctx & ctx)
			names[n++] = d->name;
	const char *near = parse_nearest(name, names, n), *dash = o->qemu ? "-" : "--";
	return err_set(err, -EINVAL, "unknown option '%s'%s%s%s%s; '%shelp' lists what there is", arg,
		       near ? " (did you mean " : "", near ? dash : "", near ? near : "", near ? "?)" : "", dash);
}

/* The option's name without dashes; "--name=value" also sets *value. NULL: no option. */
static const char *option_name(struct vm_opts *o, const char *arg, const char **value)
{
	const char *name = arg[1] == '-' ? arg + 2 : arg + 1;

	*value = NULL;
	if (arg[0] != '-' || !*name || (!o->qemu && arg[1] != '-' && strcmp(arg, "-h")))
		return NULL;
	const char *eq = arg[1] == '-' && !o->qemu ? strchr(name, '=') : NULL;
	if (!eq)
		return name;
	*value = eq + 1;
	return vmopts_printf(o, "%.*s", (int)(eq - name), name);
}

int vmopts_parse(struct vm_opts *o, int argc, char **argv, struct err *err)
{
	for (int i = 0; i < argc; i++) {
		const char *value, *name = option_name(o, argv[i], &value);
		const struct option_def *d;

		if (!name && argv[i][0] != '-' && o->qemu)
			return err_set(err, -EINVAL, "'%s' is no option; a disk is -drive file=%s,if=virtio,format=raw", argv[i], argv[i]);
		if (!name && argv[i][0] != '-')
			return err_set(err, -EINVAL, "'%s' is no option; the kernel is --kernel FILE, a disk --disk FILE", argv[i]);
		d = name ? option_find(o->qemu ? CTX_QEMU : CTX_RUN, name) : NULL;
		if (!d)
			return unknown_option(o, argv[i], err);
		if (value && !d->arg)
			return err_set(err, -EINVAL, "%s: takes no argument", argv[i]);
		if (d->arg && !value) {
			if (i + 1 >= argc)
				return err_set(err, -EINVAL, "%s: its argument (%s) is missing", argv[i], d->arg);
			value = argv[++i];
		}
		int ret = d->fn(o, value, err);
		if (ret)
			return ret;
	}
	return 0;
}

static bool has_object(const struct vm_opts *o, const char *id)
{
	for (unsigned i = 0; i < o->nobjects; i++)
		if (!strcmp(o->objects[i].id, id))
			return true;
	return false;
}

static int duplicate(const char *what, const char *id, struct err *err)
{
	return err_set(err, -EEXIST, "%s: id '%s' is used twice", what, id);
}

static int check_ids(struct vm_opts *o, struct err *err)
{
	for (unsigned i = 0; i < o->ndevices; i++) {
		const char *a = keyvals_get(&o->devices[i].opts, "id"), *b;
		for (unsigned j = 0; a && j < i; j++)
			if ((b = keyvals_get(&o->devices[j].opts, "id")) && !strcmp(a, b))
				return duplicate("-device", a, err);
	}
	for (unsigned i = 0; i < o->ndrives; i++)
		for (unsigned j = 0; j < i; j++)
			if (!strcmp(o->drives[i].id, o->drives[j].id))
				return duplicate("-drive", o->drives[i].id, err);
	for (unsigned i = 0; i < o->nnetdevs; i++)
		for (unsigned j = 0; j < i; j++)
			if (!strcmp(o->netdevs[i].id, o->netdevs[j].id))
				return duplicate("-netdev", o->netdevs[i].id, err);
	for (unsigned i = 0; i < o->nchardevs; i++)
		for (unsigned j = 0; j < i; j++)
			if (!strcmp(o->chardevs[i].id, o->chardevs[j].id))
				return duplicate("-chardev", o->chardevs[i].id, err);
	return 0;
}

/* The object that -machine memory-backend= names sets the size. */
static int apply_memory_backend(struct vm_opts *o, struct err *err)
{
	if (!o->mem_backend)
		return 0;
	for (unsigned i = 0; i < o->nobjects; i++) {
		struct vm_object *obj = &o->objects[i];

		if (strcmp(obj->id, o->mem_backend) || strncmp(obj->type, "memory-backend", 14))
			continue;
		uint64_t size;
		const char *v = keyvals_get(&obj->opts, "size");
		if (!v || parse_size(v, 1, &size) || size < 1 << 20 || (size & 4095))
			return err_set(err, -EINVAL, "-object %s: size=%s is no size of at least 1M", obj->id, v ? v : "");
		o->mem_size = size;
		return 0;
	}
	return err_set(err, -ENOENT, "-machine: memory-backend=%s names no -object", o->mem_backend);
}

int vmopts_finish(struct vm_opts *o, struct err *err)
{
	int ret;

	if ((ret = apply_memory_backend(o, err)))
		return ret;
	for (unsigned i = 0; i < o->ndevices; i++) {
		const char *rng = keyvals_get(&o->devices[i].opts, "rng");
		if (rng && !has_object(o, rng))
			return err_set(err, -ENOENT, "-device: rng=%s names no -object", rng);
	}
	if (!o->serial_given && !o->nodefaults && (o->nographic || !o->qemu || !o->display_none))
		ret = opt_serial(o, "mon:stdio", err);
	if (!ret && o->qemu && !o->net_given && !o->nodefaults && !o->nnetdevs && strcmp(o->type, "microvm"))
		ret = opt_nic(o, "user", err);
	if (!ret)
		ret = check_ids(o, err);
	if (!ret && !o->kernel && (o->initrd || o->append))
		ret = err_set(err, -EINVAL, "%s%s needs %s", o->qemu ? "" : "-", o->initrd ? "-initrd" : "-append",
			      o->qemu ? "-kernel" : "--kernel");
	if (!ret && !o->kernel && !o->bios)
		ret = err_set(err, -EINVAL, "nothing to boot: give a kernel with %s FILE", o->qemu ? "-kernel" : "--kernel");
	return ret;
}
