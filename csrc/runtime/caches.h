/* The sizes of the CPU's caches. */
#ifndef QKV_CACHES_H
#define QKV_CACHES_H

#include <stddef.h>

/* The bytes of the level 2 cache that the calling CPU uses; 0 where nothing tells. */
ptrdiff_t qkv_l2_bytes(void);

#endif
