/* The clock that the engine measures with. */
#ifndef QKV_CLOCK_H
#define QKV_CLOCK_H

/* Nanoseconds since some moment; never set back. */
long long nanoseconds(void);

#endif
