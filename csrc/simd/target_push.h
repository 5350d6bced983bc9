/* Compiles everything up to target_pop.h for the features that QKV_TARGET names, and nothing else
 * of the library: gcc and clang do the same, and no file has compiler flags of its own. */
#if defined(__clang__)
#define QKV_PRAGMA(text) _Pragma(#text)
#define QKV_PUSH(isa)                                                                            \
    QKV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
QKV_PUSH(QKV_TARGET)
#else
#define QKV_PRAGMA(text) _Pragma(#text)
#define QKV_PUSH(isa) QKV_PRAGMA(GCC target(isa))
#pragma GCC push_options
QKV_PUSH(QKV_TARGET)
#endif
