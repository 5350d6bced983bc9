/* Everything up to target_pop.h may use the ISA that QKV_TARGET names, and nothing else of the
 * library is compiled for it: no per-file compiler flags, the same with gcc and clang. */
#if defined(__clang__)
#define QKV_PRAGMA(text) _Pragma(#text)
#define QKV_PUSH(isa) QKV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
QKV_PUSH(QKV_TARGET)
#else
#define QKV_PRAGMA(text) _Pragma(#text)
#define QKV_PUSH(isa) QKV_PRAGMA(GCC target(isa))
#pragma GCC push_options
QKV_PUSH(QKV_TARGET)
#endif
