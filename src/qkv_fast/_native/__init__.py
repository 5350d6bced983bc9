"""Engine "native", in Cython over the C kernels of csrc/.

Each module stands below those that import it:

    shortcut        attend(), attend_tensors(): a plain dense call, from its arrays to its answer
    stored_shortcut  attend_pages(), attend_cache(): the same for stored keys
      tensor_views  tensors of torch as arrays
      engine        Runner: a call, and its scratch
      plan          Problem -> Plan: views, block sizes, tasks, scratch layout
      schedule      batch entries -> tasks
        prefill     many query rows: tiles over blocks of keys
        decode      few query rows: splits of the keys, heads interleaved
        weights     the weights or scores themselves: prefill's tiles, written out
        linear      the products around attention, by the kernels of scores
        merge       results over parts of the keys into that over all of them
        statistics  sums of the weights over queries or keys: prefill's tiles, never written out
          query_tile      the rows of a tile of queries
          scores          visibility and score modifiers
          softmax_state   (row_max, row_sum, acc): weighing, folding, merging
          rows, key_runs  key and value rows: in pages or not, gathered, prefetched
      parallel      threads and signals
      isa, blas     kernel tables: SIMD's, and those with SciPy's GEMM
    probes          what the machine can do at most, for benchmarks

Declarations that all of them share:

    types.pxd       the structures that these hand to each other
    tuning.pxd      every tuned number, with the benchmark that chose it
    shared.pxd      counts, flags and locks that Python threads share
    kernels.pxd     the C headers
"""

from .engine import Runner, kept_scratch, release_scratch
from .isa import best_isa, compiler, isas
from .parallel import assume_cpus, limit_cpus, notify_call_start, team_calls, threading
from .probes import fma_peak, read_bandwidth, read_once
from .shortcut import attend, attend_tensors, connect
from .stored_shortcut import attend_cache, attend_pages

__all__ = [
    "Runner",
    "assume_cpus",
    "attend",
    "attend_cache",
    "attend_pages",
    "attend_tensors",
    "best_isa",
    "connect",
    "fma_peak",
    "info",
    "isas",
    "kept_scratch",
    "limit_cpus",
    "notify_call_start",
    "read_bandwidth",
    "read_once",
    "release_scratch",
    "team_calls",
]


def info() -> dict[str, str]:
    """Return facts about this build, for show_config()."""
    return {"compiler": compiler(), "threading": threading()}
