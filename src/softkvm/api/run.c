/*
 * KVM_RUN.
 *
 * Signals. Linux looks for pending signals before it enters the guest and whenever one interrupts it,
 * returns EINTR, and the handler runs on the way out of the ioctl. To give the same, KVM_RUN blocks
 * all but the synchronous signals while guest code runs and looks with sigpending() every 10 to 20
 * microseconds; a pending one that the client's mask lets through ends the call, and the
 * handler runs when the mask is restored. Sleeps use ppoll() with the client's mask.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#include "softkvm/api/api.h"
#include "softkvm/events.h"
#include "softkvm/fault.h"
#include "softkvm/irqchip.h"
#include "softkvm/mmu.h"

#define POLL_INSNS 4096
#define POLL_TSC 40000          /* host cycles between looks that cost a system call: 10 to 20 us */
#define LOOK_TSC 100000         /* and between those of the loop, where translated code does nothing but compute: 25 to 50 us */
#define STEAL_ENTRY_NS 150000   /* steal time is brought up to date on entry, but not more often */
#define SIGBIT(s) (1ull << ((s) - 1))

/* -- signals ---------------------------------------------------------------------------------- */
static void signals_enter(struct vcpu *v)
{
	/* The C library's own signals too, which its wrapper would leave out: pthread_cancel() must not find us in here. */
	const uint64_t faults = SIGBIT(SIGSEGV) | SIGBIT(SIGBUS) | SIGBIT(SIGFPE) | SIGBIT(SIGILL);
	uint64_t all = ~(faults | SIGBIT(SIGTRAP) | SIGBIT(SIGSYS) | SIGBIT(SIGABRT)), saved;

	sigemptyset(&v->api->saved);
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &v->api->saved, sizeof all);
	memcpy(&saved, &v->api->saved, sizeof saved);
	if (saved & faults)     /* blocked, they would end the process (fault.h) */
		syscall(SYS_rt_sigprocmask, SIG_UNBLOCK, &faults, NULL, sizeof faults);
	v->api->effective = v->api->saved;
	if (v->has_sigmask) {
		sigemptyset(&v->api->effective);
		for (int s = 1; s <= 64; s++)
			if (v->sigmask >> (s - 1) & 1)
				sigaddset(&v->api->effective, s);
	}
}

/* Would the kernel have dropped it, had it not been blocked here? */
static bool ignored(int sig)
{
	struct sigaction a;

	if (sigaction(sig, NULL, &a) || a.sa_flags & SA_SIGINFO)
		return false;
	return a.sa_handler == SIG_IGN ||
	       (a.sa_handler == SIG_DFL && (sig == SIGCHLD || sig == SIGURG || sig == SIGWINCH || sig == SIGCONT));
}

/* Is there one that is delivered? Those that are ignored are taken away. */
static bool signal_pending(struct vcpu *v)
{
	const struct timespec now = { 0 };
	uint64_t pending, masked;
	sigset_t p, one;

	/* The kernel's sets have 64 bits, the first of the C library's words. */
	if (sigpending(&p))
		return false;
	memcpy(&pending, &p, sizeof pending);
	memcpy(&masked, &v->api->effective, sizeof masked);
	for (pending &= ~masked; pending; pending &= pending - 1) {
		int sig = __builtin_ctzll(pending) + 1;

		if (!ignored(sig))
			return true;
		sigemptyset(&one);
		sigaddset(&one, sig);
		sigtimedwait(&one, NULL, &now);
	}
	return false;
}

/*
 * Back to the client's mask. With KVM_SET_SIGNAL_MASK, what ended the call is blocked in the client's own
 * mask and stays pending, as on Linux, where the client takes it with sigtimedwait().
 */
static void signals_leave(struct vcpu *v)
{
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &v->api->saved, NULL, sizeof(uint64_t));
}

static bool immediate_exit(const struct cpu *c)
{
	return __atomic_load_n(&c->run->immediate_exit, __ATOMIC_RELAXED);
}

/* Host cycles until the loop should look: the timer's time, if that comes first. */
static uint64_t look_for(const struct cpu *c)
{
	uint64_t at = lapic_timer_deadline(c), now;

	if (at == UINT64_MAX)
		return LOOK_TSC;
	now = mono_ns();
	if (at <= now)
		return 0;
	return at - now > 1000000 ? LOOK_TSC : MIN((uint64_t)LOOK_TSC, (at - now) * tsc_khz_host() / 1000000);
}

bool vcpu_poll(struct cpu *c)
{
	struct vcpu *v = c->vcpu;
	struct vcpu_api *a = v->api;

	uint64_t now = __rdtsc();

	c->budget = POLL_INSNS;
	c->look_until = now + look_for(c);
	if (immediate_exit(c))
		return true;
	if (now - a->polled < POLL_TSC)
		return false;
	a->polled = now;
	if (a->steal_time & 1 && mono_ns() >= a->next_steal)
		atomic_fetch_or(&c->requests, REQ_CLOCK);
	if (!signal_pending(v))
		return false;
	c->run->exit_reason = KVM_EXIT_INTR;
	return true;
}

/* -- sleeping --------------------------------------------------------------------------------- */
/*
 * A signalfd tells of the signals that end the call; they stay pending until it returns, so that a handler may leave by
 * siglongjmp(), and the thread be cancelled, with nothing of ours held. -1: no descriptor left for it.
 */
static int sleep_signal_fd(struct vcpu *v)
{
	struct vcpu_api *a = v->api;
	uint64_t through, blocked;
	sigset_t set;

	memcpy(&blocked, &a->effective, sizeof blocked);
	through = ~(blocked | SIGBIT(SIGKILL) | SIGBIT(SIGSTOP));
	if (a->signal_fd >= 0 && a->signal_fd_set == through)
		return a->signal_fd;
	sigemptyset(&set);
	memcpy(&set, &through, sizeof through);
	int fd = signalfd(a->signal_fd, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		return -1;
	a->signal_fd = fd;
	a->signal_fd_set = through;
	return fd;
}

/* Until a request, the deadline (CLOCK_MONOTONIC ns) or a signal: then -EINTR. */
static int vcpu_sleep(struct vcpu *v, uint64_t deadline)
{
	struct cpu *c = &v->cpu;
	struct pollfd p[2] = { { .fd = v->wake_fd, .events = POLLIN }, { .fd = sleep_signal_fd(v), .events = POLLIN } };
	struct timespec t, *timeout = NULL;
	uint64_t now, drain;
	int r = 0;

	atomic_store(&v->sleeping, true);
	if (!(atomic_load(&c->requests) & REQ_WAKE) && !immediate_exit(c)) {
		if (deadline != UINT64_MAX) {
			now = mono_ns();
			now = deadline > now ? deadline - now : 0;
			t = (struct timespec){ .tv_sec = (time_t)(now / 1000000000u), .tv_nsec = (long)(now % 1000000000u) };
			timeout = &t;
		}
		r = ppoll(p, 2, timeout, p[1].fd < 0 ? &v->api->effective : NULL);
		r = r < 0 ? -errno : p[1].fd >= 0 && p[1].revents && signal_pending(v) ? -EINTR : 0;
	}
	atomic_store(&v->sleeping, false);
	/* A wake-up that comes from here on ends the next sleep early, which then takes it away. */
	while (p[0].revents && read(v->wake_fd, &drain, sizeof drain) < 0 && errno == EINTR)
		;
	return r == -EINTR ? r : 0;
}

/* -- the loop --------------------------------------------------------------------------------- */
static int interrupted(struct cpu *c)
{
	if (!immediate_exit(c))
		c->run->exit_reason = KVM_EXIT_INTR;
	return -EINTR;
}

/* MWAIT: sleep a while, then the engine looks. It ends where KVM_RUN does, so that user space finds no state of it. */
static int run_mwait(struct vcpu *v)
{
	struct cpu *c = &v->cpu;
	uint64_t deadline = mono_ns() + c->monitor.sleep;

	c->monitor.sleep = MIN(2 * c->monitor.sleep, MWAIT_SLEEP_MAX);
	if (c->lapic)
		deadline = MIN(deadline, lapic_timer_deadline(c));
	if (immediate_exit(c) || vcpu_sleep(v, deadline)) {
		c->monitor.waiting = c->halted = false;
		return interrupted(c);
	}
	if (c->lapic)
		lapic_timer_poll(c);
	return 0;
}

/* Halted: when to look at the memory again, having done what is due. */
static uint64_t rest_deadline(struct cpu *c)
{
	uint64_t now = mono_ns(), due = engine_rest_due(c, now);

	if (due > now)
		return due;
	engine_rest(c);
	return UINT64_MAX;
}

/* HLT. 0: go on; 1: kvm_run is filled in; -EINTR. */
static int run_halted(struct vcpu *v)
{
	struct cpu *c = &v->cpu;
	int r;

	if (c->monitor.waiting)
		return run_mwait(v);
	c->stats.halts++;
	if (!c->lapic) {
		c->halted = false;
		c->run->exit_reason = KVM_EXIT_HLT;
		return 1;
	}
	/* The engine looked at everything before it halted: only what is requested after that ends it. */
	do {
		if (immediate_exit(c))
			return -EINTR;
		r = vcpu_sleep(v, MIN(lapic_timer_deadline(c), rest_deadline(c)));
		if (r)
			return interrupted(c);
		atomic_fetch_and(&c->requests, ~(uint32_t)REQ_TIMER);
		lapic_timer_poll(c);
	} while (!(atomic_load(&c->requests) & (REQ_EVENT | REQ_EXIT | REQ_CLOCK)));
	return 0;
}

/* Requests that mean nothing to a vCPU before SIPI; a clock update is asked for again afterwards. */
static bool waits_for_sipi(struct cpu *c)
{
	if (!vcpu_init_sipi(c))
		return false;
	atomic_fetch_and(&c->requests, ~(uint32_t)(REQ_EVENT | REQ_CLOCK | REQ_TIMER));
	if (vcpu_init_sipi(c))
		return true;
	cpu_request(c, REQ_CLOCK);
	return false;
}

/* Before the first INIT and SIPI: Linux waits once, then lets user space look (EAGAIN). */
static int run_uninitialized(struct vcpu *v)
{
	struct cpu *c = &v->cpu;
	int r = 0;

	if (immediate_exit(c))
		return -EINTR;
	if (waits_for_sipi(c)) {
		r = vcpu_sleep(v, UINT64_MAX);
		vcpu_init_sipi(c);
	}
	return r || signal_pending(v) ? interrupted(c) : -EAGAIN;
}

/* INIT_RECEIVED while KVM_RUN is under way: wait for SIPI here. */
static int run_wait_sipi(struct vcpu *v)
{
	struct cpu *c = &v->cpu;

	while (waits_for_sipi(c)) {
		if (immediate_exit(c))
			return -EINTR;
		if (atomic_load(&c->requests) & REQ_EXIT || vcpu_sleep(v, UINT64_MAX))
			return interrupted(c);
	}
	return 0;
}

/* RUN_EXIT because memory of a slot is not mapped: EFAULT, and the instruction starts over on the next entry. */
static int client_fault(struct cpu *c)
{
	if (!c->client_fault)
		return 0;
	c->client_fault = false;
	c->run->exit_reason = KVM_EXIT_UNKNOWN;
	return -EFAULT;
}

static int run_guest(struct vcpu *v)
{
	struct cpu *c = &v->cpu;
	enum run_result res;
	int r;

	for (;;) {
		if ((r = run_wait_sipi(v)))
			return r;
		vm_enter_running(c);
		res = engine_run(c);
		vm_leave_running(c);
		switch (res) {
		case RUN_EXIT:
			return client_fault(c);
		case RUN_EINTR:
			if (c->monitor.waiting)
				c->monitor.waiting = c->halted = false;
			atomic_fetch_and(&c->requests, ~(uint32_t)REQ_EXIT);
			if (event_eoi_exit(c))          /* now: state that is saved meanwhile has no place for it */
				return 0;
			if (ring_full(v->ring)) {
				c->run->exit_reason = KVM_EXIT_DIRTY_RING_FULL;
				return 0;
			}
			return interrupted(c);
		case RUN_HALTED:
			r = run_halted(v);
			if (r)
				return r < 0 ? r : 0;
			break;
		case RUN_WAIT_SIPI:
			break;
		}
		/* Sleeps end here without a block boundary of their own. */
		if (vcpu_poll(c))
			return interrupted(c);
	}
}

/* -- around it -------------------------------------------------------------------------------- */
static int sync_in(struct vcpu *v)
{
	struct kvm_run *run = v->cpu.run;
	uint64_t valid = run->kvm_valid_regs, dirty = run->kvm_dirty_regs;
	struct kvm_sync_regs s;

	if ((valid | dirty) & ~(uint64_t)KVM_SYNC_X86_VALID_FIELDS)
		return -EINVAL;
	if (!dirty)
		return 0;
	s = *(volatile struct kvm_sync_regs *)&run->s.regs;
	if (dirty & KVM_SYNC_X86_REGS) {
		regs_set(&v->cpu, &s.regs);
		run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_REGS;
	}
	if (dirty & KVM_SYNC_X86_SREGS) {
		if (sregs_set(&v->cpu, &s.sregs))
			return -EINVAL;
		run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_SREGS;
	}
	if (dirty & KVM_SYNC_X86_EVENTS) {
		if (events_set(&v->cpu, &s.events))
			return -EINVAL;
		run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_EVENTS;
	}
	return 0;
}

static void sync_out(struct vcpu *v)
{
	struct kvm_run *run = v->cpu.run;
	uint64_t valid = run->kvm_valid_regs;

	if (valid & KVM_SYNC_X86_REGS)
		regs_get(&v->cpu, &run->s.regs.regs);
	if (valid & KVM_SYNC_X86_SREGS)
		sregs_get(&v->cpu, &run->s.regs.sregs);
	if (valid & KVM_SYNC_X86_EVENTS)
		events_get(&v->cpu, &run->s.regs.events);
}

static bool ready_for_injection(struct cpu *c)
{
	if (c->lapic && !c->vm->split_irqchip)
		return true;
	return event_can_interrupt(c) && !c->ext_pending && (!c->lapic || lapic_accepts_pic(c));
}

static void save_run(struct cpu *c)
{
	struct kvm_run *run = c->run;

	run->if_flag = (c->eflags & FL_IF) != 0;
	run->flags = c->smm ? KVM_RUN_X86_SMM : 0;
	run->cr8 = c->lapic ? lapic_get_tpr(c) : c->cr8;
	run->apic_base = c->msr.apic_base;
	run->ready_for_interrupt_injection = ready_for_injection(c);
}

/* What the last exit left half done. 1: another exit is due. */
static int complete(struct cpu *c)
{
	if (c->pio.active) {
		pio_complete(c);
		return mmio_pending(c) && mmio_commit(c);       /* INS to MMIO */
	}
	return mmio_complete(c);
}

static long run_locked(struct vcpu *v)
{
	struct cpu *c = &v->cpu;
	int r;

	if (atomic_load(&v->mp_state) == KVM_MP_STATE_UNINITIALIZED)
		return run_uninitialized(v);
	if ((r = sync_in(v)))
		return r;
	if (!c->lapic && c->run->cr8 != c->cr8 && !cr8_write(c, c->run->cr8))
		return -EINVAL;
	if (complete(c))
		return 0;
	if ((r = client_fault(c)))
		return r;
	if (immediate_exit(c))
		return -EINTR;
	if (v->has_sigmask && signal_pending(v))
		return interrupted(c);
	if (ring_full(v->ring)) {
		c->run->exit_reason = KVM_EXIT_DIRTY_RING_FULL;
		return 0;
	}
	if (v->api->steal_time & 1 && mono_ns() >= v->api->stolen_at + STEAL_ENTRY_NS)
		atomic_fetch_or(&c->requests, REQ_CLOCK);
	return run_guest(v);
}

static void count_exit(struct softkvm_stats *s, const struct kvm_run *run, long r)
{
	s->exits++;
	if (r == -EINTR || (!r && run->exit_reason == KVM_EXIT_INTR)) {
		s->exit_signal++;
		return;
	}
	if (r) {
		s->exit_error++;
		return;
	}
	switch (run->exit_reason) {
	case KVM_EXIT_IO: s->exit_io++; break;
	case KVM_EXIT_MMIO: s->exit_mmio++; break;
	case KVM_EXIT_HLT: s->exit_hlt++; break;
	case KVM_EXIT_IRQ_WINDOW_OPEN: s->exit_irq_window++; break;
	case KVM_EXIT_X86_RDMSR: case KVM_EXIT_X86_WRMSR: s->exit_msr++; break;
	case KVM_EXIT_DEBUG: s->exit_debug++; break;
	case KVM_EXIT_SHUTDOWN: case KVM_EXIT_SYSTEM_EVENT: s->exit_shutdown++; break;
	case KVM_EXIT_INTERNAL_ERROR: case KVM_EXIT_FAIL_ENTRY: s->exit_error++; break;
	default: s->exit_other++;
	}
}

long vcpu_run(struct vcpu *v)
{
	long r;

	signals_enter(v);
	if (!v->api->ran)
		fault_install();
	fault_enter(&v->cpu);
	v->api->ran = true;
	r = run_locked(v);
	fault_enter(NULL);
	save_run(&v->cpu);
	sync_out(v);
	count_exit(&v->cpu.stats, v->cpu.run, r);
	signals_leave(v);
	return r;
}

void vcpu_msr_exit(struct cpu *c, uint32_t msr, bool write, uint64_t data)
{
	struct kvm_run *run = c->run;

	run->exit_reason = write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR;
	run->msr.error = 0;
	memset(run->msr.pad, 0, sizeof run->msr.pad);
	run->msr.reason = c->vcpu->api->msr_reason;
	run->msr.index = msr;
	run->msr.data = data;
	memset(&c->pio, 0, sizeof c->pio);
	c->pio.active = true;
	c->pio.kind = write ? PIO_WRMSR : PIO_RDMSR;
	c->pio.lin_rip = cpu_cur_rip(c) + (c->flat ? 0 : c->seg[SEG_CS].base);
	c->pio.next_rip = cpu_next_rip(c);
	cpu_unwind(c, UNWIND_EXIT);
}

uint32_t vcpu_msr_reason(const struct cpu *c)
{
	return c->vcpu->api->msr_reason;
}
