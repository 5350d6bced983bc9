"""Scaled dot-product attention on CPUs, for NumPy arrays."""

from ._backend import backend
from ._config import show_config
from ._threads import get_num_threads, set_num_threads, threads
from .attention import scaled_dot_product_attention
from .cache import KVCache
from .merge import merge_attention
from .paged import paged_attention
from .varlen import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "backend",
    "get_num_threads",
    "merge_attention",
    "paged_attention",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "threads",
    "varlen_attention",
]
