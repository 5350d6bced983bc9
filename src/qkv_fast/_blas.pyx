"""BLAS tiles: the two products of a tile through scipy.linalg.cython_blas.

BLAS is column-major: an array X[r][c] in C is X^T there, so S[k][i] = sum_d K[k][d] Qt[d][i]
reads S = Qt K with Qt (tile x D), K (D x keys), and needs no packing:

    scores      S    = gemm('N', 'N', tile, keys, D;    Qt, K)
    accumulate  acc  = acc rescale + gemm('N', 'T', tile, Dv, keys;   P, V)

A span would save what a block excludes; here blocks are computed whole.

A module of its own, since importing scipy's takes a quarter of a second.
"""

from scipy.linalg.cython_blas cimport dgemm, sgemm

# OpenBLAS computes a product of at most this many multiply-adds in the calling thread, without
# locks and without packing (DESIGN.md section 3: 64^3 holds on all its targets); past it, its
# own threads would fight with ours. Every call below stays under it.
cdef Py_ssize_t SMALL = 64 * 64 * 64

cdef enum:
    TILE = 64   # rows of a BLAS tile: MAX_LANES of _engine.pyx


ctypedef fused real:
    float
    double

ctypedef void (*scores_t)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                          int, const void *, const void *) noexcept nogil
ctypedef void (*accumulate_t)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t,
                              Py_ssize_t, int, const void *, const void *) noexcept nogil


cdef void gemm(int wide, char transposed, int m, int n, int k, const char *a, int lda,
               const char *b, int ldb, bint fresh, char *c, int ldc) noexcept nogil:
    """c (+)= a op(b), column-major; a is never transposed."""
    cdef char plain = b"N"
    cdef float one_f = 1, beta_f = 0 if fresh else 1
    cdef double one_d = 1, beta_d = 0 if fresh else 1
    if wide:
        dgemm(&plain, &transposed, &m, &n, &k, &one_d, <double *>a, &lda, <double *>b, &ldb,
              &beta_d, <double *>c, &ldc)
    else:
        sgemm(&plain, &transposed, &m, &n, &k, &one_f, <float *>a, &lda, <float *>b, &ldb,
              &beta_f, <float *>c, &ldc)


cdef inline void product(int wide, bint transposed, Py_ssize_t rows, Py_ssize_t red,
                         char *C, const char *B, const char *A, Py_ssize_t a_row,
                         Py_ssize_t a_red, Py_ssize_t a_ld, bint fresh) noexcept nogil:
    """C[rows][tile] (+)= A[rows][red] B[red][TILE] in pieces of at most SMALL."""
    cdef int size = 8 if wide else 4
    cdef Py_ssize_t red_step = min(red, 256)
    cdef Py_ssize_t row_step = max(1, SMALL // (TILE * max(red_step, 1)))
    cdef Py_ssize_t row = 0, at
    if red_step == 0:  # an empty sum
        red_step = 1
    while row < rows:
        row_step = min(row_step, rows - row)
        at = 0
        while at < red or (at == 0 and fresh):
            gemm(wide, b"T" if transposed else b"N", TILE, <int>row_step,
                 <int>min(red_step, red - at), B + at * TILE * size, TILE,
                 A + row * a_row + at * a_red, <int>a_ld, fresh and at == 0,
                 C + row * TILE * size, TILE)
            at += red_step
        row += row_step


cdef void scores_f32(void *S, const void *Qt, const char *K, Py_ssize_t k_stride, Py_ssize_t nk,
                     Py_ssize_t D, int nvec, const void *span, const void *prefetch) noexcept nogil:
    product(0, False, nk, D, <char *>S, <const char *>Qt, K, k_stride, 4,
            max(k_stride // 4, 1), True)


cdef void scores_f64(void *S, const void *Qt, const char *K, Py_ssize_t k_stride, Py_ssize_t nk,
                     Py_ssize_t D, int nvec, const void *span, const void *prefetch) noexcept nogil:
    product(1, False, nk, D, <char *>S, <const char *>Qt, K, k_stride, 8,
            max(k_stride // 8, 1), True)


cdef void accumulate_f32(void *acc, const void *P, const char *V, Py_ssize_t v_stride,
                         Py_ssize_t nk, Py_ssize_t Dv, int nvec,
                         const void *rescale, const void *span) noexcept nogil:
    if rescale != NULL:
        rescale_rows(<float *>acc, Dv, <const float *>rescale)
    product(0, True, Dv, nk, <char *>acc, <const char *>P, V, 4, v_stride,
            max(v_stride // 4, 1), rescale == NULL)


cdef void accumulate_f64(void *acc, const void *P, const char *V, Py_ssize_t v_stride,
                         Py_ssize_t nk, Py_ssize_t Dv, int nvec,
                         const void *rescale, const void *span) noexcept nogil:
    if rescale != NULL:
        rescale_rows(<double *>acc, Dv, <const double *>rescale)
    product(1, True, Dv, nk, <char *>acc, <const char *>P, V, 8, v_stride,
            max(v_stride // 8, 1), rescale == NULL)


cdef void rescale_rows(real *acc, Py_ssize_t rows, const real *rescale) noexcept nogil:
    """acc[d][i] *= rescale[i], where some rescale is not 1."""
    cdef Py_ssize_t d, i
    cdef bint rescales = False
    for i in range(TILE):
        rescales |= rescale[i] != 1
    if rescales:
        for d in range(rows):
            for i in range(TILE):
                acc[d * TILE + i] *= rescale[i]


def install(size_t scores, size_t accumulate, bint wide):
    """Put the products into a tile table, given the addresses of its two entries."""
    (<scores_t *>scores)[0] = scores_f64 if wide else scores_f32
    (<accumulate_t *>accumulate)[0] = accumulate_f64 if wide else accumulate_f32
