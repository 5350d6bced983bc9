/* The modes of a thread's floating point: rounding, and whether subnormal numbers count as zero.
 *
 * A program may have changed them on its own threads, and a thread inherits those of the one that
 * made it: a library built with -ffast-math sets flush-to-zero as it is loaded. Tasks run in C's
 * default modes, so that no result depends on whose thread computed it. */
#ifndef QKV_FP_MODE_H
#define QKV_FP_MODE_H

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define QKV_MODE_BITS 0xffc0u    /* MXCSR without its flags: what has happened */
#define QKV_DEFAULT_MODE 0x1f80u /* to nearest, subnormals kept, no exception traps */
static inline uint64_t read_mode(void) { return _mm_getcsr(); }
static inline void write_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__) && defined(__GNUC__)
#define QKV_MODE_BITS 0x07ff9f00u /* FPCR: AHP, DN, FZ, RMode, FZ16, traps */
#define QKV_DEFAULT_MODE 0u
static inline uint64_t read_mode(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void write_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
#define QKV_MODE_BITS 0u
#define QKV_DEFAULT_MODE 0u
static inline uint64_t read_mode(void) { return 0; }
static inline void write_mode(uint64_t mode) { (void)mode; }
#endif

/* Sets the default modes; returns what leave_default_mode needs to undo that. */
static inline uint64_t enter_default_mode(void)
{
    const uint64_t mode = read_mode();
    if ((mode & QKV_MODE_BITS) != QKV_DEFAULT_MODE) write_mode(QKV_DEFAULT_MODE);
    return mode;
}

/* A thread that came in other modes gets those back, with the flags that were set then. */
static inline void leave_default_mode(uint64_t mode)
{
    if ((mode & QKV_MODE_BITS) != QKV_DEFAULT_MODE) write_mode(mode);
}

#endif
