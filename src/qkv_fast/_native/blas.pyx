"""Kernel tables whose two products are GEMMs of SciPy's BLAS; all else is the SIMD kernels'.

BLAS is column-major, where an array X[r][c] of C is Xᵀ. So it reads
S[k][i] = sum_d K[k][d] Qt[d][i] as S = Qt K, with Qt (rows x head_dim) and K (head_dim x keys), and
nothing has to be packed:

    scores      S   = gemm('N', 'N', rows, keys, head_dim;   Qt, K)
    accumulate  acc = acc rescale + gemm('N', 'T', rows, v_dim, keys;   P, V)

A block is computed whole, whatever its span.

A layer's whole product is one GEMM, which OpenBLAS computes on threads of its own:

    linear      Yᵀ  = gemm('T', 'N', features, rows, depth;   W, X)

Importing this module imports SciPy's, which takes a quarter of a second: engine.pyx does so on the
first use of BLAS only.
"""

cimport numpy as cnp
from libc.stdlib cimport free, malloc
from scipy.linalg.cython_blas cimport dgemm, sgemm

from .isa cimport count_isas, table_of
from .kernels cimport (
    QKV_FLOAT32, QKV_FLOAT64, qkv_prefetch_rows, qkv_span, qkv_tile_kernels,
)
from .shared cimport load_int, store_int
from .tuning cimport BLAS_THREAD_BYTES, MAX_BLAS_THREADS, MAX_LANES, MAX_TABLES
from .types cimport real

import numpy as np

from .. import _threads

cnp.import_array()

cdef enum:
    TILE = MAX_LANES
    # OpenBLAS computes a product of at most so many multiply-adds on the calling thread, on all its
    # targets. Past that its own threads would compete with ours, so every call stays below.
    SMALL = 64 * 64 * 64

cdef qkv_tile_kernels tables[MAX_TABLES][2]     # by ISA; float, double
cdef int threads_with_buffers = 0


cdef void gemm(bint transposed, int m, int n, int k, const real *a, const real *b, int ldb,
               bint overwrite, real *c) noexcept nogil:
    """c (+)= a op(b), column-major; a and c have TILE rows."""
    cdef char plain = b"N", op = b"T" if transposed else b"N"
    cdef int ld = TILE
    cdef real one = 1, beta = 0 if overwrite else 1
    if real is float:
        sgemm(&plain, &op, &m, &n, &k, &one, <real *>a, &ld, <real *>b, &ldb, &beta, c, &ld)
    else:
        dgemm(&plain, &op, &m, &n, &k, &one, <real *>a, &ld, <real *>b, &ldb, &beta, c, &ld)


cdef void multiply(bint transposed, Py_ssize_t rows, Py_ssize_t depth, real *C, const real *B,
                   const real *A, Py_ssize_t stride, bint overwrite) noexcept nogil:
    """C[rows][TILE] (+)= A[rows][depth] B[depth][TILE] in pieces of at most SMALL.

    transposed: A is [depth][rows] in memory.
    """
    cdef Py_ssize_t row_stride = 1 if transposed else stride
    cdef Py_ssize_t depth_stride = stride if transposed else 1
    cdef Py_ssize_t depth_step = min(depth, 256)
    cdef Py_ssize_t row_step = max(1, SMALL // (TILE * max(depth_step, 1)))
    cdef Py_ssize_t row = 0, at
    if depth_step == 0:                 # an empty sum
        depth_step = 1
    while row < rows:
        row_step = min(row_step, rows - row)
        at = 0
        while at < depth or (at == 0 and overwrite):
            gemm(transposed, TILE, <int>row_step, <int>min(depth_step, depth - at), B + at * TILE,
                 A + row * row_stride + at * depth_stride, <int>max(stride, 1),
                 overwrite and at == 0, C + row * TILE)
            at += depth_step
        row += row_step


cdef void accumulate(real *acc, const real *P, const real *V, Py_ssize_t stride, Py_ssize_t nk,
                     Py_ssize_t Dv, const real *rescale) noexcept nogil:
    """acc = acc rescale + Vᵀ P; rescale NULL: acc is overwritten"""
    cdef Py_ssize_t d, i
    cdef bint rescales = False
    if rescale != NULL:
        for i in range(TILE):
            rescales |= rescale[i] != 1
    if rescales:
        for d in range(Dv):
            for i in range(TILE):
                acc[d * TILE + i] *= rescale[i]
    multiply(True, Dv, nk, acc, P, V, stride // <Py_ssize_t>sizeof(real), rescale == NULL)


cdef void scores_f32(void *S, const void *Qt, const char *K, Py_ssize_t stride, Py_ssize_t nk,
                     Py_ssize_t D, int nvec, const qkv_span *span,
                     const qkv_prefetch_rows *prefetch) noexcept nogil:
    multiply(False, nk, D, <float *>S, <const float *>Qt, <const float *>K, stride // 4, True)


cdef void scores_f64(void *S, const void *Qt, const char *K, Py_ssize_t stride, Py_ssize_t nk,
                     Py_ssize_t D, int nvec, const qkv_span *span,
                     const qkv_prefetch_rows *prefetch) noexcept nogil:
    multiply(False, nk, D, <double *>S, <const double *>Qt, <const double *>K, stride // 8, True)


cdef void accumulate_f32(void *acc, const void *P, const char *V, Py_ssize_t stride, Py_ssize_t nk,
                         Py_ssize_t Dv, int nvec, const void *rescale,
                         const qkv_span *span) noexcept nogil:
    accumulate(<float *>acc, <const float *>P, <const float *>V, stride, nk, Dv,
               <const float *>rescale)


cdef void accumulate_f64(void *acc, const void *P, const char *V, Py_ssize_t stride, Py_ssize_t nk,
                         Py_ssize_t Dv, int nvec, const void *rescale,
                         const qkv_span *span) noexcept nogil:
    accumulate(<double *>acc, <const double *>P, <const double *>V, stride, nk, Dv,
               <const double *>rescale)


cdef void make_tables():
    cdef int index, wide
    for index in range(min(<int>MAX_TABLES, count_isas())):
        for wide in range(2):
            tables[index][wide] = table_of(index, QKV_FLOAT64 if wide else QKV_FLOAT32)[0]
            tables[index][wide].tile_q = TILE
            tables[index][wide].scores = scores_f64 if wide else scores_f32
            tables[index][wide].accumulate = accumulate_f64 if wide else accumulate_f32


make_tables()


def table_address(int index, bint wide):
    """Return the address of an ISA's kernel table for float or, if wide, double."""
    return <size_t>&tables[index][wide]


def limit_threads(int budget):
    """Return how many threads may call BLAS: no more than there are CPUs.

    MemoryError where there is no memory for their buffers.
    """
    cdef void *probe
    cdef int known = load_int(&threads_with_buffers)
    budget = min(budget, MAX_BLAS_THREADS, <int>_threads.cpus())
    if budget > known:
        probe = malloc(<size_t>(budget - known) * BLAS_THREAD_BYTES)
        if probe == NULL:
            raise MemoryError(f"no memory for the buffers of BLAS on {budget} threads")
        free(probe)
        store_int(&threads_with_buffers, budget)
    return budget


cdef void whole_product(const real *x, const real *weight, real *y, int *sizes,
                        bint adds) noexcept nogil:
    """y (+)= x weightᵀ; sizes: features, rows, depth and the distances of weight's, x's, y's rows"""
    cdef char transposed = b"T", plain = b"N"
    cdef real one = 1, beta = 1 if adds else 0
    if real is float:
        sgemm(&transposed, &plain, &sizes[0], &sizes[1], &sizes[2], &one, <real *>weight,
              &sizes[3], <real *>x, &sizes[4], &beta, y, &sizes[5])
    else:
        dgemm(&transposed, &plain, &sizes[0], &sizes[1], &sizes[2], &one, <real *>weight,
              &sizes[3], <real *>x, &sizes[4], &beta, y, &sizes[5])


cdef bint fits_gemm(array) except -1:
    """Return whether GEMM can take a matrix with unit stride: aligned, its distances ints."""
    item, row = array.itemsize, array.strides[0]
    return bool(array.flags.aligned and row % item == 0
                and max(1, array.shape[1]) <= row // item < 1 << 31 and max(array.shape) < 1 << 31)


def linear(x, weight, bias, y):
    """Compute y = x weightᵀ + bias on BLAS's threads; the types are all float or all double."""
    cdef int[6] sizes
    cdef const void *x_data
    cdef const void *weight_data
    cdef void *y_data
    cdef bint adds = bias is not None, wide = y.dtype.itemsize == 8
    target = y if fits_gemm(y) else np.empty(y.shape, y.dtype)
    x = x if fits_gemm(x) else np.array(x, order="C")
    weight = weight if fits_gemm(weight) else np.array(weight, order="C")
    sizes = [weight.shape[0], x.shape[0], x.shape[1]] + [
        max(1, array.strides[0] // array.itemsize) for array in (weight, x, target)]
    if adds:
        target[...] = bias
    x_data, weight_data = cnp.PyArray_DATA(x), cnp.PyArray_DATA(weight)
    y_data = cnp.PyArray_DATA(target)
    with nogil:
        if wide:
            whole_product(<const double *>x_data, <const double *>weight_data, <double *>y_data,
                          sizes, adds)
        else:
            whole_product(<const float *>x_data, <const float *>weight_data, <float *>y_data,
                          sizes, adds)
    if target is not y:
        y[...] = target
