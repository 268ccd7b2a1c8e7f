/*
 * A fuzz target is LLVMFuzzerTestOneInput(). Built with -fsanitize=fuzzer it is libFuzzer's; without,
 * this main runs it on pseudo-random bytes: `prog [runs [seed]]`. The seed is printed.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

#ifndef LIBFUZZER
int main(int argc, char **argv)
{
	unsigned runs = argc > 1 ? strtoul(argv[1], NULL, 0) : 300;
	uint64_t s = argc > 2 ? strtoull(argv[2], NULL, 0) : (uint64_t)time(NULL);
	static uint8_t buf[4096];

	printf("seed %llu, %u runs\n", (unsigned long long)s, runs);
	fflush(stdout);
	for (unsigned r = 0; r < runs; r++) {
		for (size_t i = 0; i < sizeof(buf); i++) {
			s = s * 6364136223846793005ULL + 1442695040888963407ULL;
			buf[i] = s >> 56;
		}
		LLVMFuzzerTestOneInput(buf, sizeof(buf) - (s >> 32) % 64);
	}
	return 0;
}
#endif

#endif
