"""The kernel tables of this build, by instruction set (ISA) and element type."""

from .kernels cimport (
    QKV_FLOAT32, qkv_isa_is_profitable, qkv_isa_name, qkv_isa_runs, qkv_tile_kernels,
    qkv_tile_table,
)

cdef extern from *:
    """
    #if defined(__clang__)
    #define QKV_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define QKV_COMPILER "gcc " __VERSION__
    #else
    #define QKV_COMPILER "unknown"
    #endif
    """
    const char *QKV_COMPILER

cdef int count_isas() noexcept:
    """Return how many ISAs this build has tables for."""
    cdef int count = 0
    while qkv_isa_name(count) != NULL:
        count += 1
    return count


cdef dict executable = {                # the index of an ISA by its name
    qkv_isa_name(index).decode(): index for index in range(count_isas()) if qkv_isa_runs(index)}


cdef dict best_isas = {}                # by element type, as far as they were asked for


cdef int index_of(str isa) except -1:
    """Return the index of an ISA that this machine can execute."""
    return executable[isa]


cdef const qkv_tile_kernels *table_of(int index, int type) noexcept nogil:
    """Return an ISA's kernels for an element type: those for float where it has no others."""
    cdef const qkv_tile_kernels *kernels = qkv_tile_table(index, type)
    return qkv_tile_table(index, QKV_FLOAT32) if kernels == NULL else kernels


cdef int index_of_best(int type) noexcept:
    """Return the index of the weakest ISA that has the fastest kernels for an element type."""
    cdef int index, best = 0
    for index in range(count_isas()):
        if qkv_isa_is_profitable(index) and table_of(index, type) != table_of(best, type):
            best = index
    return best


def isas():
    """Return the names of the ISAs that this machine can execute, weakest first."""
    return tuple(executable)


def best_isa(int type):
    """Return the name of the weakest ISA that has the fastest kernels for an element type.

    Virtual machines take 100 us and more to answer what a CPU can do: it is asked once.
    """
    if type not in best_isas:
        best_isas[type] = qkv_isa_name(index_of_best(type)).decode()
    return best_isas[type]


def compiler():
    """Return the name and version of the C compiler."""
    return QKV_COMPILER.decode()
