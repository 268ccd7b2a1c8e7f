#include "base/optlist.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"

/* Cut one item off *s in place, turning ",," into ','. */
static char *next_item(char **s)
{
	char *start = *s, *w = start, *r = start;
	while (*r) {
		if (*r == ',' && r[1] == ',')
			r++;
		else if (*r == ',')
			break;
		*w++ = *r++;
	}
	*s = *r ? r + 1 : NULL;
	*w = 0;
	return start;
}

int optlist_parse(struct optlist *l, const char *text, const char *first_key, const char *what, struct err *err)
{
	size_t max = 1;
	*l = (struct optlist){ .what = what };
	for (const char *p = text; *p; p++)
		max += *p == ',';
	l->text = strdup(text);
	l->o = calloc(max, sizeof *l->o);
	if (!l->text || !l->o) {
		optlist_free(l);
		return err_set(err, -ENOMEM, "%s: out of memory", what);
	}
	bool first = true;
	for (char *s = *text ? l->text : NULL; s; first = false) {
		struct opt *o = &l->o[l->n];
		char *item = next_item(&s), *eq = strchr(item, '=');
		if (!*item)
			continue;
		if (eq) {
			*eq = 0;
			o->key = item;
			o->value = eq + 1;
		} else if (first && first_key) {
			o->key = first_key;
			o->value = item;
		} else {
			o->key = item;
			o->value = "on";
			o->bare = true;
		}
		l->n++;
	}
	return 0;
}

void optlist_free(struct optlist *l)
{
	free(l->o);
	free(l->text);
	*l = (struct optlist){ 0 };
}

const char *optlist_next(struct optlist *l, const char *key, size_t *pos)
{
	while (*pos < l->n) {
		struct opt *o = &l->o[(*pos)++];
		if (!strcmp(o->key, key)) {
			o->used = true;
			return o->value;
		}
	}
	return NULL;
}

const char *optlist_get(struct optlist *l, const char *key)
{
	const char *last = NULL, *v;
	for (size_t pos = 0; (v = optlist_next(l, key, &pos));)
		last = v;
	return last;
}

int optlist_bool(struct optlist *l, const char *key, bool *v, struct err *err)
{
	const char *s = optlist_get(l, key);
	if (s && parse_bool(s, v))
		return err_set(err, -EINVAL, "%s: %s='%s' is not valid; valid: on, off", l->what, key, s);
	return 0;
}

int optlist_u64(struct optlist *l, const char *key, uint64_t max, uint64_t *v, struct err *err)
{
	const char *s = optlist_get(l, key);
	uint64_t n;
	if (!s)
		return 0;
	if (parse_u64(s, &n) || n > max)
		return err_set(err, -EINVAL, "%s: %s='%s' is not valid; valid: a number up to %llu", l->what, key, s,
			       (unsigned long long)max);
	*v = n;
	return 0;
}

int optlist_unused(struct optlist *l, const char *const *known, struct err *err)
{
	size_t n = 0;
	while (known && known[n])
		n++;
	for (size_t i = 0; i < l->n; i++) {
		if (l->o[i].used)
			continue;
		const char *near = known ? parse_nearest(l->o[i].key, known, n) : NULL;
		return near ? err_set(err, -EINVAL, "%s: unknown option '%s'; did you mean '%s'?", l->what, l->o[i].key, near) :
			      err_set(err, -EINVAL, "%s: unknown option '%s'", l->what, l->o[i].key);
	}
	return 0;
}
