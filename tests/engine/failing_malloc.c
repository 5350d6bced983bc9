/* A library for LD_PRELOAD in which one large allocation fails, for test_allocation.py. glibc alone
 * exports the functions behind its malloc by these names. */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *memory, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

static _Atomic size_t large;
static atomic_long remaining = -1; /* large allocations until the one that fails; negative: none */
static atomic_long failures;

/* Has the allocation number n, from 0 on, of at least so many bytes fail. */
void fail_allocation(long n, size_t bytes)
{
    atomic_store(&large, bytes);
    atomic_store(&failures, 0);
    atomic_store(&remaining, n);
}

/* Has none fail from now on; returns how many did. */
long stop_failing(void)
{
    atomic_store(&remaining, -1);
    return atomic_load(&failures);
}

static int fails(size_t size)
{
    if (atomic_load(&remaining) < 0 || size < atomic_load(&large)) return 0;
    if (atomic_fetch_sub(&remaining, 1) != 0) return 0;
    atomic_fetch_add(&failures, 1);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }

void *calloc(size_t count, size_t size)
{
    return fails(count * size) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *memory, size_t size)
{
    return fails(size) ? NULL : __libc_realloc(memory, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return fails(size) ? NULL : __libc_memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    void *found = fails(size) ? NULL : __libc_memalign(alignment, size);
    if (!found) return ENOMEM;
    *memory = found;
    return 0;
}
