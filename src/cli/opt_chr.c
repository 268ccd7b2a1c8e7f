/* Character back ends and the shorthands that stand for one plus a device. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "cli/options.h"

int opt_chardev(struct vm_opts *o, const char *arg, struct err *err)
{
	if (!strcmp(arg, "help") || !strcmp(arg, "?"))
		return puts("file\nnull\npipe\npty\nringbuf\nsocket\nstdio"), OPT_DONE;
	struct vm_spec *c = vmopts_add(o, chardevs);
	struct keyvals l;
	int ret = keyvals_parse(&l, "-chardev", arg, "backend", err);

	if (ret)
		return ret;
	const char *id = keyvals_get(&l, "id");
	if (!keyvals_get(&l, "backend") || !id) {
		ret = err_set(err, -EINVAL, "-chardev: %s is missing", id ? "the type" : "id=");
	} else {
		char *text = keyvals_text(&l, "backend", NULL);
		*c = (struct vm_spec){ vmopts_printf(o, "%s", id), vmopts_printf(o, "%s", text ? text : "") };
		free(text);
	}
	keyvals_free(&l);
	return ret;
}

/* The comma of a file name in option text. */
static char *escaped(struct vm_opts *o, const char *s)
{
	char *out = vmopts_printf(o, "%*s", (int)(2 * strlen(s) + 1), ""), *d = out;

	for (; *s; s++) {
		if (*s == ',')
			*d++ = ',';
		*d++ = *s;
	}
	*d = '\0';
	return out;
}

/* "tcp:HOST:PORT[,server][,nowait]" and "unix:PATH[,...]" to -chardev socket text. */
static char *socket_spec(struct vm_opts *o, const char *s)
{
	const char *rest = strchr(s, ',');
	int n = rest ? (int)(rest - s) : (int)strlen(s);
	char *addr = vmopts_printf(o, "%.*s", n, s), *port;
	char *flags = rest ? vmopts_printf(o, "%s", rest) : "";

	/* The old words: ",server" and ",nowait" */
	char *nowait = strstr(flags, ",nowait");
	if (nowait)
		flags = vmopts_printf(o, "%.*s,wait=off%s", (int)(nowait - flags), flags, nowait + 7);
	if (!strncmp(addr, "unix:", 5))
		return vmopts_printf(o, "socket,path=%s%s", addr + 5, flags);
	port = strrchr(addr + 4, ':');
	if (!port)
		return NULL;
	return vmopts_printf(o, "socket,host=%.*s,port=%s%s", (int)(port - addr - 4), addr + 4, port + 1, flags);
}

/* QEMU's shorthand for a back end to -chardev text without id; NULL: unknown. "" : nothing is there. */
static char *shorthand(struct vm_opts *o, const char *s)
{
	if (!strcmp(s, "none"))
		return "";
	if (!strcmp(s, "null") || !strcmp(s, "vc") || !strncmp(s, "vc:", 3))
		return "null";
	if (!strcmp(s, "stdio"))
		return o->qemu ? "stdio" : "stdio,mux=on,signal=off";
	if (!strcmp(s, "mon:stdio"))
		return "stdio,mux=on,signal=off";
	if (!strcmp(s, "pty"))
		return "pty";
	if (!strncmp(s, "file:", 5))
		return vmopts_printf(o, "file,path=%s", escaped(o, s + 5));
	if (!strncmp(s, "pipe:", 5))
		return vmopts_printf(o, "pipe,path=%s", escaped(o, s + 5));
	if (!strncmp(s, "tcp:", 4) || !strncmp(s, "unix:", 5))
		return socket_spec(o, s);
	if (*s == '/')
		return vmopts_printf(o, "serial,path=%s", escaped(o, s));
	return NULL;
}

/* Open a shorthand (or find "chardev:ID"); *id is NULL for none. */
static int backend(struct vm_opts *o, const char *what, const char *arg, char **id, struct err *err)
{
	*id = NULL;
	if (!strncmp(arg, "chardev:", 8)) {
		*id = vmopts_printf(o, "%s", arg + 8);
		return 0;
	}
	char *text = shorthand(o, arg);
	if (!text)
		return err_set(err, -EINVAL, "%s: '%s' is none of stdio, mon:stdio, null, none, pty, file:PATH, pipe:PATH, tcp:HOST:PORT, unix:PATH, chardev:ID", what, arg);
	if (!*text)
		return 0;
	*id = vmopts_printf(o, "#%s%u", what + strspn(what, "-"), o->auto_ids++);
	struct vm_spec *c = vmopts_add(o, chardevs);
	const char *comma = strchr(text, ',');
	*c = (struct vm_spec){ *id, comma ? vmopts_printf(o, "%.*s,id=%s%s", (int)(comma - text), text, *id, comma)
					  : vmopts_printf(o, "%s,id=%s", text, *id) };
	return 0;
}

int opt_serial(struct vm_opts *o, const char *arg, struct err *err)
{
	char *id;
	int ret = backend(o, o->qemu ? "-serial" : "--serial", arg, &id, err);

	o->serial_given = true;
	if (!ret && id)
		vmopts_device(o, "isa-serial", "chardev", id, NULL);
	return ret;
}

int opt_debugcon(struct vm_opts *o, const char *arg, struct err *err)
{
	char *id;
	int ret = backend(o, "-debugcon", arg, &id, err);

	if (!ret && id)
		vmopts_device(o, "isa-debugcon", "chardev", id, NULL);
	return ret;
}

static int only_none(const char *what, const char *arg, const char *why, struct err *err)
{
	return !strcmp(arg, "none") ? 0 : err_set(err, -ENOTSUP, "%s %s is not supported yet%s; use %s none", what, arg, why, what);
}

int opt_parallel(struct vm_opts *o, const char *arg, struct err *err)
{
	return only_none("-parallel", arg, "", err);
}

int opt_monitor(struct vm_opts *o, const char *arg, struct err *err)
{
	return only_none("-monitor", arg, ": there is no monitor", err);
}

int opt_display(struct vm_opts *o, const char *arg, struct err *err)
{
	o->display_none = true;
	return only_none("-display", arg, "", err);
}

int opt_vga(struct vm_opts *o, const char *arg, struct err *err)
{
	return only_none("-vga", arg, "", err);
}

int opt_none(struct vm_opts *o, const char *arg, struct err *err)
{
	return !strcmp(arg, "none") ? 0 : err_set(err, -ENOTSUP, "'%s': not supported yet, only none", arg);
}

int opt_nographic(struct vm_opts *o, const char *arg, struct err *err)
{
	o->nographic = true;
	return 0;
}
