/*
 * The dirty ring (KVM_CAP_DIRTY_LOG_RING): pages written go into a ring per vCPU that the client maps, reads and gives back
 * with KVM_RESET_DIRTY_RINGS.
 *
 * A slot's bitmap says which pages are in some ring and were not given back, so a page is entered once. What cannot be entered
 * because a ring is full to the last (one instruction may write many pages) waits in a list of ours; a vCPU whose ring is
 * nearly full leaves with KVM_EXIT_DIRTY_RING_FULL before that and does not come in again. The client may write anything into a ring: what
 * is read back is checked.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "softkvm/cpu.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/vcpu.h"

#define MAX_ENTRIES 65536u
#define RESERVED 64u            /* entries that are left when a vCPU has to leave */

struct page_ref { uint32_t slot; uint64_t page; };

struct dirty_ring {
	struct kvm_dirty_gfn *gfn;      /* shared with the client */
	uint32_t next, reset;           /* count up; under the VM's ring_lock */
	_Atomic bool full;
	struct page_ref *late;          /* waiting for room */
	size_t nlate, late_size;
};

int ring_cap_bytes(void)
{
	return (int)(MAX_ENTRIES * sizeof(struct kvm_dirty_gfn));
}

int ring_enable(struct vm *vm, uint64_t bytes)
{
	if (!bytes || bytes & (bytes - 1) || bytes < 4096 || bytes < RESERVED * sizeof(struct kvm_dirty_gfn))
		return -EINVAL;
	if (bytes > (uint64_t)ring_cap_bytes())
		return -E2BIG;
	if (vm->ring_entries || atomic_load(&vm->ncpus))
		return -EINVAL;
	vm->ring_entries = (uint32_t)(bytes / sizeof(struct kvm_dirty_gfn));
	return 0;
}

int ring_new(struct vm *vm, struct dirty_ring **out)
{
	struct dirty_ring *r;

	*out = NULL;
	if (!vm->ring_entries)
		return 0;
	r = calloc(1, sizeof *r);
	if (!r)
		return -ENOMEM;
	r->gfn = mmap(NULL, ring_bytes(vm), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (r->gfn == MAP_FAILED) {
		free(r);
		return -ENOMEM;
	}
	*out = r;
	return 0;
}

void ring_free(struct vm *vm, struct dirty_ring *r)
{
	if (!r)
		return;
	munmap(r->gfn, ring_bytes(vm));
	free(r->late);
	free(r);
}

size_t ring_bytes(const struct vm *vm)
{
	return vm->ring_entries * sizeof(struct kvm_dirty_gfn);
}

void *ring_memory(const struct dirty_ring *r)
{
	return r->gfn;
}

bool ring_full(const struct dirty_ring *r)
{
	return r && atomic_load(&r->full);
}

/* -- entering -------------------------------------------------------------------------------------- */
static void late_add(struct dirty_ring *r, struct page_ref p)
{
	if (r->nlate == r->late_size) {
		size_t n = r->late_size ? 2 * r->late_size : 256;
		struct page_ref *l = realloc(r->late, n * sizeof *l);

		if (!l)
			return;         /* the client misses a page that this host has no memory to note */
		r->late = l;
		r->late_size = n;
	}
	r->late[r->nlate++] = p;
}

static bool enter(struct vm *vm, struct dirty_ring *r, struct page_ref p)
{
	struct kvm_dirty_gfn *g = &r->gfn[r->next & (vm->ring_entries - 1)];

	if (r->next - r->reset == vm->ring_entries)
		return false;
	g->slot = p.slot;
	g->offset = p.page;
	__atomic_store_n(&g->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
	r->next++;
	return true;
}

static void look_if_full(struct vm *vm, struct dirty_ring *r)
{
	atomic_store(&r->full, r->next - r->reset >= vm->ring_entries - RESERVED);
}

void ring_push(struct vm *vm, struct cpu *c, const struct slot *s, uint64_t page)
{
	struct page_ref p = { s->id | (uint32_t)s->as_id << 16, page };
	bool own = c;
	struct dirty_ring *r;

	/* What no vCPU wrote (a clock page, an MSR set from outside) goes to the first one's. */
	if (!c)
		c = atomic_load(&vm->cpus[0]);
	r = c ? c->vcpu->ring : NULL;
	if (!r)
		return;
	pthread_mutex_lock(&vm->ring_lock);
	if (r->nlate || !enter(vm, r, p))
		late_add(r, p);
	look_if_full(vm, r);
	pthread_mutex_unlock(&vm->ring_lock);
	if (!atomic_load(&r->full))
		return;
	cpu_request(c, REQ_EXIT);
	if (own)
		c->budget = 0;          /* now, not in thousands of instructions */
}

/* -- giving back ------------------------------------------------------------------------------------- */
static void clean(struct vm *vm, uint32_t id, uint64_t page)
{
	struct slot *s = phys_slot_by_id(vm, id);

	if (s && s->dirty && page < s->size >> 12)
		atomic_fetch_and(&s->dirty[page / 64], ~(1ull << (page & 63)));
}

static long ring_reset(struct vm *vm, struct dirty_ring *r)
{
	size_t done = 0;
	long n = 0;

	while (r->reset != r->next) {
		struct kvm_dirty_gfn *g = &r->gfn[r->reset & (vm->ring_entries - 1)];

		if (!(__atomic_load_n(&g->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET))
			break;
		clean(vm, __atomic_load_n(&g->slot, __ATOMIC_RELAXED), __atomic_load_n(&g->offset, __ATOMIC_RELAXED));
		__atomic_store_n(&g->flags, 0, __ATOMIC_RELEASE);
		r->reset++;
		n++;
	}
	while (done < r->nlate && enter(vm, r, r->late[done]))
		done++;
	r->nlate -= done;
	if (done)
		memmove(r->late, r->late + done, r->nlate * sizeof *r->late);
	look_if_full(vm, r);
	return n;
}

long ring_reset_all(struct vm *vm)
{
	long n = 0;

	if (!vm->ring_entries)
		return -EINVAL;
	pthread_mutex_lock(&vm->lock);
	vm_pause_all(vm, NULL);
	pthread_mutex_lock(&vm->ring_lock);
	for (unsigned i = 0; i < atomic_load(&vm->ncpus); i++) {
		struct cpu *c = atomic_load(&vm->cpus[i]);

		if (c && c->vcpu->ring)
			n += ring_reset(vm, c->vcpu->ring);
	}
	pthread_mutex_unlock(&vm->ring_lock);
	/* A page that is written again has to be seen again. */
	if (n)
		vm_request_all(vm, REQ_TLB, NULL);
	vm_resume_all(vm, NULL);
	pthread_mutex_unlock(&vm->lock);
	return n;
}
