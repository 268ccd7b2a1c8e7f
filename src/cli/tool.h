/* What the tools that speak QEMU's words (img, io, nbd) share: messages under the tool's name, and names of modes. */
#ifndef CLI_TOOL_H
#define CLI_TOOL_H

#include <stdarg.h>

#include "block/image.h"

/* "TOOL: message" with `after` behind it, a line on standard error, behind what standard output holds. Returns 1, the exit status. */
int tool_fail(const char *tool, const char *after, const char *fmt, va_list ap) __attribute__((format(printf, 3, 0)));
/* cache= and preallocation= by QEMU's names: false when there is no such mode. */
bool tool_cache(const char *name, enum block_cache *c);
bool tool_prealloc(const char *name, enum block_prealloc *p);
const char *tool_prealloc_name(enum block_prealloc p);

#endif
