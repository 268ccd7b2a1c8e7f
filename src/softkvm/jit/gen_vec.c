/* Vector instructions (a start: none). */
#include "softkvm/jit/internal.h"

void vec_flush_out(struct tr *t) { }
void vec_store_set(struct em *e, struct tr *t, uint32_t set) { }
void vec_load_set(struct em *e, struct tr *t, uint32_t set) { }
bool vec_wants_wide(const struct tinsn *i) { return false; }
bool gen_vec(struct tr *t, unsigned n) { return false; }
