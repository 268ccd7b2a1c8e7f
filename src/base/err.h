/*
 * Errors: a negative errno for the code that reacts, a sentence for the person who reads.
 *
 * Every function that can fail for a reason a user may cause returns 0 or -errno and takes a
 * `struct err *` that may be NULL. Nothing below `cli` prints or exits.
 */
#ifndef BASE_ERR_H
#define BASE_ERR_H

#include <stdarg.h>

struct err {
	int code;       /* negative errno, 0 when no error was set */
	char msg[512];  /* one line without a newline; names the option or file and the remedy */
};

/* Record `code` (negative errno) and a message; returns `code`. A second call keeps the first message. */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* As err_set, with ": strerror(-code)" appended. */
int err_set_errno(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Put "prefix: " before the message already in `e`; returns e->code (or -EIO when `e` is NULL). */
int err_prefix(struct err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Forget what was recorded. */
void err_clear(struct err *e);

#endif
