#include "base/parse.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/util.h"

/* Digits at *s in base 10, 16 or 8; advances *s. */
static int scan_u64(const char **s, uint64_t *v)
{
	if (!isdigit((unsigned char)**s))
		return -EINVAL;
	char *end;
	errno = 0;
	unsigned long long n = strtoull(*s, &end, 0);
	if (errno == ERANGE)
		return -ERANGE;
	*s = end;
	*v = n;
	return 0;
}

int parse_u64(const char *s, uint64_t *v)
{
	uint64_t n;
	int r = scan_u64(&s, &n);
	if (r)
		return r;
	if (*s)
		return -EINVAL;
	*v = n;
	return 0;
}

static int suffix_shift(char c)
{
	static const char letters[] = "BKMGTPE";
	const char *p = c ? strchr(letters, toupper((unsigned char)c)) : NULL;
	return p ? (int)(p - letters) * 10 : -1;
}

/* ".25" at *s as a fraction of 2^shift, rounded down; at most 18 digits count. */
static int scan_fraction(const char **s, uint64_t *num, uint64_t *den)
{
	*num = 0;
	*den = 1;
	(*s)++;
	if (!isdigit((unsigned char)**s))
		return -EINVAL;
	for (int digits = 0; isdigit((unsigned char)**s); (*s)++, digits++) {
		if (digits < 18) {
			*num = *num * 10 + (uint64_t)(**s - '0');
			*den *= 10;
		}
	}
	return 0;
}

int parse_size(const char *s, uint64_t unit, uint64_t *bytes)
{
	bool hex = s[0] == '0' && (s[1] == 'x' || s[1] == 'X');
	uint64_t n, num = 0, den = 1;
	int r;
	if (!hex && s[0] == '0' && isdigit((unsigned char)s[1]))
		return -EINVAL; /* octal sizes are a mistake more often than a wish */
	r = scan_u64(&s, &n);
	if (!r && *s == '.' && !hex)
		r = scan_fraction(&s, &num, &den);
	if (r)
		return r;
	uint64_t mul = unit;
	if (*s) {
		int shift = suffix_shift(*s);
		if (shift < 0 || s[1])
			return -EINVAL;
		mul = 1ULL << shift;
	}
	if (num && mul == 1)
		return -EINVAL; /* half a byte */
	unsigned __int128 v = (unsigned __int128)n * mul + (unsigned __int128)num * mul / den;
	if (v > UINT64_MAX)
		return -ERANGE;
	*bytes = (uint64_t)v;
	return 0;
}

int parse_bool(const char *s, bool *v)
{
	static const char *const on[] = { "on", "yes", "true", "y" }, *const off[] = { "off", "no", "false", "n" };
	for (size_t i = 0; i < ARRAY_SIZE(on); i++) {
		if (!strcmp(s, on[i]) || !strcmp(s, off[i])) {
			*v = !strcmp(s, on[i]);
			return 0;
		}
	}
	return -EINVAL;
}

bool parse_port_ok(const char *s)
{
	return s[strspn(s, "0123456789")] || strtoul(s, NULL, 10) <= 65535;
}

int parse_mac(const char *s, uint8_t mac[6])
{
	uint8_t out[6];
	if (strlen(s) != 17)
		return -EINVAL;
	for (int i = 0; i < 6; i++, s += 3) {
		char two[3] = { s[0], s[1], 0 };
		if (!isxdigit((unsigned char)s[0]) || !isxdigit((unsigned char)s[1]))
			return -EINVAL;
		if (i < 5 && s[2] != ':' && s[2] != '-')
			return -EINVAL;
		out[i] = (uint8_t)strtoul(two, NULL, 16);
	}
	memcpy(mac, out, 6);
	return 0;
}

/* Edit distance with a small fixed buffer; names longer than that are "far". */
static unsigned distance(const char *a, const char *b)
{
	enum { N = 48 };
	size_t la = strlen(a), lb = strlen(b);
	unsigned row[N + 1];
	if (la > N || lb > N)
		return N;
	for (size_t j = 0; j <= lb; j++)
		row[j] = (unsigned)j;
	for (size_t i = 1; i <= la; i++) {
		unsigned diag = row[0];
		row[0] = (unsigned)i;
		for (size_t j = 1; j <= lb; j++) {
			unsigned up = row[j];
			unsigned subst = diag + (tolower((unsigned char)a[i - 1]) != tolower((unsigned char)b[j - 1]));
			row[j] = MIN(subst, MIN(up, row[j - 1]) + 1);
			diag = up;
		}
	}
	return row[lb];
}

const char *parse_nearest(const char *s, const char *const *names, size_t n)
{
	const char *best = NULL;
	unsigned limit = (unsigned)strlen(s) / 3 + 1, best_d = limit + 1;
	for (size_t i = 0; i < n; i++) {
		unsigned d = names[i] ? distance(s, names[i]) : best_d;
		if (d < best_d) {
			best = names[i];
			best_d = d;
		}
	}
	return best;
}
