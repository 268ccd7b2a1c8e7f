/* A guest program to be debugged: a function to break in, a variable to watch, a signal, threads that count. debuggers.sh knows its answers. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static volatile int watched, got;
static int table[1000];

static void on_signal(int s) { got += s; }

__attribute__((noinline)) static int step(int n)
{
	watched = n;
	return n * 3 + 1;
}

static void *thread(void *p)
{
	long *sum = p;

	for (int i = 0; i < 100000; i++)
		__atomic_add_fetch(sum, i, __ATOMIC_RELAXED);
	return NULL;
}

int main(void)
{
	pthread_t t[4];
	long sum = 0;
	char *p = malloc(100000);

	signal(SIGUSR1, on_signal);
	for (int i = 0; i < 5; i++)
		table[i] = step(i);
	raise(SIGUSR1);
	for (int i = 0; i < 4; i++)
		pthread_create(&t[i], NULL, thread, &sum);
	for (int i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	memset(p, 'x', 99999);
	p[99999] = 0;
	printf("%zu bits %d %ld %zu %d %.6f\n", 8 * sizeof p, table[4], sum == 4 * 4999950000l || sizeof sum == 4, strlen(p), got, 1e9 / 7);
	free(p);
	return 0;
}
