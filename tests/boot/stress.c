/*
 * A guest program: does many things at once for a number of seconds and checks all of them. Threads that map, protect and unmap
 * memory and provoke faults; signals, between threads and by timers, with registers checked around them; fork with copied
 * memory and pipes; mutexes, condition variables and atomics; code that rewrites itself; arithmetic whose result is known.
 *
 *	stress SECONDS [THREADS OF EACH KIND]
 *
 * Ends with "stress ok" and what was done, or with a line that says what went wrong and status 1.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define PAGE 4096u
#define MAX_THREADS 64

static atomic_bool stop;

#define CHECK(cond, ...) do { if (!(cond)) { printf("stress: FAILED %s:%d: ", __func__, __LINE__); printf(__VA_ARGS__); \
	printf(" (errno %d)\n", errno); fflush(stdout); _exit(1); } } while (0)

struct worker { pthread_t thread; void (*round)(struct worker *); const char *name; unsigned n; uint64_t rng; _Atomic uint64_t rounds; void *own; };

static uint32_t rnd(struct worker *w)
{
	w->rng = w->rng * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(w->rng >> 33);
}

/* -- memory and faults ------------------------------------------------------------------------------- */
static __thread sigjmp_buf *volatile fault_out;
static __thread void *volatile fault_addr;

static void on_fault(int sig, siginfo_t *si, void *uc)
{
	CHECK(fault_out, "signal %d at %p out of the blue, rip %llx", sig, si->si_addr, (unsigned long long)((ucontext_t *)uc)->uc_mcontext.gregs[REG_RIP]);
	fault_addr = si->si_addr;
	siglongjmp(*fault_out, sig);
}

static int faults(volatile uint8_t *p, int write)
{
	sigjmp_buf out;
	int sig = sigsetjmp(out, 1);

	if (!sig) {
		fault_out = &out;
		if (write)
			*p = 1;
		else
			(void)*p;
	}
	fault_out = NULL;
	return sig;
}

static void memory_round(struct worker *w)
{
	unsigned pages = 1 + rnd(w) % 64, hole = rnd(w) % pages;
	uint64_t seed = w->rng;
	uint8_t *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *q = (uint64_t *)p;

	CHECK(p != MAP_FAILED, "mmap of %u pages", pages);
	for (unsigned n = 0; n < pages * PAGE / 8; n++) {
		CHECK(!q[n], "fresh memory holds %llx", (unsigned long long)q[n]);
		q[n] = seed ^ n * 0x9e3779b97f4a7c15u;
	}
	CHECK(!mprotect(p + hole * PAGE, PAGE, PROT_READ), "mprotect");
	uint8_t *at = p + hole * PAGE + rnd(w) % PAGE;
	CHECK(faults(at, 1) == SIGSEGV && fault_addr == at, "store to read-only %p: %p", (void *)at, fault_addr);
	CHECK(!faults(at, 0), "load from read-only memory");
	CHECK(!mprotect(p + hole * PAGE, PAGE, PROT_NONE), "mprotect");
	CHECK(faults(at, 0) == SIGSEGV && fault_addr == at, "load from PROT_NONE %p: %p", (void *)at, fault_addr);
	CHECK(!mprotect(p + hole * PAGE, PAGE, PROT_READ | PROT_WRITE), "mprotect");
	for (unsigned n = 0; n < pages * PAGE / 8; n++)
		CHECK(q[n] == (seed ^ n * 0x9e3779b97f4a7c15u), "word %u of %u pages: %llx", n, pages, (unsigned long long)q[n]);
	/* In three parts; what was unmapped may be another thread's at once. */
	CHECK(!munmap(p + hole * PAGE, PAGE), "munmap");
	CHECK(!hole || !munmap(p, hole * PAGE), "munmap");
	CHECK(hole + 1 == pages || !munmap(p + (hole + 1) * PAGE, (pages - hole - 1) * PAGE), "munmap");
}

/* -- signals ------------------------------------------------------------------------------------------ */
static __thread volatile unsigned signals_seen;
static atomic_ulong signals_sent, signals_taken;

static void on_usr(int sig)
{
	double x[8];

	/* Use the registers that the interrupted code uses. */
	for (unsigned n = 0; n < 8; n++)
		x[n] = n * 1.5 + sig;
	for (unsigned n = 1; n < 8; n++)
		x[0] += x[n] * x[n - 1];
	signals_seen += x[0] > 0;
	atomic_fetch_add(&signals_taken, 1);
}

/* Sixteen values in general and eight in vector registers, many times around, while signals come. */
static void signal_round(struct worker *w)
{
	uint64_t a = rnd(w), b = a, c = rnd(w) | 1, d = c, loops = 20000 + rnd(w) % 20000;
	double x = (double)a, y = (double)c;
	uint64_t flags = 0;

	pthread_kill(pthread_self(), SIGUSR1);
	atomic_fetch_add(&signals_sent, 1);
	__asm__ volatile(
		"movq %[a], %%r8 \n movq %[c], %%r9 \n movq %[a], %%xmm9 \n movq %[c], %%xmm10 \n pxor %%xmm11, %%xmm11 \n"
		"xor %%r10d, %%r10d \n xor %%r11d, %%r11d \n mov %[n], %%rcx \n"
		"1: add %%r9, %%r8 \n adc $0, %%r10 \n paddq %%xmm10, %%xmm9 \n paddq %%xmm9, %%xmm11 \n add %%r8, %%r11 \n"
		"dec %%rcx \n jnz 1b \n"
		"movq %%xmm9, %%rcx \n xor %%r8, %%rcx \n or %%rcx, %[f] \n movq %%xmm11, %%rcx \n xor %%r11, %%rcx \n or %%rcx, %[f] \n mov %%r8, %[a]"
		: [a] "+r"(a), [f] "+r"(flags) : [c] "r"(c), [n] "r"(loops)
		: "rcx", "r8", "r9", "r10", "r11", "xmm9", "xmm10", "xmm11", "cc");
	CHECK(a == b + d * loops && !flags, "%llx for %llx, %llx", (unsigned long long)a, (unsigned long long)(b + d * loops), (unsigned long long)flags);
	for (unsigned n = 0; n < 5000; n++)
		x += y;
	CHECK(x == (double)b + (double)d * 5000, "a sum of doubles");
}

/* -- fork and pipes ----------------------------------------------------------------------------------- */
static uint32_t sum_of(const uint8_t *p, size_t n)
{
	uint32_t s = 1, t = 0;

	while (n--) {
		s = (s + *p++) % 65521;
		t = (t + s) % 65521;
	}
	return t << 16 | s;
}

static void read_all(int fd, void *p, size_t n)
{
	for (size_t got = 0; got < n;) {
		ssize_t r = read(fd, (uint8_t *)p + got, n - got);

		if (r < 0 && errno == EINTR)
			continue;
		CHECK(r > 0, "read %zd", r);
		got += (size_t)r;
	}
}

static void write_all(int fd, const void *p, size_t n)
{
	for (size_t done = 0; done < n;) {
		ssize_t r = write(fd, (const uint8_t *)p + done, n - done);

		if (r < 0 && errno == EINTR)
			continue;
		CHECK(r > 0, "write %zd", r);
		done += (size_t)r;
	}
}

#define BLOB 50000u
static void fork_round(struct worker *w)
{
	int to[2], from[2], status;
	uint8_t *blob = w->own;
	uint32_t sum, answer[2];
	pid_t pid;

	for (unsigned n = 0; n < BLOB; n++)
		blob[n] = (uint8_t)rnd(w);
	sum = sum_of(blob, BLOB);
	CHECK(!pipe2(to, O_CLOEXEC) && !pipe2(from, O_CLOEXEC), "pipe");
	pid = fork();
	CHECK(pid >= 0, "fork");
	if (!pid) {
		uint8_t buf[BLOB];
		uint32_t r[2];

		read_all(to[0], buf, BLOB);
		r[0] = sum_of(buf, BLOB);
		r[1] = sum_of(blob, BLOB);      /* the copy of before */
		memset(blob, 0, BLOB);
		write_all(from[1], r, sizeof r);
		_exit(sum_of(blob, BLOB) == (BLOB << 16 | 1) ? 42 : 43);
	}
	write_all(to[1], blob, BLOB);
	memset(blob + BLOB / 2, (int)w->n, 100);
	read_all(from[0], answer, sizeof answer);
	while (waitpid(pid, &status, 0) < 0)
		CHECK(errno == EINTR, "waitpid");
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42, "the child ended with %x", status);
	CHECK(answer[0] == sum, "the pipe gave %x for %x", answer[0], sum);
	CHECK(answer[1] == sum, "the child's copy gave %x for %x", answer[1], sum);
	close(to[0]), close(to[1]), close(from[0]), close(from[1]);
}

/* -- locks -------------------------------------------------------------------------------------------- */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static uint64_t plain, queue;           /* under the lock */
static _Atomic uint64_t atomic_count, lock_count, produced, consumed;

static void lock_round(struct worker *w)
{
	for (unsigned n = 0; n < 200; n++) {
		atomic_fetch_add(&atomic_count, 1);
		pthread_mutex_lock(&lock);
		plain++;
		if (w->n & 1) {
			queue++;
			atomic_fetch_add(&produced, 1);
			pthread_cond_signal(&cond);
		} else if (queue) {
			queue--;
			atomic_fetch_add(&consumed, 1);
		} else {
			struct timespec t;

			clock_gettime(CLOCK_REALTIME, &t);
			t.tv_nsec += 1000000;
			t.tv_sec += t.tv_nsec / 1000000000;
			t.tv_nsec %= 1000000000;
			pthread_cond_timedwait(&cond, &lock, &t);
		}
		pthread_mutex_unlock(&lock);
		atomic_fetch_add(&lock_count, 1);
	}
}

static void lock_sums(void)
{
	CHECK(plain == lock_count && plain == atomic_count, "%llu increments under the lock, %llu outside", (unsigned long long)plain,
	      (unsigned long long)lock_count);
	CHECK(produced == consumed + queue, "%llu made, %llu taken, %llu left", (unsigned long long)produced, (unsigned long long)consumed,
	      (unsigned long long)queue);
}

/* -- code that changes ---------------------------------------------------------------------------------- */
static void code_put(uint8_t *p, uint32_t add, uint32_t times)
{
	/* mov ecx, times ; xor eax, eax ; 1: add eax, add ; dec ecx ; jnz 1b ; ret */
	static const uint8_t form[] = { 0xb9, 0, 0, 0, 0, 0x31, 0xc0, 0x05, 0, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xc3 };

	memcpy(p, form, sizeof form);
	memcpy(p + 1, &times, 4);
	memcpy(p + 8, &add, 4);
}

/* Own: a page that is written and executed at one address, and one at two. Odd rounds patch an immediate between two calls. */
static void code_round(struct worker *w)
{
	struct { uint8_t *both, *w, *x; } *own = w->own;
	uint32_t add = rnd(w), times = 1 + rnd(w) % 100, at = rnd(w) % (PAGE - 32), got;

	code_put(own->both + at, add, times);
	got = ((uint32_t (*)(void))(void *)(own->both + at))();
	CHECK(got == add * times, "own code gave %x for %x", got, add * times);
	for (unsigned n = 0; n < 30; n++) {
		add = rnd(w);
		memcpy(own->both + at + 8, &add, 4);
		got = ((uint32_t (*)(void))(void *)(own->both + at))();
		CHECK(got == add * times, "patched code gave %x for %x", got, add * times);
	}
	for (unsigned n = 0; n < 30; n++) {
		code_put(own->w + at, add + n, times);
		/* By another address: the processor wants to be told (SDM vol. 3 9.1.3). */
		__asm__ volatile("cpuid" : : "a"(0), "c"(0) : "rbx", "rdx", "memory");
		got = ((uint32_t (*)(void))(void *)(own->x + at))();
		CHECK(got == (add + n) * times, "code by an alias gave %x for %x", got, (add + n) * times);
	}
	/* New pages for old addresses. */
	if (rnd(w) % 4 == 0)
		CHECK(mmap(own->both, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == own->both, "mmap");
}

static void code_init(struct worker *w)
{
	struct { uint8_t *both, *w, *x; } *own = calloc(1, sizeof *own);
	int fd = memfd_create("code", MFD_CLOEXEC);

	CHECK(fd >= 0 && !ftruncate(fd, PAGE), "memfd");
	own->both = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	own->w = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	own->x = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	CHECK(own->both != MAP_FAILED && own->w != MAP_FAILED && own->x != MAP_FAILED, "mmap of code");
	close(fd);
	w->own = own;
}

/* -- time and arithmetic ---------------------------------------------------------------------------------- */
static void time_round(struct worker *w)
{
	uint32_t sieve[64] = { 0 }, primes = 0;
	struct timespec a, b;

	clock_gettime(CLOCK_MONOTONIC, &a);
	for (unsigned n = 0; n < 100; n++) {
		clock_gettime(CLOCK_MONOTONIC, &b);
		CHECK(b.tv_sec > a.tv_sec || (b.tv_sec == a.tv_sec && b.tv_nsec >= a.tv_nsec), "the clock went back");
		a = b;
		CHECK(syscall(SYS_getpid) == getpid(), "getpid");
	}
	for (unsigned n = 2; n < 2048; n++) {
		if (sieve[n / 32] >> n % 32 & 1)
			continue;
		primes++;
		for (unsigned k = n * n; k < 2048; k += n)
			sieve[k / 32] |= 1u << k % 32;
	}
	CHECK(primes == 309, "%u primes below 2048", primes);
	sched_yield();
}

/* -- all of it ---------------------------------------------------------------------------------------------- */
static void *work(void *opaque)
{
	struct worker *w = opaque;

	while (!atomic_load(&stop)) {
		w->round(w);
		atomic_fetch_add(&w->rounds, 1);
	}
	return NULL;
}

static const struct { const char *name; void (*round)(struct worker *); } kinds[] = {
	{ "memory", memory_round }, { "signals", signal_round }, { "fork", fork_round }, { "locks", lock_round }, { "code", code_round },
	{ "time", time_round },
};
#define KINDS (sizeof kinds / sizeof *kinds)

static void handlers(void)
{
	struct sigaction f = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO }, u = { .sa_handler = on_usr, .sa_flags = SA_RESTART };
	struct itimerval it = { { 0, 1000 }, { 0, 1000 } };

	sigaction(SIGSEGV, &f, NULL);
	sigaction(SIGBUS, &f, NULL);
	sigaction(SIGILL, &f, NULL);
	sigaction(SIGFPE, &f, NULL);
	sigaction(SIGUSR1, &u, NULL);
	sigaction(SIGALRM, &u, NULL);
	setitimer(ITIMER_REAL, &it, NULL);
}

static bool all_did(const struct worker *w, unsigned n)
{
	for (unsigned k = 0; k < n; k++)
		if (!w[k].rounds)
			return false;
	return true;
}

/* Until the time is over and everybody did something, however busy the host is. Every kind gets on; every second of the main thread sends signals around. */
static void watch(struct worker *w, unsigned n, unsigned seconds)
{
	uint64_t before[MAX_THREADS] = { 0 };
	struct timespec begin, now;
	unsigned shown = 0;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		struct timespec nap = { 0, 2000000 };

		nanosleep(&nap, NULL);
		for (unsigned k = 0; k < n; k++) {
			pthread_kill(w[k].thread, SIGUSR1);
			atomic_fetch_add(&signals_sent, 1);
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
		if ((unsigned)(now.tv_sec - begin.tv_sec) / 60 > shown) {
			shown = (unsigned)(now.tv_sec - begin.tv_sec) / 60;
			for (unsigned k = 0; k < n; k++) {
				CHECK(w[k].rounds > before[k], "%s %u stands still", w[k].name, w[k].n);
				before[k] = w[k].rounds;
			}
			printf("stress: minute %u\n", shown);
			fflush(stdout);
		}
	} while (now.tv_sec - begin.tv_sec < seconds || !all_did(w, n));
}

int main(int argc, char **argv)
{
	unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 10, each = argc > 2 ? (unsigned)atoi(argv[2]) : 2, n = 0;
	static struct worker w[MAX_THREADS];

	CHECK(each > 0 && each * KINDS <= MAX_THREADS, "stress SECONDS [THREADS OF EACH KIND]");
	handlers();
	for (unsigned k = 0; k < KINDS; k++)
		for (unsigned m = 0; m < each; m++, n++) {
			w[n] = (struct worker){ .round = kinds[k].round, .name = kinds[k].name, .n = m, .rng = n * 77 + 1 };
			if (kinds[k].round == fork_round)
				w[n].own = calloc(1, BLOB);
			if (kinds[k].round == code_round)
				code_init(&w[n]);
			CHECK(!pthread_create(&w[n].thread, NULL, work, &w[n]), "pthread_create");
		}
	watch(w, n, seconds);
	atomic_store(&stop, true);
	for (unsigned k = 0; k < n; k++)
		CHECK(!pthread_join(w[k].thread, NULL), "pthread_join");
	lock_sums();
	CHECK(signals_taken, "no signal was taken");
	printf("stress ok:");
	for (unsigned k = 0; k < n; k++)
		printf(" %s %llu", w[k].name, (unsigned long long)w[k].rounds);
	printf(", %lu signals sent, %lu taken\n", signals_sent, signals_taken);
	return 0;
}
