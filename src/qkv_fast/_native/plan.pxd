from .kernels cimport qkv_tile_kernels
from .types cimport Interrupt, Plan

cdef int plan_prefill(Plan *plan, problem, const qkv_tile_kernels *kernels,
                      Interrupt *interrupt) except -1
cdef void limit_to_blas(Plan *plan) noexcept
cdef void plan_decode(Plan *plan, const Plan *prefill, const qkv_tile_kernels *kernels) noexcept
cdef Py_ssize_t choose_max_decode_rows(const Plan *prefill,
                                       const qkv_tile_kernels *decode) noexcept
cdef void choose_prefill_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept
cdef void choose_decode_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept
cdef void lay_out_prefill(Plan *plan) noexcept
cdef void lay_out_decode(Plan *plan, Py_ssize_t rows) noexcept
cdef bint is_in_place(const Plan *plan) noexcept
