/*
 * Text to numbers, sizes and switches, the way QEMU's options spell them; and "did you mean".
 *
 * All of these take the whole string or fail: 0, -EINVAL (not that kind of text), -ERANGE (too big).
 */
#ifndef BASE_PARSE_H
#define BASE_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decimal, 0x hexadecimal or 0 octal; no sign, no space. */
int parse_u64(const char *s, uint64_t *v);
/*
 * A number with an optional suffix B, K, M, G, T, P, E (powers of 1024, either case). Decimal numbers
 * may have a fraction ("1.5G"). Without a suffix the number counts `unit` bytes (1, or 1 MiB for -m).
 */
int parse_size(const char *s, uint64_t unit, uint64_t *bytes);
/* on/yes/true/y and off/no/false/n. */
int parse_bool(const char *s, bool *v);
/* What getaddrinfo() may be asked: not a number above 65535, which it would cut to 16 bits. Names of services pass. */
bool parse_port_ok(const char *s);
/* "52:54:00:12:34:56", also with '-'. */
int parse_mac(const char *s, uint8_t mac[6]);

/*
 * The entry of `names` (`n` of them, NULL entries skipped) closest to `s`, or NULL when nothing is
 * near enough to be worth proposing.
 */
const char *parse_nearest(const char *s, const char *const *names, size_t n);

#endif
