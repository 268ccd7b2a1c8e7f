/*
 * Where a guest spends its time: the address at which the loop looks around is counted, every few thousand instructions' worth of
 * work. A table of fixed size, four places for each hash; the rarest of four makes room, and who comes takes over its count, so
 * that what is frequent is found whatever else there is (the counts of the rare are too high then).
 */
#ifndef SOFTKVM_PROFILE_H
#define SOFTKVM_PROFILE_H

#include <stdint.h>

#define PROFILE_SETS 1024

struct profile {
	uint64_t total;
	struct { uint64_t rip, samples; uint8_t cpl; } e[PROFILE_SETS][4];
};

/* The vCPU's own thread. */
static inline void profile_sample(struct profile *p, uint64_t rip, uint8_t cpl)
{
	unsigned set = (unsigned)((rip ^ rip >> 10 ^ rip >> 20) % PROFILE_SETS), rare = 0;

	p->total++;
	for (unsigned n = 0; n < 4; n++) {
		if (p->e[set][n].rip == rip && p->e[set][n].cpl == cpl && p->e[set][n].samples) {
			p->e[set][n].samples++;
			return;
		}
		if (p->e[set][n].samples < p->e[set][rare].samples)
			rare = n;
	}
	p->e[set][rare].rip = rip;
	p->e[set][rare].cpl = cpl;
	p->e[set][rare].samples++;
}

#endif
