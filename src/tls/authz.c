/* Who may connect: one name, or a list of rules (QEMU's authz objects). */
#include <errno.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tls/private.h"

struct rule { char *match; bool glob, allow; };
struct tls_authz { struct rule *r; unsigned n; bool allow; };   /* allow: when no rule matches */

enum { RULES_MAX = 10000 };

bool tls_authz_allows(const struct tls_authz *a, const char *identity)
{
	for (unsigned i = 0; i < a->n; i++) {
		const struct rule *r = &a->r[i];
		if (r->glob ? !fnmatch(r->match, identity, 0) : !strcmp(r->match, identity))
			return r->allow;
	}
	return a->allow;
}

void tls_authz_free(struct tls_authz *a)
{
	if (!a)
		return;
	for (unsigned i = 0; i < a->n; i++)
		free(a->r[i].match);
	free(a->r);
	free(a);
}

static int add_rule(struct tls_authz *a, const char *match, bool glob, bool allow)
{
	struct rule *r = realloc(a->r, (a->n + 1) * sizeof *r);
	if (r)
		a->r = r;
	char *s = r ? strdup(match) : NULL;
	if (!s)
		return -ENOMEM;
	r[a->n++] = (struct rule){ s, glob, allow };
	return 0;
}

static int policy(struct keyvals *l, const char *key, bool *allow, struct err *err)
{
	const char *v = keyvals_get(l, key);
	*allow = v && !strcmp(v, "allow");
	return !v || *allow || !strcmp(v, "deny") ? 0 : err_set(err, -EINVAL, "-object: %s=%s is neither allow nor deny", key, v);
}

/* rules.0.match=..., rules.0.policy=..., rules.0.format=exact|glob */
static int read_rules(struct tls_authz *a, struct keyvals *l, struct err *err)
{
	char key[64];
	int r = policy(l, "policy", &a->allow, err);
	for (unsigned i = 0; !r && i < RULES_MAX; i++) {
		bool allow = false;
		snprintf(key, sizeof key, "rules.%u.match", i);
		const char *match = keyvals_get(l, key), *format;
		if (!match)
			break;
		snprintf(key, sizeof key, "rules.%u.policy", i);
		r = policy(l, key, &allow, err);
		snprintf(key, sizeof key, "rules.%u.format", i);
		format = keyvals_get(l, key);
		if (!r && format && strcmp(format, "exact") && strcmp(format, "glob"))
			r = err_set(err, -EINVAL, "-object: %s=%s is neither exact nor glob", key, format);
		if (!r && add_rule(a, match, format && *format == 'g', allow))
			r = err_set(err, -ENOMEM, "out of memory");
	}
	return r;
}

static int read_list_file(struct tls_authz *a, struct keyvals *l, struct err *err)
{
	const char *file = keyvals_get(l, "filename");
	struct keyvals rules;
	keyvals_get(l, "refresh"); /* the file is read once */
	char *text = file ? tls_read_file(file, NULL) : NULL;
	if (!text)
		return file ? err_set_errno(err, -errno, "-object authz-list-file: %s", file) :
			      err_set(err, -EINVAL, "-object authz-list-file: filename= is missing");
	const char *json = text + strspn(text, " \t\r\n");
	int r = *json == '{' ? keyvals_parse(&rules, file, json, NULL, err) : err_set(err, -EINVAL, "%s: is not a JSON object", file);
	free(text);
	if (r)
		return r;
	r = read_rules(a, &rules, err);
	if (!r)
		r = keyvals_end(&rules, file, err);
	keyvals_free(&rules);
	return r;
}

int tls_authz_new(struct tls_authz **out, const char *type, struct keyvals *l, struct err *err)
{
	struct tls_authz *a = calloc(1, sizeof *a);
	int r = a ? 0 : err_set(err, -ENOMEM, "out of memory");
	if (!r && !strcmp(type, "authz-simple")) {
		const char *id = keyvals_get(l, "identity");
		r = !id ? err_set(err, -EINVAL, "-object authz-simple: identity= is missing") : add_rule(a, id, false, true);
	} else if (!r && !strcmp(type, "authz-list")) {
		r = read_rules(a, l, err);
	} else if (!r) {
		r = read_list_file(a, l, err);
	}
	if (r) {
		tls_authz_free(a);
		return r;
	}
	*out = a;
	return 0;
}
