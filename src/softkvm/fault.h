/*
 * Signals that guest code raises on the host: the one handler of SIGSEGV, SIGBUS, SIGILL and SIGFPE.
 *
 * The engine touches the client's memory at the addresses that the client gave, executes instructions of the guest's
 * choice in stubs and, translated, in the code area. The client may have unmapped the memory, or the host may not know
 * the instruction. The processor's fault then comes as a signal on the vCPU's thread, synchronously, and is served here:
 *
 *   - a program counter that belongs to a part of the engine (FAULT_STUB, FAULT_CODE) is that part's affair: its
 *     function moves the program counter to where it knows how to go on;
 *   - an address in a memory slot of the running VM, met in C code below an unwind scope, ends KVM_RUN with EFAULT, RIP at
 *     the instruction, as Linux does where a slot's memory is not mapped;
 *   - fault_copy() returns -EFAULT.
 *
 * Everything else, and every signal that somebody sent, goes on to the handler that the client had installed before. A client
 * that replaces the handlers while vCPUs run loses the above; they are installed again at the first run of each vCPU.
 */
#ifndef SOFTKVM_FAULT_H
#define SOFTKVM_FAULT_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

struct cpu;

struct fault {
	int sig;
	uint64_t pc;
	bool client;            /* SIGSEGV or SIGBUS at an address of the VM's memory slots */
	ucontext_t *uc;         /* interrupted state; its RIP is where the thread goes on */
};

/* In signal context, on the thread of `c`. True: f->uc was changed so that the thread can go on. */
typedef bool fault_fn(struct cpu *c, struct fault *f);

/* Who is asked, in this order. */
enum fault_part { FAULT_STUB /* vec/stub.c */, FAULT_CODE /* jit/resume.c */, FAULT_PARTS };

/* Install the handlers and the part's function; idempotent, any thread. */
void fault_serve(enum fault_part part, fault_fn *fn);
/* Install the handlers, again if the client replaced them. */
void fault_install(void);

/* This thread runs `c` from now on; NULL: none. */
void fault_enter(struct cpu *c);

/* End KVM_RUN with EFAULT: what stubs and code do once they are left because of f->client. */
_Noreturn void fault_client(struct cpu *c);

/* memcpy() of which one side is memory that may not be mapped: 0 or -EFAULT, then with some of it copied. Any thread. */
int fault_copy(void *to, const void *from, size_t len);
/* The same, not 0 in place of -EFAULT; uses general-purpose registers only. */
int fault_copy_bytes(void *to, const void *from, size_t len);

/* As ram_same(); false also where the memory is not mapped. For comparisons made with a lock held. Any thread. */
bool fault_same(const void *ram, const void *own, size_t len);

#endif
