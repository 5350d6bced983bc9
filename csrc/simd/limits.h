/* What every SIMD header needs first: `real` and its limits. REAL_BITS is 32 or 64. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if REAL_BITS == 32
typedef float real;
#define REAL_MAX FLT_MAX
#define REAL_MIN_EXP (-126.0f)
#else
typedef double real;
#define REAL_MAX DBL_MAX
#define REAL_MIN_EXP (-1022.0)
#endif
#define REAL_INF ((real)INFINITY)
#define INLINE static inline __attribute__((always_inline))
