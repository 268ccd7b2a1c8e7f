/* In place of softkvm in a build that has none. */
#include <errno.h>

#include "kvm/provider.h"

static int none_open(struct kvm_file *f, struct err *err)
{
	return err_set(err, -ENODEV, "this build has no softkvm: use -accel kvm");
}

const struct kvm_provider kvm_provider_soft = { .name = "soft", .open = none_open };
