/* What the 32-bit program (i386_program.c) tells the benchmark (i386.c): bytes on its standard output. */
#ifndef BENCH_I386_H
#define BENCH_I386_H

#include <stdbool.h>
#include <stdint.h>

struct i386_result { uint64_t hash, ns; };

#endif
