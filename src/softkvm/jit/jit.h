/*
 * The binary translator (mode T): blocks that ran a few times get native code. Design, register map and the
 * isolation argument: docs/engine-translator.md.
 *
 * It is a second tier below the interpreter's loop: jit_run() executes a block and whatever is linked to it, and
 * returns where the loop would look around. Whatever it does not translate it hands to the interpreter's handler.
 * A translator belongs to its vCPU; everything here is called by that vCPU's thread.
 */
#ifndef SOFTKVM_JIT_JIT_H
#define SOFTKVM_JIT_JIT_H

#include "softkvm/interp/block.h"

struct jit_link;

enum jit_result {
	JIT_NOT,        /* not translated (yet): interpret the block */
	JIT_DONE,       /* cpu->rip is the next instruction */
	JIT_LOOK,       /* cpu->cur was executed by its handler; the loop settles what it left */
};

/* JIT_AT_ONCE: blocks are translated when they run first (tests). JIT_LOCKSTEP: lockstep.h. */
enum jit_mode { JIT_NORMAL, JIT_AT_ONCE, JIT_LOCKSTEP };

#define JIT_BYTES_MIN ((size_t)1 << 20)

/* What one of `vcpus` gets of a VM's memory for code: CODE_EIGHTHS of its part, the rest is for decoded blocks (interp/block.c). */
static inline uint64_t jit_share(uint64_t code_bytes, uint64_t vcpus)
{
	uint64_t part = code_bytes / vcpus;

	return part < JIT_BYTES_MIN ? part : MAX(part / 8 * CODE_EIGHTHS, (uint64_t)JIT_BYTES_MIN);
}

/*
 * bytes: what its translations may take, tables included; perf_fd: -1, or the perf map, which stays the caller's. 0, -ENOSPC (fewer than JIT_BYTES_MIN), -ENOMEM or -ENOTSUP (host
 * without BMI2, context not in low memory). Without it everything is interpreted.
 */
struct jit_config { size_t bytes; enum jit_mode mode; int perf_fd; };
int jit_cpu_init(struct cpu *c, const struct jit_config *cfg);
void jit_cpu_free(struct cpu *c);
/* `b` is valid at cpu->rip. */
enum jit_result jit_run(struct cpu *c, struct block *b, uint32_t mode);
/* The block cache was emptied: forget all translations. Never while translated code runs. */
void jit_flush(struct cpu *c);
/* The host may have the memory of what was forgotten. */
void jit_give_back(struct cpu *c);
/*
 * Blocks are about to move (interp/collect.c). jit_blocks_begin(): forget translations that nobody can come to; false: there are none that could be
 * kept. jit_blocks_visit(): replace each block of each translation by what `visit` makes of it, which may be asked for one more than once.
 * Never while translated code runs.
 */
bool jit_blocks_begin(struct cpu *c);
void jit_blocks_visit(struct cpu *c, struct block *(*visit)(struct block *b));
/* The block's page was written but its bytes stand: ver_value is new. */
void jit_revived(struct cpu *c, struct block *b);

#endif
