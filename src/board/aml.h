/*
 * A small emitter of AML (ACPI 6.4, chapter 20). Objects with a length are opened and closed; lengths
 * are always written in three bytes, so closing patches them in place. Running out of memory sets
 * `oom` and later calls do nothing.
 */
#ifndef BOARD_AML_H
#define BOARD_AML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct aml { uint8_t *buf; size_t len, cap; bool oom; };

void aml_bytes(struct aml *a, const void *p, size_t n);
void aml_u8(struct aml *a, uint8_t v);
void aml_name_path(struct aml *a, const char *path);    /* "\\_SB.PCI0", "_CRS" */
void aml_int(struct aml *a, uint64_t v);
void aml_string(struct aml *a, const char *s);
void aml_eisaid(struct aml *a, const char *id);         /* "PNP0A08" */

/* Each returns a mark for aml_end(). */
size_t aml_scope(struct aml *a, const char *path);
size_t aml_device(struct aml *a, const char *name);
size_t aml_method(struct aml *a, const char *name, unsigned args, bool serialized);
size_t aml_package(struct aml *a, unsigned elements);
size_t aml_if(struct aml *a);
void aml_end(struct aml *a, size_t mark);

void aml_name(struct aml *a, const char *name);         /* Name(name, <the object written next>) */
void aml_name_int(struct aml *a, const char *name, uint64_t v);

/* Resource template as a buffer: begin, descriptors, end. */
struct aml_res { size_t pkg, size_at, start; };
struct aml_res aml_res_begin(struct aml *a);
void aml_res_end(struct aml *a, struct aml_res r);
void aml_res_io(struct aml *a, uint16_t base, uint16_t len);
void aml_res_irq(struct aml *a, unsigned irq);                          /* edge, active high, exclusive */
void aml_res_interrupt(struct aml *a, uint32_t gsi);                    /* level, active high, shared */
void aml_res_memory(struct aml *a, uint32_t base, uint32_t len);
/* Windows a bridge hands on. */
void aml_res_bus(struct aml *a, uint16_t first, uint16_t last);
void aml_res_io_window(struct aml *a, uint16_t first, uint16_t last);
void aml_res_mem_window(struct aml *a, uint64_t first, uint64_t last, bool wide);

#endif
