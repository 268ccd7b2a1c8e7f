/* werror= and rerror=. */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "virtio/ioerr.h"

const char *const io_werror_names[] = { "auto", "report", "ignore", "stop", "enospc", NULL };
const char *const io_rerror_names[] = { "auto", "report", "ignore", "stop", NULL };

enum io_policy io_failed(const struct block_req *r, struct block *b, int werror, int rerror, struct machine_env *env)
{
	bool read = r->op == BLOCK_READ;
	enum io_policy p = read ? rerror : werror;

	if (p == IO_AUTO)
		p = read ? IO_REPORT : IO_ENOSPC;
	if (p == IO_ENOSPC)
		p = r->ret == -ENOSPC ? IO_STOP : IO_REPORT;
	if (p != IO_STOP)
		return p;
	log_error("%s: %s of %llu bytes at %llu: %s; the machine stops", block_name(b),
		  read ? "read" : r->op == BLOCK_FLUSH ? "flush" : "write", (unsigned long long)r->len,
		  (unsigned long long)r->off, strerror(-r->ret));
	if (env->request)
		env->request(env->opaque, MACHINE_STOP, 0);
	return p;
}
