"""What the machine can do at most, for benchmarks to compare with: multiply-adds, and reading."""

import time

cimport numpy as cnp
from libc.stdint cimport uint64_t

from .isa cimport index_of, index_of_best, table_of
from .kernels cimport QKV_FLOAT32, qkv_tile_kernels
from .parallel cimport run_tasks
from .shared cimport flag

cnp.import_array()

cdef enum:
    FMA_ROUNDS = 100_000                # of a task
    WORDS_PER_TASK = 1 << 17

cdef struct Memory:
    const uint64_t *words
    Py_ssize_t count

cdef flag last_sum = 0


cdef void chain_multiply_adds(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const qkv_tile_kernels *kernels = <const qkv_tile_kernels *>context
    if kernels.enter != NULL:
        kernels.enter()
    kernels.fma_chain(FMA_ROUNDS)
    if kernels.leave != NULL:
        kernels.leave()


def fma_peak(int threads, double seconds=0.2, int type=QKV_FLOAT32, str isa=None):
    """Return the GFLOP/s of multiply-adds in registers, as the kernels for a type do them."""
    cdef int index = index_of(isa) if isa else index_of_best(type)
    cdef const qkv_tile_kernels *kernels = table_of(index, type)
    rounds = 0
    begin = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        with nogil:
            run_tasks(chain_multiply_adds, kernels, 8 * threads, threads, NULL, NULL, False)
        rounds += 1
        elapsed = time.perf_counter() - begin
    return 8e-9 * threads * rounds * FMA_ROUNDS * kernels.fma_chain_flop / elapsed


cdef void read_words(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const Memory *memory = <const Memory *>context
    cdef Py_ssize_t i = task * WORDS_PER_TASK
    cdef uint64_t total = 0
    global last_sum
    for i in range(i, min(memory.count, i + WORDS_PER_TASK)):
        total += memory.words[i]
    last_sum = <int>total               # so that the compiler leaves the loop in


def read_once(arrays, int threads):
    """Return the seconds in which the threads read contiguous arrays and do nothing else."""
    cdef Memory memory
    cdef cnp.ndarray array
    begin = time.perf_counter()
    for array in arrays:
        memory.words = <const uint64_t *>cnp.PyArray_DATA(array)
        memory.count = cnp.PyArray_NBYTES(array) // 8
        with nogil:
            run_tasks(read_words, &memory, (memory.count + WORDS_PER_TASK - 1) // WORDS_PER_TASK,
                      threads, NULL, NULL, False)
    return time.perf_counter() - begin


def read_bandwidth(int threads, double seconds=0.2, Py_ssize_t megabytes=256):
    """Return the GB/s at which the threads read so many MiB again and again."""
    cdef cnp.npy_intp size = megabytes << 17
    cdef cnp.ndarray array = cnp.PyArray_ZEROS(1, &size, cnp.NPY_UINT64, 0)
    array.fill(0)                       # touched, so that each page is memory of its own
    rounds = 0
    elapsed = 0.0
    while elapsed < seconds:
        elapsed += read_once([array], threads)
        rounds += 1
    return rounds * megabytes * 2.0 ** 20 / elapsed / 1e9
