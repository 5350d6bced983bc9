"""Pictures of attention weights. Import it by name: ``import qkv_fast.plot``.

    terminal(weights, tokens)      text for a terminal; needs nothing else
    heat_map(weights, tokens)      a matplotlib figure of one head, or of a grid of heads
    entropy_map(weights)           a matplotlib figure: how spread each head of each layer is
    view(weights, tokens)          one HTML page to explore all heads of all layers, offline

The last axes of `weights` are (queries, keys). `tokens` names the queries; `context_tokens` names
the keys where they are other tokens, as in cross-attention.
"""

from .heat_map import entropy_map, heat_map
from .terminal import terminal
from .view import View, view

__all__ = ["View", "entropy_map", "heat_map", "terminal", "view"]

for _name in __all__:  # help and reprs then name the package; a module bears its function's name
    globals()[_name].__module__ = __name__
