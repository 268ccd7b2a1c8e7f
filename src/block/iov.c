/* Scatter-gather lists. */
#include <string.h>

#include "base/util.h"
#include "block/driver.h"

int iov_slice(struct iovec *out, const struct iovec *iov, int n, uint64_t skip, uint64_t len)
{
	int k = 0;
	for (int i = 0; i < n && len; i++) {
		if (skip >= iov[i].iov_len) {
			skip -= iov[i].iov_len;
			continue;
		}
		size_t part = (size_t)MIN(len, (uint64_t)iov[i].iov_len - skip);
		out[k].iov_base = (char *)iov[i].iov_base + skip;
		out[k++].iov_len = part;
		len -= part;
		skip = 0;
	}
	return k;
}

static bool is_zero(const uint8_t *p, size_t n)
{
	/* The first bytes by hand, the rest compared with itself, shifted. */
	size_t head = MIN(n, (size_t)16);
	for (size_t i = 0; i < head; i++) {
		if (p[i])
			return false;
	}
	return n <= 16 || !memcmp(p, p + 16, n - 16);
}

bool iov_is_zero(const struct iovec *iov, int n)
{
	for (int i = 0; i < n; i++) {
		if (!is_zero(iov[i].iov_base, iov[i].iov_len))
			return false;
	}
	return true;
}

void iov_zero(const struct iovec *iov, int n)
{
	for (int i = 0; i < n; i++)
		memset(iov[i].iov_base, 0, iov[i].iov_len);
}

void iov_copy(const struct iovec *iov, int n, uint8_t *buf, bool to_buf)
{
	for (int i = 0; i < n; buf += iov[i++].iov_len)
		memcpy(to_buf ? buf : iov[i].iov_base, to_buf ? iov[i].iov_base : buf, iov[i].iov_len);
}

int zero_by_writing(struct block *b, uint64_t off, uint64_t len, unsigned flags, block_write_fn *write)
{
	static uint8_t zeroes[1 << 20] __attribute__((aligned(4096))); /* never written: costs no memory */
	int r = 0;
	for (uint64_t n; !r && len; off += n, len -= n) {
		n = MIN(len, (uint64_t)sizeof zeroes);
		r = write(b, off, &(struct iovec){ zeroes, n }, 1, n, flags);
	}
	return r;
}
