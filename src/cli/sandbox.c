/* See sandbox.h. libseccomp makes the filters; a vCPU's is exported once and installed on each thread with one call. */
#include "cli/sandbox.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <seccomp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/util.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED false
#endif

struct sandbox {
	struct sock_fprog vcpu;
};

#define S(name) SCMP_SYS(name)

/* No machine ever needs these. */
static const int never[] = {
	S(kexec_load), S(kexec_file_load), S(init_module), S(finit_module), S(delete_module), S(mount), S(umount2), S(pivot_root), S(chroot),
	S(move_mount), S(open_tree), S(fsopen), S(fsconfig), S(fsmount), S(fspick), S(mount_setattr), S(swapon), S(swapoff), S(reboot),
	S(settimeofday), S(clock_settime), S(clock_adjtime), S(adjtimex), S(sethostname), S(setdomainname), S(acct), S(quotactl), S(syslog),
	S(vhangup), S(iopl), S(ioperm), S(bpf), S(perf_event_open), S(add_key), S(request_key), S(keyctl), S(ptrace),
	S(process_vm_readv), S(process_vm_writev), S(process_madvise), S(kcmp), S(pidfd_getfd), S(unshare), S(setns), S(fanotify_init),
	S(name_to_handle_at), S(open_by_handle_at), S(personality), S(migrate_pages), S(move_pages),
};

static const int obsolete[] = {
	S(uselib), S(ustat), S(sysfs), S(_sysctl), S(modify_ldt), S(create_module), S(get_kernel_syms), S(query_module), S(nfsservctl),
	S(getpmsg), S(putpmsg), S(afs_syscall), S(tuxcall), S(security), S(epoll_ctl_old), S(epoll_wait_old), S(vserver), S(lookup_dcookie),
	S(remap_file_pages),
};

static const int elevate[] = { S(setuid), S(setgid), S(setreuid), S(setregid), S(setresuid), S(setresgid), S(setgroups), S(setfsuid),
	S(setfsgid), S(capset) };

static const int resources[] = { S(setpriority), S(sched_setparam), S(sched_setscheduler), S(sched_setattr), S(sched_setaffinity),
	S(setrlimit), S(ioprio_set), S(set_mempolicy), S(mbind) };

static const int spawn[] = { S(execve), S(execveat), S(fork), S(vfork) };

/*
 * What a vCPU thread does: run (ioctl on KVM), move data of devices whose back end answers at once, wake other threads, manage
 * memory, start threads (the PIT's, the irqfds'), log. Descriptors come from elsewhere.
 */
static const int vcpu[] = {
	S(read), S(write), S(readv), S(writev), S(pread64), S(pwrite64), S(preadv), S(pwritev), S(preadv2), S(pwritev2), S(close), S(lseek),
	S(fstat), S(newfstatat), S(statx), S(fstatfs), S(fsync), S(fdatasync), S(sync_file_range), S(fallocate), S(ftruncate), S(copy_file_range),
	S(fcntl), S(fadvise64), S(dup), S(io_uring_enter), S(splice),
	S(poll), S(ppoll), S(epoll_ctl), S(epoll_wait), S(epoll_pwait), S(epoll_pwait2), S(select), S(pselect6), S(eventfd2), S(signalfd4),
	S(timerfd_create), S(timerfd_settime), S(timerfd_gettime), S(memfd_create),
	S(sendto), S(sendmsg), S(sendmmsg), S(recvfrom), S(recvmsg), S(recvmmsg), S(shutdown), S(getsockopt), S(getsockname), S(getpeername),
	S(futex), S(futex_waitv), S(sched_yield), S(sched_getaffinity), S(getcpu), S(nanosleep), S(clock_nanosleep), S(clock_gettime),
	S(clock_getres), S(gettimeofday), S(time), S(getrusage), S(times), S(getrandom), S(membarrier), S(rseq), S(set_robust_list),
	S(set_tid_address), S(prctl), S(arch_prctl), S(sigaltstack), S(rt_sigaction), S(rt_sigprocmask), S(rt_sigreturn), S(rt_sigpending),
	S(rt_sigtimedwait), S(rt_sigsuspend), S(restart_syscall), S(exit), S(exit_group), S(getpid), S(gettid), S(uname), S(sysinfo),
	S(brk), S(munmap), S(madvise), S(mremap), S(msync), S(mlock), S(mincore), S(pkey_alloc), S(pkey_free), S(sched_getscheduler),
	S(sched_getparam), S(getuid), S(geteuid), S(getgid), S(getegid), S(getppid),
};

/* Only an attacker calls these on a vCPU thread. */
static const int fatal[] = { S(execve), S(execveat), S(fork), S(vfork), S(ptrace), S(process_vm_readv), S(process_vm_writev), S(mount),
	S(init_module), S(finit_module), S(bpf), S(unshare), S(setns), S(setuid), S(setresuid), S(kexec_load) };

static int add(scmp_filter_ctx f, uint32_t action, const int *calls, size_t n)
{
	int r = 0;

	/* libseccomp has numbers for calls that this kernel does not: negative ones, which it refuses to deny */
	for (size_t i = 0; i < n && !r; i++)
		if (calls[i] >= 0)
			r = seccomp_rule_add_array(f, action, calls[i], 0, NULL);
	return r;
}

#define ADD(f, action, list) add(f, action, list, ARRAY_SIZE(list))

static int rule(scmp_filter_ctx f, uint32_t action, int call, unsigned n, struct scmp_arg_cmp a, struct scmp_arg_cmp b)
{
	struct scmp_arg_cmp args[] = { a, b };

	return seccomp_rule_add_array(f, action, call, n, args);
}

#define MASKED(arg, mask, value) SCMP_CMP64(arg, SCMP_CMP_MASKED_EQ, mask, value)
#define NONE SCMP_CMP64(0, SCMP_CMP_GE, 0)

/* Memory that is writable and executable at once is never made. */
static int deny_wx(scmp_filter_ctx f, uint32_t action)
{
	const uint64_t wx = PROT_WRITE | PROT_EXEC;
	int r = rule(f, action, S(mmap), 1, MASKED(2, wx, wx), NONE);

	if (!r)
		r = rule(f, action, S(mprotect), 1, MASKED(2, wx, wx), NONE);
	return r ? r : rule(f, action, S(pkey_mprotect), 1, MASKED(2, wx, wx), NONE);
}

static scmp_filter_ctx filter_new(uint32_t otherwise)
{
	scmp_filter_ctx f = seccomp_init(otherwise);

	if (!f)
		return NULL;
	seccomp_attr_set(f, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);    /* 32-bit calls, x32 */
	seccomp_attr_set(f, SCMP_FLTATR_CTL_SSB, 1);            /* no slower memory for being filtered */
	seccomp_attr_set(f, SCMP_FLTATR_CTL_OPTIMIZE, 2);       /* a binary tree */
	return f;
}

/* A new process: clone() without CLONE_THREAD; clone3() hides its flags in memory, so the C library is made to use clone(). */
static int deny_processes(scmp_filter_ctx f)
{
	int r = ADD(f, SCMP_ACT_ERRNO(EPERM), spawn);

	if (!r)
		r = seccomp_rule_add(f, SCMP_ACT_ERRNO(ENOSYS), S(clone3), 0);
	return r ? r : rule(f, SCMP_ACT_ERRNO(EPERM), S(clone), 1, MASKED(0, CLONE_THREAD, 0), NONE);
}

static int load_process(const struct sandbox_config *c)
{
	const uint32_t deny = SCMP_ACT_ERRNO(EPERM);
	scmp_filter_ctx f = filter_new(SCMP_ACT_ALLOW);
	int r;

	if (!f)
		return -ENOMEM;
	seccomp_attr_set(f, SCMP_FLTATR_CTL_TSYNC, 1);
	r = ADD(f, deny, never);
	if (!r)
		r = deny_wx(f, deny);
	if (!r && !c->obsolete)
		r = ADD(f, deny, obsolete);
	if (!r && !c->elevate)
		r = ADD(f, deny, elevate);
	if (!r && !c->spawn)
		r = deny_processes(f);
	if (!r && !c->resources)
		r = ADD(f, deny, resources);
	if (!r)
		r = seccomp_load(f);
	seccomp_release(f);
	return r;
}

/* The requests a vCPU makes: KVM's own (type 0xae) and what a C library asks about a stream. */
static int allow_ioctls(scmp_filter_ctx f)
{
	static const unsigned others[] = { 0x5401 /* TCGETS */, 0x541b /* FIONREAD */, 0x5421 /* FIONBIO */ };
	int r = rule(f, SCMP_ACT_ALLOW, S(ioctl), 1, MASKED(1, 0xff00, 0xae00), NONE);

	for (size_t i = 0; i < ARRAY_SIZE(others) && !r; i++)
		r = rule(f, SCMP_ACT_ALLOW, S(ioctl), 1, SCMP_CMP64(1, SCMP_CMP_EQ, others[i]), NONE);
	return r;
}

static int allow_memory(scmp_filter_ctx f)
{
	const uint64_t wx = PROT_WRITE | PROT_EXEC;
	static const int calls[] = { S(mmap), S(mprotect) };
	static const uint64_t prots[] = { 0, PROT_WRITE, PROT_EXEC };
	int r = 0;

	for (size_t i = 0; i < ARRAY_SIZE(calls) * ARRAY_SIZE(prots) && !r; i++)
		r = rule(f, SCMP_ACT_ALLOW, calls[i / ARRAY_SIZE(prots)], 1, MASKED(2, wx, prots[i % ARRAY_SIZE(prots)]), NONE);
	return r;
}

static int vcpu_rules(scmp_filter_ctx f)
{
	int r = ADD(f, SCMP_ACT_ALLOW, vcpu);

	if (!r)
		r = ADD(f, SCMP_ACT_KILL_PROCESS, fatal);
	if (!r)
		r = allow_ioctls(f);
	if (!r)
		r = allow_memory(f);
	if (!r)
		r = seccomp_rule_add(f, SCMP_ACT_ERRNO(ENOSYS), S(clone3), 0);
	if (!r)
		r = rule(f, SCMP_ACT_ALLOW, S(clone), 1, MASKED(0, CLONE_THREAD, CLONE_THREAD), NONE);
	/* signals to this process only: kicks, and abort() */
	if (!r)
		r = rule(f, SCMP_ACT_ALLOW, S(tgkill), 1, SCMP_CMP64(0, SCMP_CMP_EQ, (uint64_t)getpid()), NONE);
	/* to read the limit of a thread's stack */
	return r ? r : rule(f, SCMP_ACT_ALLOW, S(prlimit64), 2, SCMP_CMP64(0, SCMP_CMP_EQ, 0), SCMP_CMP64(2, SCMP_CMP_EQ, 0));
}

/* The filter as a program in memory: libseccomp writes it to a descriptor only. */
static int export_vcpu(struct sandbox *sb)
{
	scmp_filter_ctx f = filter_new(SCMP_ACT_ERRNO(EPERM));
	int fd = memfd_create("filter", MFD_CLOEXEC), r = !f ? -ENOMEM : fd < 0 ? -errno : vcpu_rules(f);
	off_t size;

	if (!r)
		r = seccomp_export_bpf(f, fd);
	if (f)
		seccomp_release(f);
	if (!r) {
		size = lseek(fd, 0, SEEK_END);
		sb->vcpu.len = (unsigned short)((size_t)size / sizeof *sb->vcpu.filter);
		sb->vcpu.filter = malloc((size_t)size);
		r = !sb->vcpu.filter ? -ENOMEM : pread(fd, sb->vcpu.filter, (size_t)size, 0) == size ? 0 : -EIO;
	}
	if (fd >= 0)
		close(fd);
	return r;
}

void sandbox_default(struct sandbox_config *c)
{
	*c = (struct sandbox_config){ .on = !SANITIZED, .resources = true };
}

int sandbox_enter(struct sandbox **out, const struct sandbox_config *c, struct err *err)
{
	struct sandbox *sb = calloc(1, sizeof *sb);
	int r = sb ? export_vcpu(sb) : -ENOMEM;

	if (!r)
		r = load_process(c);
	if (r) {
		sandbox_free(sb);
		return err_set_errno(err, r, "cannot enter the sandbox (-sandbox off runs without)");
	}
	*out = sb;
	return 0;
}

int sandbox_enter_vcpu(void *opaque)
{
	struct sandbox *sb = opaque;

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &sb->vcpu))
		return -errno;
	return 0;
}

void sandbox_free(struct sandbox *sb)
{
	if (sb)
		free(sb->vcpu.filter);
	free(sb);
}
