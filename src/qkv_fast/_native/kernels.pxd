"""The C headers of csrc/, declared once for all modules of the engine.

Types and macros may be used anywhere. Functions are linked into one module each, because symbols
are hidden between shared objects: other modules call what that module exports.

    kernels/kernels.h       isa.pyx
    runtime/convert.h       rows.pyx
    runtime/thread_pool.h   parallel.pyx
    runtime/clock.h         parallel.pyx
    runtime/caches.h        tuning.pyx
    runtime/fp_mode.h       inline
"""

from libc.stdint cimport uint64_t

cdef extern from "kernels/kernels.h" nogil:
    ctypedef struct qkv_span:
        int begin, end

    ctypedef struct qkv_prefetch_rows:
        const char *row
        Py_ssize_t stride, bytes, count, at

    ctypedef struct qkv_tile_kernels:
        const char *isa
        int real_bytes
        int input_type
        int lanes
        int tile_q
        int depth_step
        int row_step
        void (*enter)() noexcept nogil
        void (*leave)() noexcept nogil
        void (*pack_rows)(void *, const char **, Py_ssize_t, int, double) noexcept nogil
        void (*pack_values)(void *, Py_ssize_t, const char *, Py_ssize_t, Py_ssize_t,
                            Py_ssize_t) noexcept nogil
        void (*scores)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                       int, const qkv_span *, const qkv_prefetch_rows *) noexcept nogil
        void (*scale)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*softcap)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*alibi)(void *, Py_ssize_t, int, const void *, const void *) noexcept nogil
        void (*bias)(void *, Py_ssize_t, int, const char **, int, uint64_t *) noexcept nogil
        void (*mask_bool)(uint64_t *, Py_ssize_t, int, const char **, Py_ssize_t) noexcept nogil
        void (*softmax)(void *, Py_ssize_t, int, const uint64_t *, const qkv_span *, double,
                        void *, void *, void *) noexcept nogil
        void (*statistics)(const void *, Py_ssize_t, int, const uint64_t *, const qkv_span *,
                           const void *, void *, void *) noexcept nogil
        void (*accumulate)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                           int, const void *, const qkv_span *) noexcept nogil
        void (*accumulate_nonfinite)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t,
                                     Py_ssize_t, int) noexcept nogil
        void (*scale_keys)(void *, Py_ssize_t, int, const float *, int) noexcept nogil
        int (*all_finite)(const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*store_rows)(char **, int, const void *, Py_ssize_t, int,
                           const void *) noexcept nogil
        void (*fold)(void *, void *, void *, Py_ssize_t, int, const void *, int) noexcept nogil
        void (*decode_scores)(void *, Py_ssize_t, const void *, Py_ssize_t, const char **,
                              Py_ssize_t, Py_ssize_t, Py_ssize_t, int, int) noexcept nogil
        void (*decode_softmax)(void *, Py_ssize_t, int, const float *, const float *, void *,
                               void *, void *) noexcept nogil
        void (*decode_accumulate)(void *, Py_ssize_t, const void *, Py_ssize_t, const char **,
                                  Py_ssize_t, Py_ssize_t, Py_ssize_t, int, const void *, int,
                                  int) noexcept nogil
        void (*widen)(void *, const char *, Py_ssize_t, int) noexcept nogil
        void (*narrow)(char *, const void *, Py_ssize_t, int) noexcept nogil
        void (*merge_rows)(char *, int, const char **, const void *, Py_ssize_t, Py_ssize_t,
                           int) noexcept nogil
        double (*fma_chain)(Py_ssize_t) noexcept nogil
        int fma_chain_flop

    int QKV_KEY_RUN, QKV_KEY_RUNS_AHEAD
    const qkv_tile_kernels *qkv_tile_table(int index, int input_type)
    const char *qkv_isa_name(int index)
    int qkv_isa_runs(int index)
    int qkv_isa_is_profitable(int index)

cdef extern from "runtime/convert.h" nogil:
    int QKV_FLOAT32, QKV_FLOAT64, QKV_FLOAT16, QKV_BFLOAT16, QKV_BOOL, QKV_INT8, QKV_SWAPPED
    void qkv_read_row(void *, int, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_copy_row16(void *, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_zero_nonfinite(void *, int, Py_ssize_t)
    void qkv_write_row(char *, const void *, int, Py_ssize_t, Py_ssize_t, int)

cdef extern from "runtime/thread_pool.h" nogil:
    ctypedef void (*qkv_task)(const void *, int, Py_ssize_t) noexcept nogil
    ctypedef void (*qkv_wait)(const void *) noexcept nogil
    void qkv_run_tasks(qkv_task, qkv_wait, const void *, Py_ssize_t, int, int)
    void qkv_notify_call_start()
    int qkv_forked()
    int qkv_usable_cpus()
    void qkv_assume_cpus(int)
    void qkv_set_threading(int)
    long qkv_team_jobs()

cdef extern from "runtime/clock.h" nogil:
    long long nanoseconds()

cdef extern from "runtime/fp_mode.h" nogil:
    uint64_t enter_default_mode()
    void leave_default_mode(uint64_t)

cdef extern from "runtime/caches.h" nogil:
    Py_ssize_t qkv_l2_bytes()
