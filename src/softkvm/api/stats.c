/* KVM_GET_STATS_FD: the binary statistics of a VM or vCPU (api.rst 4.133): header, id, descriptors, data. */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "softkvm/api/api.h"

#define NAME_SIZE 48
#define ID_SIZE 48

struct stat_def { const char *name; uint32_t type; size_t from; };
#define CUM(n, field) { n, KVM_STATS_TYPE_CUMULATIVE, offsetof(struct softkvm_stats, field) }

static const struct stat_def vcpu_stats[] = {
	CUM("exits", exits), CUM("halt_exits", halts), CUM("irq_injections", interrupts), CUM("exceptions", exceptions),
	CUM("instructions", insns), CUM("blocks_decoded", blocks_decoded), CUM("blocks_run", blocks_run), CUM("tlb_fills", tlb_fills),
	CUM("tlb_flush", tlb_flushes), CUM("slow_loads", slow_loads), CUM("slow_stores", slow_stores),
	CUM("code_invalidations", code_invalidations), CUM("translations", translations), CUM("translated_bytes", translated_bytes),
	CUM("code_flushes", code_flushes), CUM("block_collections", block_collections), CUM("handler_calls", handler_calls), CUM("io_exits", exit_io), CUM("mmio_exits", exit_mmio),
	CUM("signal_exits", exit_signal), CUM("irq_window_exits", exit_irq_window),
};
static const struct stat_def vm_stats[] = {
	{ "vcpus", KVM_STATS_TYPE_INSTANT, 0 }, { "memory_slots", KVM_STATS_TYPE_INSTANT, 8 },
};

/* struct kvm_stats_desc with the room for the name that our header tells. */
struct stat_desc { uint32_t flags; int16_t exponent; uint16_t size; uint32_t offset, bucket_size; char name[NAME_SIZE]; };
_Static_assert(offsetof(struct stat_desc, name) == sizeof(struct kvm_stats_desc), "as the API has it");
struct stats_image {
	struct kvm_stats_header h;
	char id[ID_SIZE];
	struct stat_desc desc[ARRAY_SIZE(vcpu_stats)];
	uint64_t data[ARRAY_SIZE(vcpu_stats)];
};

static void vm_values(struct vm *vm, uint64_t *v)
{
	struct slot_table *t;

	pthread_rwlock_rdlock(&vm->slots_lock);
	t = atomic_load(&vm->slots);
	v[0] = atomic_load(&vm->ncpus);
	v[1] = t ? t->n : 0;
	pthread_rwlock_unlock(&vm->slots_lock);
}

long softkvm_read_stats(struct softkvm_file *f, void *buf, size_t len)
{
	const struct stat_def *def = f->vcpu ? vcpu_stats : vm_stats;
	unsigned n = f->vcpu ? ARRAY_SIZE(vcpu_stats) : ARRAY_SIZE(vm_stats);
	uint64_t vm_now[2] = { 0 };
	struct stats_image s = { .h = { .name_size = NAME_SIZE, .num_desc = n, .id_offset = offsetof(struct stats_image, id),
		.desc_offset = offsetof(struct stats_image, desc), .data_offset = offsetof(struct stats_image, data) } };

	if (f->kind != FILE_STATS) {
		errno = EINVAL;
		return -1;
	}
	if (f->vcpu)
		snprintf(s.id, sizeof s.id, "kvm-%d/vcpu-%u", (int)getpid(), f->vcpu->cpu.id);
	else
		snprintf(s.id, sizeof s.id, "kvm-%d", (int)getpid());
	vm_values(f->vm, vm_now);
	for (unsigned i = 0; i < n; i++) {
		const uint8_t *from = f->vcpu ? (const uint8_t *)&f->vcpu->cpu.stats : (const uint8_t *)vm_now;

		s.desc[i].flags = def[i].type | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
		s.desc[i].size = 1;
		s.desc[i].offset = i * 8;
		snprintf(s.desc[i].name, NAME_SIZE, "%s", def[i].name);
		s.data[i] = __atomic_load_n((const uint64_t *)(from + def[i].from), __ATOMIC_RELAXED);
	}
	len = MIN(len, offsetof(struct stats_image, data) + n * sizeof s.data[0]);
	memcpy(buf, &s, len);
	return (long)len;
}

long stats_open(struct vm *vm, struct vcpu *v, struct softkvm_file **created)
{
	if (!created)
		return -EFAULT;
	*created = file_new(FILE_STATS, vm, v);
	return *created ? 0 : -ENOMEM;
}
