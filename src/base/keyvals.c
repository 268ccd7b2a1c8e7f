#include "base/keyvals.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"

static int add(struct keyvals *l, char *key, char *val)
{
	struct keyval *o = key && val ? realloc(l->o, (l->n + 1) * sizeof *o) : NULL;

	if (!o) {
		free(key);
		free(val);
		return -ENOMEM;
	}
	l->o = o;
	o[l->n++] = (struct keyval){ key, val, false };
	return 0;
}

void keyvals_free(struct keyvals *l)
{
	for (unsigned i = 0; i < l->n; i++) {
		free(l->o[i].key);
		free(l->o[i].val);
	}
	free(l->o);
	*l = (struct keyvals){ 0 };
}

/* The text up to a single comma, doubled ones made one; *s moves behind the comma, or to NULL at the end. */
static char *word(const char **s)
{
	char *out = malloc(strlen(*s) + 1), *d = out;
	const char *p = *s;

	if (!out)
		return NULL;
	for (; *p; p++) {
		if (*p == ',' && p[1] != ',')
			break;
		if (*p == ',')
			p++;
		*d++ = *p;
	}
	*d = '\0';
	*s = *p ? p + 1 : NULL;
	return out;
}

static int add_word(struct keyvals *l, const char *what, char *w, const char *implied, bool first, struct err *err)
{
	char *eq = strchr(w, '=');

	if (!*w)
		return err_set(err, -EINVAL, "%s: empty option (a comma in a value is written ',,')", what);
	if (eq == w)
		return err_set(err, -EINVAL, "%s: '%s' has no name before '='", what, w);
	if (eq)
		return add(l, strndup(w, (size_t)(eq - w)), strdup(eq + 1));
	if (first && implied)
		return add(l, strdup(implied), strdup(w));
	if (!strncmp(w, "no", 2) && w[2] && strcmp(w, "node"))
		return add(l, strdup(w + 2), strdup("off"));
	return add(l, strdup(w), strdup("on"));
}

int keyvals_add(struct keyvals *l, const char *key, const char *val)
{
	return add(l, strdup(key), strdup(val));
}

bool keyvals_sub(struct keyvals *out, struct keyvals *l, const char *prefix)
{
	size_t n = strlen(prefix);

	*out = (struct keyvals){ 0 };
	for (unsigned i = 0; i < l->n; i++) {
		if (strncmp(l->o[i].key, prefix, n))
			continue;
		l->o[i].used = true;
		keyvals_add(out, l->o[i].key + n, l->o[i].val);
	}
	return out->n;
}

static int json_flatten(struct keyvals *l, const char *prefix, json_t *v)
{
	char key[256], num[64];
	const char *k;
	json_t *m;
	size_t i;
	int ret = 0;

	switch (json_typeof(v)) {
	case JSON_OBJECT:
		json_object_foreach(v, k, m) {
			snprintf(key, sizeof key, "%s%s%s", prefix, *prefix ? "." : "", k);
			if ((ret = json_flatten(l, key, m)))
				return ret;
		}
		return 0;
	case JSON_ARRAY:
		json_array_foreach(v, i, m) {
			snprintf(key, sizeof key, "%s.%zu", prefix, i);
			if ((ret = json_flatten(l, key, m)))
				return ret;
		}
		return 0;
	case JSON_STRING:
		return add(l, strdup(prefix), strdup(json_string_value(v)));
	case JSON_INTEGER:
		snprintf(num, sizeof num, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
		return add(l, strdup(prefix), strdup(num));
	case JSON_REAL:
		snprintf(num, sizeof num, "%g", json_real_value(v));
		return add(l, strdup(prefix), strdup(num));
	case JSON_TRUE:
	case JSON_FALSE:
		return add(l, strdup(prefix), strdup(json_is_true(v) ? "on" : "off"));
	default:
		return add(l, strdup(prefix), strdup("")); /* null, which is not the same as not given: a node's "backing": null */
	}
}

static int parse_json(struct keyvals *l, const char *what, const char *text, struct err *err)
{
	json_error_t je;
	json_t *v = json_loads(text, JSON_REJECT_DUPLICATES, &je);

	if (!v)
		return err_set(err, -EINVAL, "%s: bad JSON at column %d: %s", what, je.column, je.text);
	int ret = json_flatten(l, "", v);
	json_decref(v);
	return ret ? err_set(err, ret, "%s: out of memory", what) : 0;
}

int keyvals_parse(struct keyvals *l, const char *what, const char *text, const char *implied_key, struct err *err)
{
	const char *s = text;
	bool first = true;
	int ret = 0;

	*l = (struct keyvals){ 0 };
	if (*text == '{') {
		ret = parse_json(l, what, text, err);
	} else if (!*text) {
		ret = err_set(err, -EINVAL, "%s: its argument is empty", what);
	} else {
		while (s && !ret) {
			char *w = word(&s);
			ret = w ? add_word(l, what, w, implied_key, first, err) : err_set(err, -ENOMEM, "out of memory");
			free(w);
			first = false;
		}
	}
	if (ret)
		keyvals_free(l);
	return ret;
}

const char *keyvals_get(struct keyvals *l, const char *key)
{
	const char *v = NULL;

	for (unsigned i = 0; i < l->n; i++)
		if (!strcmp(l->o[i].key, key)) {
			l->o[i].used = true;
			v = l->o[i].val;
		}
	return v;
}

bool keyvals_wants_help(const struct keyvals *l)
{
	for (unsigned i = 0; i < l->n; i++) {
		if (!strcmp(l->o[i].key, "help") || !strcmp(l->o[i].key, "?"))
			return true;
		if (i == 0 && (!strcmp(l->o[i].val, "help") || !strcmp(l->o[i].val, "?")))
			return true;
	}
	return false;
}

int keyvals_bool(struct keyvals *l, const char *what, const char *key, bool *v, struct err *err)
{
	const char *s = keyvals_get(l, key);

	if (s && parse_bool(s, v))
		return err_set(err, -EINVAL, "%s: %s=%s is neither on nor off", what, key, s);
	return 0;
}

int keyvals_u64(struct keyvals *l, const char *what, const char *key, uint64_t min, uint64_t max, uint64_t *v,
		struct err *err)
{
	const char *s = keyvals_get(l, key);
	uint64_t n;

	if (!s)
		return 0;
	if (parse_u64(s, &n) || n < min || n > max)
		return err_set(err, -EINVAL, "%s: %s=%s is not a number from %llu to %llu", what, key, s,
			       (unsigned long long)min, (unsigned long long)max);
	*v = n;
	return 0;
}

/* Is `v` one of the words in "a|b|c"? */
static bool one_of(const char *v, const char *values)
{
	size_t n = strlen(v);

	for (const char *p = values; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
		if (!strncmp(p, v, n) && (p[n] == '\0' || p[n] == '|'))
			return true;
	return false;
}

int keyvals_only(struct keyvals *l, const char *what, const char *key, const char *values, struct err *err)
{
	const char *v = keyvals_get(l, key);

	if (!v || one_of(v, values))
		return 0;
	return err_set(err, -ENOTSUP, "%s: %s=%s is not supported (supported: %s)", what, key, v, values);
}

int keyvals_end(const struct keyvals *l, const char *what, struct err *err)
{
	for (unsigned i = 0; i < l->n; i++)
		if (!l->o[i].used)
			return err_set(err, -EINVAL, "%s: unknown or unsupported key '%s'", what, l->o[i].key);
	return 0;
}

static bool skipped(const char *key, const char *const *skip)
{
	for (; skip && *skip; skip++)
		if (!strcmp(*skip, key))
			return true;
	return false;
}

char *keyvals_text(const struct keyvals *l, const char *implied_key, const char *const *skip)
{
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);
	bool first = true;

	if (!f)
		return NULL;
	for (unsigned i = 0; i < l->n; i++) {
		const struct keyval *o = &l->o[i];

		if (skipped(o->key, skip))
			continue;
		if (!first)
			fputc(',', f);
		if (!first || !implied_key || strcmp(o->key, implied_key))
			fprintf(f, "%s=", o->key);
		for (const char *p = o->val; *p; p++) {
			if (*p == ',')
				fputc(',', f);
			fputc(*p, f);
		}
		first = false;
	}
	return fclose(f) ? (free(text), NULL) : text;
}
