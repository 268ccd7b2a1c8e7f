/* What the files of mmu/ share about guest physical memory. */
#ifndef SOFTKVM_MMU_PHYS_H
#define SOFTKVM_MMU_PHYS_H

#include <stdatomic.h>

#include "softkvm/vm.h"

/*
 * A page's code version. VER_CODE: a block was decoded from it. VER_GRANTED: some vCPU may hold a
 * write entry for it; never set together with VER_CODE. The rest counts invalidations.
 */
enum { VER_CODE = 1, VER_GRANTED = 2, VER_STEP = 4 };

struct slot *phys_slot(struct vm *vm, uint64_t gpa);
/* The page was or is about to be written: blocks decoded from it die. */
void page_code_written(_Atomic uint32_t *ver);

#endif
