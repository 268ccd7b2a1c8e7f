/*
 * MC146818 real-time clock with 128 bytes of CMOS RAM at ports 0x70 and 0x71.
 *
 * Time is a base plus a clock, so nothing runs while nobody looks: flags that would have been
 * raised are worked out when register C is read, and a timer is armed only for an interrupt that
 * the guest enabled.
 */
#ifndef DEV_RTC_H
#define DEV_RTC_H

#include "core/device.h"

struct rtc;

/* `epoch_ns`: what the clock reads when env->clock is at 0, in nanoseconds since 1970 of the zone it keeps. */
int rtc_create(struct rtc **out, struct machine_env *env, int64_t epoch_ns, struct err *err);
void rtc_destroy(struct rtc *r);
void rtc_reset(struct rtc *r);
/* CMOS bytes above the clock's own registers (0x0e-0x7f), for what firmware looks up there. */
void rtc_set_cmos(struct rtc *r, unsigned index, uint8_t val);
/* RAM sizes where PC firmware expects them: 0x15-0x18, 0x30-0x35, 0x5b-0x5d; `low` is below 4 GiB. */
void rtc_set_memory(struct rtc *r, uint64_t low, uint64_t high);

#endif
