/*
 * QEMU's "key=value,key=value" text as a list. A doubled comma is a comma in a value; a word without
 * '=' is "on" ("nowait", "nofoo": "foo=off" is the caller's affair), the first one may stand for
 * `first_key`. Keys may repeat. Every key a consumer asks for is marked, so that what nobody asked for
 * can be named as an error.
 */
#ifndef BASE_OPTLIST_H
#define BASE_OPTLIST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct opt { const char *key, *value; bool used, bare; };
struct optlist { struct opt *o; size_t n; char *text; const char *what; };

/* `what` names the option in messages ("-netdev user"); not copied. */
int optlist_parse(struct optlist *l, const char *text, const char *first_key, const char *what, struct err *err);
void optlist_free(struct optlist *l);
/* Last value of `key`, or NULL. */
const char *optlist_get(struct optlist *l, const char *key);
/* Values of a repeated key in order: start with *pos = 0; NULL at the end. */
const char *optlist_next(struct optlist *l, const char *key, size_t *pos);
/* `v` keeps its value when the key is not there. */
int optlist_bool(struct optlist *l, const char *key, bool *v, struct err *err);
int optlist_u64(struct optlist *l, const char *key, uint64_t max, uint64_t *v, struct err *err);
/* -EINVAL names the first key nobody asked for; `known` (NULL-terminated, may be NULL) gives the hint. */
int optlist_unused(struct optlist *l, const char *const *known, struct err *err);

#endif
