/*
 * QEMU's option text: "virtio-blk-pci,drive=d0,serial=a,,b,packed=on", or the same as a JSON object.
 *
 * A doubled comma is a comma. A first word without '=' is the value of the option's implied key; a
 * later word without '=' switches that key on ("nokey" switches "key" off). JSON objects are
 * flattened: {"file": {"driver": "x"}} is file.driver=x; null is an empty value.
 */
#ifndef BASE_KEYVALS_H
#define BASE_KEYVALS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct keyval { char *key, *val; bool used; };
struct keyvals { struct keyval *o; unsigned n; };

/* `what` is the option's name for messages ("-device"). On failure the list is empty. */
int keyvals_parse(struct keyvals *l, const char *what, const char *text, const char *implied_key, struct err *err);
void keyvals_free(struct keyvals *l);
/* Another key and value; both are copied. 0 or -ENOMEM. */
int keyvals_add(struct keyvals *l, const char *key, const char *val);
/* Move what stands under `prefix` ("file.") to `out`, without the prefix; these count as used in `l`. Is there anything? */
bool keyvals_sub(struct keyvals *out, struct keyvals *l, const char *prefix);
/* The last value of `key`, which counts as used; NULL when it is not there. */
const char *keyvals_get(struct keyvals *l, const char *key);
/* "help" or "?" was asked for. */
bool keyvals_wants_help(const struct keyvals *l);
/* Typed values: 0 and *v untouched when absent; errors name `what` and the key. */
int keyvals_bool(struct keyvals *l, const char *what, const char *key, bool *v, struct err *err);
int keyvals_u64(struct keyvals *l, const char *what, const char *key, uint64_t min, uint64_t max, uint64_t *v,
		struct err *err);
/* A key whose only supported values are given ("off|auto"): anything else is an error that says so. */
int keyvals_only(struct keyvals *l, const char *what, const char *key, const char *values, struct err *err);
/* -EINVAL naming the first key nobody asked for. */
int keyvals_end(const struct keyvals *l, const char *what, struct err *err);
/* The list as text again, commas doubled, without the keys in `skip` (NULL-terminated, may be NULL). Caller frees. */
char *keyvals_text(const struct keyvals *l, const char *implied_key, const char *const *skip);

#endif
