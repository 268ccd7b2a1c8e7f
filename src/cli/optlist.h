/*
 * QEMU's option text: "virtio-blk-pci,drive=d0,serial=a,,b,packed=on", or the same as a JSON object.
 *
 * A doubled comma is a comma. A first word without '=' is the value of the option's implied key; a
 * later word without '=' switches that key on ("nokey" switches "key" off). JSON objects are
 * flattened: {"file": {"driver": "x"}} is file.driver=x.
 */
#ifndef CLI_OPTLIST_H
#define CLI_OPTLIST_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct opt { char *key, *val; bool used; };
struct optlist { struct opt *o; unsigned n; };

/* `what` is the option's name for messages ("-device"). On failure the list is empty. */
int optlist_parse(struct optlist *l, const char *what, const char *text, const char *implied_key, struct err *err);
void optlist_free(struct optlist *l);
/* The last value of `key`, which counts as used; NULL when it is not there. */
const char *optlist_get(struct optlist *l, const char *key);
/* "help" or "?" was asked for. */
bool optlist_wants_help(const struct optlist *l);
/* Typed values: 0 and *v untouched when absent; errors name `what` and the key. */
int optlist_bool(struct optlist *l, const char *what, const char *key, bool *v, struct err *err);
int optlist_u64(struct optlist *l, const char *what, const char *key, uint64_t min, uint64_t max, uint64_t *v,
		struct err *err);
/* A key whose only supported values are given ("off|auto"): anything else is an error that says so. */
int optlist_only(struct optlist *l, const char *what, const char *key, const char *values, struct err *err);
/* -EINVAL naming the first key nobody asked for. */
int optlist_end(const struct optlist *l, const char *what, struct err *err);
/* The list as text again, commas doubled, without the keys in `skip` (NULL-terminated, may be NULL). Caller frees. */
char *optlist_text(const struct optlist *l, const char *implied_key, const char *const *skip);

#endif
