/*
 * A leaf that lives in memory and remembers: every write and flush is recorded, so that the file can be put
 * together as a power cut at any point would have left it; and any call can be made to fail.
 */
#ifndef TESTS_BLOCK_FAULT_H
#define TESTS_BLOCK_FAULT_H

#include "block/driver.h"

struct fault;

/* A leaf over a copy of `len` bytes. The struct block owns the fault. */
struct block *fault_new(const void *data, uint64_t len);
/* Calls (reads, writes, flushes, other) so far. */
uint64_t fault_calls(struct block *b);
/* The nth call from now fails with `error`; `torn`: a write does its first half; sticky: all later ones, too. */
void fault_at(struct block *b, uint64_t nth, int error, bool torn, bool sticky);
/* Flushes wait inside of the call until they may go on. */
void fault_hold(struct block *b, bool hold);
/* Flushes that wait so. */
unsigned fault_held(struct block *b);
/* Writes so far. */
uint64_t fault_writes(struct block *b);
/* Number of flushes done within the first `n` writes. */
uint64_t fault_flushed(struct block *b);
/*
 * The file after a power cut behind write `n`: all that was flushed before, and of the later writes a random
 * choice, in random order, some torn at 512 bytes. malloc()ed.
 */
uint8_t *fault_crash(struct block *b, uint64_t n, unsigned *seed, uint64_t *len);

/* What a guest does: `n` random requests of all kinds to a block without workers; aborts when one is not answered once. */
void guest_requests(struct block *b, unsigned seed, unsigned n);

#endif
