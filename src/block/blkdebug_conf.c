/* blkdebug's rules: from options, and from a configuration file in QEMU's format ([group] and key = "value" lines). */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/blkdebug.h"

enum { RULES_MAX = 4096 };

static const char *const event_names[EVENT_COUNT] = {
#define NAME(id, name) [EVENT_##id] = name,
	BLOCK_EVENTS(NAME)
#undef NAME
};
static const char *const io_names[BLKDEBUG_IO_COUNT] = { "read", "write", "write-zeroes", "discard", "flush", "block-status" };

int blkdebug_event_of(const char *name)
{
	for (int i = 0; i < EVENT_COUNT; i++)
		if (!strcmp(event_names[i], name))
			return i;
	return -1;
}

int blkdebug_add_rule(struct blkdebug *d, const struct blkdebug_rule *rule)
{
	struct blkdebug_rule *r = d->nrules < RULES_MAX ? malloc(sizeof *r) : NULL;
	if (!r)
		return d->nrules < RULES_MAX ? -ENOMEM : -E2BIG;
	*r = *rule;
	r->next = d->rules;
	d->rules = r;
	d->nrules++;
	return 0;
}

/* --- one rule --- */

static int inject_keys(struct blkdebug_rule *r, struct keyvals *l, const char *what, struct err *err)
{
	uint64_t error = EIO, sector = UINT64_MAX;
	const char *io = keyvals_get(l, "iotype"), *text = keyvals_get(l, "sector");
	bool immediately;
	int ret = keyvals_u64(l, what, "errno", 0, 4095, &error, err);
	r->io = 1u << BLKDEBUG_BLOCK_STATUS;
	r->io -= 1; /* unless asked for, everything but questions */
	if (io) {
		r->io = 0;
		for (unsigned i = 0; i < BLKDEBUG_IO_COUNT; i++)
			r->io |= strcmp(io, io_names[i]) ? 0 : 1u << i;
		if (!r->io)
			return err_set(err, -EINVAL, "%s: invalid iotype value: %s", what, io);
	}
	if (!ret && text && strcmp(text, "-1"))
		ret = keyvals_u64(l, what, "sector", 0, INT64_MAX / 512, &sector, err);
	r->offset = sector == UINT64_MAX ? -1 : (int64_t)(sector * 512);
	r->error = (int)error;
	if (!ret)
		ret = keyvals_bool(l, what, "once", &r->once, err);
	if (!ret) /* whether the caller's thread or another one hears of it makes no difference here */
		ret = keyvals_bool(l, what, "immediately", &immediately, err);
	return ret;
}

static int add_rule(struct blkdebug *d, bool inject, struct keyvals *l, const char *what, struct err *err)
{
	struct blkdebug_rule r = { .action = inject ? BLKDEBUG_INJECT : BLKDEBUG_SET_STATE };
	const char *name = keyvals_get(l, "event");
	uint64_t state = 0, next = 0;
	if (!name)
		return err_set(err, -EINVAL, "%s: Missing event name for rule", what);
	int event = blkdebug_event_of(name);
	if (event < 0)
		return err_set(err, -EINVAL, "%s: invalid event: %s", what, name);
	r.event = (enum block_event)event;
	int ret = keyvals_u64(l, what, "state", 0, INT_MAX, &state, err);
	if (!ret && inject)
		ret = inject_keys(&r, l, what, err);
	else if (!ret)
		ret = keyvals_u64(l, what, "new_state", 0, INT_MAX, &next, err);
	r.state = (unsigned)state;
	r.new_state = (unsigned)next;
	if (!ret)
		ret = keyvals_end(l, what, err);
	if (ret)
		return ret;
	ret = blkdebug_add_rule(d, &r);
	return ret ? err_set_errno(err, ret, "%s", what) : 0;
}

/* NAME.0.event=..., NAME.1.event=..., or one as NAME.event=... */
static int option_rules(struct blkdebug *d, struct keyvals *l, const char *name, bool inject, struct err *err)
{
	int r = 0;
	for (unsigned i = 0; !r && i < RULES_MAX; i++) {
		struct keyvals sub = { 0 };
		char prefix[48];
		snprintf(prefix, sizeof prefix, "%s.%u.", name, i);
		bool there = keyvals_sub(&sub, l, prefix);
		if (!there && !i) {
			snprintf(prefix, sizeof prefix, "%s.", name);
			there = keyvals_sub(&sub, l, prefix);
		}
		if (!there)
			break;
		prefix[strlen(prefix) - 1] = 0;
		r = add_rule(d, inject, &sub, prefix, err);
		keyvals_free(&sub);
	}
	return r;
}

/* --- the file --- */

struct reader { struct blkdebug *d; const char *file; unsigned line; bool in_group, inject; struct keyvals rule; };

static int end_group(struct reader *p, struct err *err)
{
	int r = p->in_group ? add_rule(p->d, p->inject, &p->rule, p->file, err) : 0;
	keyvals_free(&p->rule);
	p->in_group = false;
	return r;
}

static int begin_group(struct reader *p, const char *name, struct err *err)
{
	int r = end_group(p, err);
	p->inject = !strcmp(name, "inject-error");
	p->in_group = !r;
	return r || p->inject || !strcmp(name, "set-state") ? r : err_set(err, -EINVAL, "%s:%u: There is no option group '%s'", p->file, p->line, name);
}

static int parse_line(struct reader *p, const char *line, struct err *err)
{
	char key[64], value[1024] = "";
	if (*line == '\n' || *line == '#' || !*line)
		return 0;
	if (*line == '[') {
		if (sscanf(line, "[%63s \"%1023[^\"]\"]", key, value) == 2 || sscanf(line, "[%63[^]]]", key) == 1)
			return begin_group(p, key, err);
	} else if (sscanf(line, " %63s = \"%1023[^\"]\"", key, value) == 2 || sscanf(line, " %63s = \"\"", key) == 1) {
		if (!p->in_group)
			return err_set(err, -EINVAL, "%s:%u: no group defined", p->file, p->line);
		return keyvals_add(&p->rule, key, value) ? err_set(err, -ENOMEM, "out of memory") : 0;
	}
	return err_set(err, -EINVAL, "%s:%u: parse error", p->file, p->line);
}

static int file_rules(struct blkdebug *d, const char *file, struct err *err)
{
	struct reader p = { .d = d, .file = file };
	char line[2048];
	FILE *f = fopen(file, "re");
	int r = f ? 0 : err_set_errno(err, -errno, "Could not read blkdebug config file %s", file);
	while (!r && fgets(line, sizeof line, f)) {
		p.line++;
		r = parse_line(&p, line, err);
	}
	if (!r && ferror(f))
		r = err_set_errno(err, -EIO, "Could not read blkdebug config file %s", file);
	if (!r)
		r = end_group(&p, err);
	keyvals_free(&p.rule);
	if (f)
		fclose(f);
	return r;
}

/* --- limits --- */

static int limit(struct keyvals *l, const char *key, uint64_t align, bool power, uint64_t *v, struct err *err)
{
	const char *s = keyvals_get(l, key);
	if (!s)
		return 0;
	if (parse_size(s, 1, v))
		return err_set(err, -EINVAL, "blkdebug: %s=%s is not a size", key, s);
	if (*v && (*v >= INT_MAX || (power ? (*v & (*v - 1)) != 0 : *v % align != 0)))
		return err_set(err, -EINVAL, "Cannot meet constraints with %s %llu", key, (unsigned long long)*v);
	return 0;
}

static int limits(struct blkdebug *d, struct keyvals *l, unsigned file_align, struct err *err)
{
	int r = limit(l, "align", 1, true, &d->align, err);
	uint64_t align = MAX(d->align, (uint64_t)file_align);
	if (!r)
		r = limit(l, "max-transfer", align, false, &d->max_transfer, err);
	if (!r)
		r = limit(l, "opt-write-zero", align, false, &d->opt_write_zero, err);
	if (!r)
		r = limit(l, "max-write-zero", MAX(align, d->opt_write_zero), false, &d->max_write_zero, err);
	if (!r)
		r = limit(l, "opt-discard", align, false, &d->opt_discard, err);
	return r ? r : limit(l, "max-discard", MAX(align, d->opt_discard), false, &d->max_discard, err);
}

int blkdebug_config(struct blkdebug *d, struct keyvals *l, unsigned file_align, struct err *err)
{
	const char *file = keyvals_get(l, "config");
	int r = file && *file ? file_rules(d, file, err) : 0;
	if (!r)
		r = option_rules(d, l, "inject-error", true, err);
	if (!r)
		r = option_rules(d, l, "set-state", false, err);
	return r ? r : limits(d, l, file_align, err);
}
