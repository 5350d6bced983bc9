/* The sizes of the CPU's caches. */
#ifndef QKV_CACHES_H
#define QKV_CACHES_H

#include <stddef.h>

/* The bytes of a core's level 2 cache; 0 where nothing tells, or where cores differ (on macOS,
 * those of a performance core). The order of sums follows from it, so it must be the same in every
 * process of a machine. */
ptrdiff_t qkv_l2_bytes(void);

#endif
