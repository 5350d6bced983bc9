cimport numpy as cnp
from libc.stdint cimport int64_t

from .kernels cimport qkv_tile_kernels
from .types cimport Interrupt, Plan, TensorView

cdef int view_problem(Plan *plan, problem) except -1
cdef int view_tensors(Plan *plan, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                      cnp.ndarray out, int query_code, int key_code, int value_code,
                      int out_code) except -1
cdef void view_numbers(TensorView *view, array, Py_ssize_t batch_ndim) noexcept
cdef void set_scoring(Plan *plan, double scale, int64_t left, int64_t right, double softcap,
                      const double *sinks) noexcept
cdef void plan_prefill(Plan *plan, const qkv_tile_kernels *kernels, Interrupt *interrupt) noexcept
cdef void limit_to_blas(Plan *plan) noexcept
cdef void plan_decode(Plan *plan, const Plan *prefill, const qkv_tile_kernels *kernels) noexcept
cdef Py_ssize_t choose_max_decode_rows(const Plan *prefill,
                                       const qkv_tile_kernels *decode) noexcept
cdef void choose_prefill_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept
cdef void choose_decode_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept
cdef void lay_out_prefill(Plan *plan, bint splits_keys=*) noexcept
cdef void lay_out_decode(Plan *plan, Py_ssize_t rows) noexcept
cdef bint is_in_place(const Plan *plan) noexcept
