/* TLB checks that fail for no reason (block_miss.c). */
#ifndef TESTS_BLOCK_MISS_H
#define TESTS_BLOCK_MISS_H

#include "block_make.h"
#include "softkvm/mmu/tlb.h"

extern bool missing;            /* they do */
extern uint64_t refused;        /* so many accesses were left to handlers */
extern uint8_t nobodys[8192];   /* where held addresses that were never set lead to; all 0 */

#endif
