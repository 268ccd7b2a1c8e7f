#include "board/aml.h"

#include <stdlib.h>
#include <string.h>

#include "base/util.h"

void aml_bytes(struct aml *a, const void *p, size_t n)
{
	if (a->oom)
		return;
	if (a->len + n > a->cap) {
		size_t cap = MAX(a->cap * 2, a->len + n + 4096);
		uint8_t *b = realloc(a->buf, cap);

		if (!b) {
			a->oom = true;
			return;
		}
		a->buf = b;
		a->cap = cap;
	}
	memcpy(a->buf + a->len, p, n);
	a->len += n;
}

void aml_u8(struct aml *a, uint8_t v)
{
	aml_bytes(a, &v, 1);
}

static void le(struct aml *a, uint64_t v, unsigned n)
{
	for (; n--; v >>= 8)
		aml_u8(a, v);
}

/* NameString (20.2.2): segments of four, padded with '_'. */
void aml_name_path(struct aml *a, const char *p)
{
	unsigned segs = 1;

	for (; *p == '\\' || *p == '^'; p++)
		aml_u8(a, *p);
	if (!*p) {
		aml_u8(a, 0);
		return;
	}
	for (const char *q = p; *q; q++)
		segs += *q == '.';
	if (segs == 2) {
		aml_u8(a, 0x2e);
	} else if (segs > 2) {
		aml_u8(a, 0x2f);
		aml_u8(a, segs);
	}
	while (*p) {
		char seg[4] = { '_', '_', '_', '_' };
		size_t n = strcspn(p, ".");

		memcpy(seg, p, MIN(n, (size_t)4));
		aml_bytes(a, seg, 4);
		p += n + (p[n] == '.');
	}
}

void aml_int(struct aml *a, uint64_t v)
{
	unsigned n = v <= 0xff ? 1 : v <= 0xffff ? 2 : v <= 0xffffffff ? 4 : 8;

	if (v <= 1) {
		aml_u8(a, v);
		return;
	}
	aml_u8(a, n == 1 ? 0x0a : n == 2 ? 0x0b : n == 4 ? 0x0c : 0x0e);
	le(a, v, n);
}

void aml_string(struct aml *a, const char *s)
{
	aml_u8(a, 0x0d);
	aml_bytes(a, s, strlen(s) + 1);
}

/* Compressed EISA id (6.1.5): three letters of 5 bits and four hex digits, big-endian. */
void aml_eisaid(struct aml *a, const char *id)
{
	uint32_t v = (uint32_t)(id[0] - '@') << 26 | (uint32_t)(id[1] - '@') << 21 | (uint32_t)(id[2] - '@') << 16;

	v |= strtoul(id + 3, NULL, 16);
	aml_u8(a, 0x0c);
	le(a, __builtin_bswap32(v), 4);
}

static size_t open_pkg(struct aml *a)
{
	size_t mark = a->len;

	le(a, 0, 3);
	return mark;
}

/* PkgLength counts itself. */
void aml_end(struct aml *a, size_t mark)
{
	size_t n = a->len - mark;

	if (a->oom)
		return;
	a->buf[mark] = 0x80 | (n & 0xf);
	a->buf[mark + 1] = n >> 4;
	a->buf[mark + 2] = n >> 12;
}

size_t aml_scope(struct aml *a, const char *path)
{
	aml_u8(a, 0x10);
	size_t m = open_pkg(a);
	aml_name_path(a, path);
	return m;
}

size_t aml_device(struct aml *a, const char *name)
{
	aml_bytes(a, "\x5b\x82", 2);
	size_t m = open_pkg(a);
	aml_name_path(a, name);
	return m;
}

size_t aml_method(struct aml *a, const char *name, unsigned args, bool serialized)
{
	aml_u8(a, 0x14);
	size_t m = open_pkg(a);
	aml_name_path(a, name);
	aml_u8(a, args | (serialized ? 8 : 0));
	return m;
}

size_t aml_package(struct aml *a, unsigned elements)
{
	aml_u8(a, 0x12);
	size_t m = open_pkg(a);
	aml_u8(a, elements);
	return m;
}

size_t aml_if(struct aml *a)
{
	aml_u8(a, 0xa0);
	return open_pkg(a);
}

void aml_name(struct aml *a, const char *name)
{
	aml_u8(a, 0x08);
	aml_name_path(a, name);
}

void aml_name_int(struct aml *a, const char *name, uint64_t v)
{
	aml_name(a, name);
	aml_int(a, v);
}

struct aml_res aml_res_begin(struct aml *a)
{
	struct aml_res r;

	aml_u8(a, 0x11);
	r.pkg = open_pkg(a);
	aml_u8(a, 0x0b);                        /* WordConst: buffer size, patched */
	r.size_at = a->len;
	le(a, 0, 2);
	r.start = a->len;
	return r;
}

void aml_res_end(struct aml *a, struct aml_res r)
{
	aml_bytes(a, "\x79\x00", 2);            /* end tag, no checksum */
	if (!a->oom)
		st_le16(a->buf + r.size_at, a->len - r.start);
	aml_end(a, r.pkg);
}

void aml_res_io(struct aml *a, uint16_t base, uint16_t len)
{
	aml_bytes(a, "\x47\x01", 2);
	le(a, base, 2);
	le(a, base, 2);
	aml_u8(a, 1);
	aml_u8(a, len);
}

void aml_res_irq(struct aml *a, unsigned irq)
{
	aml_u8(a, 0x22);
	le(a, 1u << irq, 2);
}

void aml_res_interrupt(struct aml *a, uint32_t gsi)
{
	aml_bytes(a, "\x89\x06\x00\x09\x01", 5);
	le(a, gsi, 4);
}

void aml_res_memory(struct aml *a, uint32_t base, uint32_t len)
{
	aml_bytes(a, "\x86\x09\x00\x01", 4);
	le(a, base, 4);
	le(a, len, 4);
}

/* Address space descriptors (6.4.3.5): min and max fixed, positive decode. */
static void window(struct aml *a, uint8_t tag, uint8_t type, uint8_t flags, uint64_t first, uint64_t last, unsigned n)
{
	aml_u8(a, tag);
	le(a, 3 + 5 * n, 2);
	aml_u8(a, type);
	aml_u8(a, 0x0c);
	aml_u8(a, flags);
	le(a, 0, n);
	le(a, first, n);
	le(a, last, n);
	le(a, 0, n);
	le(a, last - first + 1, n);
}

void aml_res_bus(struct aml *a, uint16_t first, uint16_t last)
{
	window(a, 0x88, 2, 0, first, last, 2);
}

void aml_res_io_window(struct aml *a, uint16_t first, uint16_t last)
{
	window(a, 0x88, 1, 3, first, last, 2);
}

void aml_res_mem_window(struct aml *a, uint64_t first, uint64_t last, bool wide)
{
	window(a, wide ? 0x8a : 0x87, 0, 1, first, last, wide ? 8 : 4);
}
