"""Scaled dot-product attention on CPUs, for NumPy arrays and what NumPy can view.

The main function, and its call:

    scaled_dot_product_attention(query, key, value, is_causal=True)
        softmax(query @ key.T * scale + bias) @ value for every head; the names are torch's.

The others, by task:

    sequences of different lengths
        varlen_attention     packed one after another, without padding
        paged_attention      keys and values spread over pages
    a decoder's keys and values, token by token
        KVCache              stores them, grows, forks and truncates them, and attends to them
    what a head looks at
        attention_weights    the weights and scores themselves, of all rows or of some
    from token vectors to token vectors
        MultiHeadAttention   the layer: projections around the op
    keys in several parts
        merge_attention      combines the results over the parts into that over all keys
    settings
        threads, set_num_threads, get_num_threads      how many threads a call may use
        backend              which engine and instruction set compute
        available_backends   what there is to choose from on this machine
        release_scratch      gives back the memory that is kept between calls
        show_config          what is installed and in force, for a bug report

``help`` of each name has its parameters and an example.
"""

import sys as _sys

from ._attention import scaled_dot_product_attention
from ._config import show_config
from ._kv_cache import KVCache
from ._layer import MultiHeadAttention
from ._merge import merge_attention
from ._paged import paged_attention
from ._scratch import release_scratch
from ._select import available_backends, backend
from ._threads import get_num_threads, set_num_threads, threads
from ._varlen import varlen_attention
from ._weights import attention_weights

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "attention_weights",
    "available_backends",
    "backend",
    "get_num_threads",
    "merge_attention",
    "paged_attention",
    "release_scratch",
    "scaled_dot_product_attention",
    "set_num_threads",
    "show_config",
    "threads",
    "varlen_attention",
]

for _name in __all__:  # help, reprs and pickles then name the package, not a private module
    globals()[_name].__module__ = __name__

if "threadpoolctl" in _sys.modules:
    from .integrations.threadpoolctl import register as _register

    _register()
