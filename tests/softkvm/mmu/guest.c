#include "guest.h"

struct mmu_guest t;

static const struct cpu_features feat = { .phys_bits = 40, .f80000001_edx = BIT(26) };

void set_slot(uint32_t id, uint64_t gpa, uint64_t size, uint8_t *host, uint32_t flags, int want)
{
	struct kvm_userspace_memory_region r = { id, flags, gpa, size, (uintptr_t)host };
	assert_int_equal(phys_set_region(&t.vm, &r), want);
}

int setup(void **state)
{
	memset(&t, 0, sizeof t);
	pthread_mutex_init(&t.vm.lock, NULL);
	t.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	t.cpu.vm = &t.vm;
	t.cpu.run = &t.run;
	t.cpu.feat = &feat;
	atomic_store(&t.vm.cpus[0], &t.cpu);
	atomic_store(&t.vm.ncpus, 1);
	set_slot(0, 0, RAM_SIZE, t.ram, 0, 0);
	assert_int_equal(mmu_cpu_init(&t.cpu), 0);
	t.cpu.efer = EFER_LMA | EFER_LME | EFER_NXE;
	t.cpu.cr0 = CR0_PE | CR0_PG | CR0_WP;
	t.cpu.cr4 = CR4_PAE;
	t.cpu.cr3 = PT_BASE;
	t.cpu.code_bits = 64;
	mmu_select(&t.cpu);
	return 0;
}

int teardown(void **state)
{
	mmu_cpu_free(&t.cpu);
	phys_free(&t.vm);
	munmap(t.ram, RAM_SIZE);
	return 0;
}

uint64_t *entry(int level)
{
	uint64_t page = PT_BASE + (uint64_t)(3 - level) * 4096;
	return (uint64_t *)(t.ram + page) + ((LIN >> (12 + 9 * level)) & 511);
}

void map(uint64_t upper, uint64_t leaf)
{
	for (int l = 3; l > 0; l--)
		*entry(l) = (PT_BASE + (uint64_t)(4 - l) * 4096) | upper;
	*entry(0) = DATA | leaf;
}

bool try_access(enum access acc, uint64_t lin, void *buf, unsigned len)
{
	t.raised = false;
	t.unwind = UNWIND_NONE;
	if (setjmp(t.cpu.unwind))
		return false;
	if (acc == ACC_EXEC) {
		struct code_page p;
		mmu_fetch(&t.cpu, lin, &p);
	} else if (acc == ACC_WRITE) {
		mem_write(&t.cpu, lin, buf, len);
	} else {
		mem_read(&t.cpu, lin, buf, len);
	}
	return true;
}

/* -- what the rest of the engine does, recorded ------------------------------------------------ */

void cpu_unwind(struct cpu *c, enum unwind why) { t.unwind = why; longjmp(c->unwind, 1); }
void cpu_raise_err(struct cpu *c, unsigned vector, uint32_t error)
{
	t.raised = true;
	t.vector = vector;
	t.error = error;
	cpu_unwind(c, UNWIND_EVENT);
}
void cpu_raise(struct cpu *c, unsigned vector) { cpu_raise_err(c, vector, 0); }
void cpu_raise_pf(struct cpu *c, uint64_t addr, uint32_t error) { t.addr = addr; cpu_raise_err(c, EXC_PF, error); }
void cpu_emulation_failed(struct cpu *c) { cpu_unwind(c, UNWIND_EXIT); }
void cpu_leave_after(struct cpu *c) { t.left++; }
void vm_pause_all(struct vm *vm, struct cpu *self) { }
void vm_resume_all(struct vm *vm, struct cpu *self) { }
void vm_request_all(struct vm *vm, uint32_t req, struct cpu *except) { }
void cpu_request(struct cpu *c, uint32_t req) { }
bool bus_mmio(struct cpu *c, uint64_t gpa, unsigned len, bool write, void *data) { return false; }
