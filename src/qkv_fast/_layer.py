"""MultiHeadAttention: the layer around the op, from token vectors to token vectors."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np

from . import _layer_call, _layer_weights
from ._dtypes import BFLOAT16, CODES, FLOAT64, Array, code_of
from ._kv_cache import KVCache
from ._layer_weights import Parts, checked, rounded_weight, row_counts, weight_code
from ._options import Ints, KeyRanges, Window
from ._problem.arguments import flag, integer, real

if TYPE_CHECKING:
    from .rotary import Rotary


class LayerOptions(TypedDict, total=False):
    """Taken by `MultiHeadAttention.__call__`, as `scaled_dot_product_attention` defines them."""

    window: Window | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    attn_bias: Any
    key_ranges: KeyRanges | None
    num_threads: int | None


class MultiHeadAttention:
    r"""Multi-head attention with its projections: out = concat(heads) W_Oᵀ + b_O.

    Head i is attention(x W_Qᵢᵀ, c W_Kᵢᵀ, c W_Vᵢᵀ), where c is x itself or a context (Vaswani et al.
    2017, section 3.2.2). The weights have the names and shapes of torch.nn.MultiheadAttention.

    Parameters
    ----------
    embed_dim : int
        Size of a token vector, of the input and of the result.
    num_heads : int
        Query heads.
    num_kv_heads : int, optional
        Key and value heads, a divisor of `num_heads`, which is the default. Fewer are shared by
        groups of query heads (Ainslie et al. 2023).
    head_dim : int, optional
        Size of a head; ``embed_dim // num_heads`` by default.
    kdim, vdim : int, optional
        Sizes of a context's vectors for keys and values; `embed_dim` by default.
    bias : bool
        Whether the projections add a bias.
    dtype : {"float32", "float64", "float16", "bfloat16"} or dtype of NumPy or torch
        Of the weights. float64 is computed in float64, all else in float32. bfloat16 weights are
        kept as uint16.
    scale : float, optional
        Factor of the scores; 1/√head_dim by default.
    qk_norm : bool
        Whether queries and keys are divided by the root of their mean square over a head, plus
        `norm_eps`, and multiplied by a weight of shape (head_dim,) (Zhang and Sennrich 2019), as in
        Qwen 3. It comes before the rotary embedding.
    norm_eps : float
    rng : int or numpy.random.Generator, optional
        Draws the initial weights, uniformly as torch does: for the input projections from ±√(6 /
        (rows + columns)), for the output's from ±1/√columns. Biases begin at 0.

    Attributes
    ----------
    in_proj_weight : ndarray, shape ((num_heads + 2 * num_kv_heads) * head_dim, embed_dim)
        The rows of queries, keys and values, one after another; None where `kdim` or `vdim` differ
        from `embed_dim`. Then there are
    q_proj_weight, k_proj_weight, v_proj_weight : ndarray
        of shapes (num_heads * head_dim, embed_dim), (num_kv_heads * head_dim, kdim) and
        (num_kv_heads * head_dim, vdim).
    in_proj_bias : ndarray, shape ((num_heads + 2 * num_kv_heads) * head_dim,), or None
    out_proj_weight : ndarray, shape (embed_dim, num_heads * head_dim)
    out_proj_bias : ndarray, shape (embed_dim,), or None
    q_norm_weight, k_norm_weight : ndarray, shape (head_dim,), or None

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range.

    Notes
    -----
    The arrays may be changed in place. Self-attention is one product for queries, keys and values,
    which the op reads where they lie; the heads' results lie side by side as the output projection
    reads them. Nothing is transposed or copied between. The products are computed by the kernels
    of the op's scores, on its threads, or with BLAS tiles (see `backend`) by SciPy's BLAS.

    A result depends neither on the number of threads nor on other sequences of the batch, unless
    there are so few rows, at most 8 in all, that the products' sums have another order.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> layer = qkv_fast.MultiHeadAttention(64, 4, rng=0)
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), np.float32)
    >>> layer(x).shape
    (2, 10, 64)
    >>> context = np.ones((2, 7, 64), np.float32)  # cross-attention
    >>> out, weights = layer(x, context, need_weights=True)
    >>> weights.shape
    (2, 4, 10, 7)

    Token by token, with a cache of 100 tokens:

    >>> cache = layer.new_cache(batch=2, capacity=100)
    >>> prompt = layer(x, is_causal=True, cache=cache)
    >>> layer(x[:, :1], is_causal=True, cache=cache).shape, cache.lengths
    ((2, 1, 64), array([11, 11]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dtype: Any = "float32",
        scale: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        embed_dim = integer("embed_dim", embed_dim)
        num_heads = integer("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}: it must divide {num_heads}, num_heads"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim is {embed_dim}: it must be a multiple of num_heads, {num_heads}, "
                    "unless head_dim is given"
                )
            head_dim = embed_dim // num_heads
        head_dim = integer("head_dim", head_dim)
        kdim = embed_dim if kdim is None else integer("kdim", kdim)
        vdim = embed_dim if vdim is None else integer("vdim", vdim)
        code = weight_code(dtype)
        shapes = row_counts(num_heads, num_kv_heads, head_dim)
        generator = np.random.default_rng(rng)

        def draw(rows: int, columns: int, limit: float) -> Array:
            return rounded_weight(generator.uniform(-limit, limit, (rows, columns)), code)

        def fill(size: int, number: float, wanted: bool) -> Array | None:
            return rounded_weight(np.full(size, number, float), code) if wanted else None

        fused = query = key = value = None
        if kdim == vdim == embed_dim:
            rows = sum(shapes)
            fused = draw(rows, embed_dim, (6 / (rows + embed_dim)) ** 0.5)
        else:
            query, key, value = (
                draw(rows, columns, (6 / (rows + columns)) ** 0.5)
                for rows, columns in zip(shapes, (embed_dim, kdim, vdim), strict=True)
            )
        bias, qk_norm = flag("bias", bias), flag("qk_norm", qk_norm)
        parts = Parts(
            fused, query, key, value, fill(sum(shapes), 0, bias),
            draw(embed_dim, shapes[0], shapes[0] ** -0.5), fill(embed_dim, 0, bias),
            fill(head_dim, 1, qk_norm), fill(head_dim, 1, qk_norm),
        )  # fmt: skip
        self._set(parts, num_heads, num_kv_heads, scale, norm_eps)

    def _set(
        self, parts: Parts, num_heads: int, num_kv_heads: int, scale: float | None, norm_eps: float
    ) -> None:
        """Take weights over whose shapes fit."""
        self._parts = parts
        self._code = code_of(parts.output.dtype, uint16_is_bf16=True)
        self.embed_dim, width = parts.output.shape
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.kdim = self.embed_dim if parts.key is None else parts.key.shape[1]
        self.vdim = self.embed_dim if parts.value is None else parts.value.shape[1]
        self.scale = None if scale is None else real("scale", scale)
        self.norm_eps = real("norm_eps", norm_eps)
        self._rows = row_counts(num_heads, num_kv_heads, self.head_dim)
        self._real: type[np.floating[Any]] = np.float64 if self._code == FLOAT64 else np.float32

    def __repr__(self) -> str:
        facts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            facts.append(f"num_kv_heads={self.num_kv_heads}")
        facts.append(f"head_dim={self.head_dim}")
        facts += [f"{name}={getattr(self, name)}" for name in ("kdim", "vdim")
                  if getattr(self, name) != self.embed_dim]  # fmt: skip
        name = next(name for name, code in CODES.items() if code == self._code)
        facts += [f"bias={self._parts.bias is not None}", f"dtype={name}"]
        return f"<MultiHeadAttention {', '.join(facts)}>"

    in_proj_weight = property(lambda self: self._parts.fused)
    q_proj_weight = property(lambda self: self._parts.query)
    k_proj_weight = property(lambda self: self._parts.key)
    v_proj_weight = property(lambda self: self._parts.value)
    in_proj_bias = property(lambda self: self._parts.bias)
    out_proj_weight = property(lambda self: self._parts.output)
    out_proj_bias = property(lambda self: self._parts.output_bias)
    q_norm_weight = property(lambda self: self._parts.query_norm)
    k_norm_weight = property(lambda self: self._parts.key_norm)

    # --- Weights in and out -----------------------------------------------------------------------

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        num_heads: int,
        *,
        prefix: str = "",
        scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> MultiHeadAttention:
        """Return the layer of a state dict: arrays, or tensors of torch, by their names.

        Parameters
        ----------
        state : mapping of str to array
            Other names than those of the layer are ignored. The family is found by the names:

            ==========  =======================================  ==================
            layout      queries, keys, values                    output
            ==========  =======================================  ==================
            torch       in_proj_weight; q_proj_weight, ...       out_proj
            bert        self.query, self.key, self.value         output.dense
            gpt2        c_attn, one matrix, (inputs, features)   c_proj, transposed
            llama       q_proj, k_proj, v_proj                   o_proj
            bart        q_proj, k_proj, v_proj                   out_proj
            vit         attention.query, ...                     output.dense
            distilbert  q_lin, k_lin, v_lin                      out_lin
            ==========  =======================================  ==================

            with ".weight" and ".bias" behind each, and for all of them q_norm.weight and
            k_norm.weight where there are such.
        num_heads : int
            Query heads. Those of keys and values, and the size of a head, follow from the shapes.
        prefix : str
            What stands before the layer's names, as "encoder.layer.0.attention".
        scale, norm_eps
            As in `MultiHeadAttention`.

        Returns
        -------
        MultiHeadAttention
            In one matrix for queries, keys and values, so those of separate ones are copied.
            Other weights are shared with the state where they can be.

        Raises
        ------
        TypeError, ValueError
            Weights that are missing, or whose shapes or dtypes don't fit.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> names = [f"{part}_proj.weight" for part in "qkvo"]
        >>> state = {f"model.layers.3.self_attn.{name}": np.eye(8, dtype="f4") for name in names}
        >>> qkv_fast.MultiHeadAttention.from_state_dict(state, 2, prefix="model.layers.3.self_attn")
        <MultiHeadAttention embed_dim=8, num_heads=2, head_dim=4, bias=False, dtype=float32>
        """
        num_heads = integer("num_heads", num_heads)
        parts = _layer_weights.read(state, prefix)
        layer = cls.__new__(cls)
        layer._set(*checked(parts, num_heads), scale, norm_eps)
        return layer

    def state_dict(self, layout: str = "torch", *, prefix: str = "") -> dict[str, Array]:
        """Return the weights by the names of a layout, which `from_state_dict` lists.

        Parameters
        ----------
        layout : str
            "torch" by default.
        prefix : str
            Put before each name, with a dot between.

        Returns
        -------
        dict of str to ndarray
            The layer's own arrays or views of them; bfloat16 as uint16.

        Raises
        ------
        ValueError
            An unknown layout, or one that can't hold the weights.
        """
        return _layer_weights.named(self._parts, self._rows, layout, prefix)

    @classmethod
    def from_safetensors(
        cls, path: str | PathLike[str], num_heads: int, *, prefix: str = "", **options: Any
    ) -> MultiHeadAttention:
        """Return the layer whose weights a safetensors file has under a prefix.

        Parameters
        ----------
        path : path
            Only the weights under the prefix are read. Needs the package safetensors, and ml_dtypes
            for bfloat16.
        num_heads, prefix, **options
            As in `from_state_dict`.
        """
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            state = {name: file.get_tensor(name) for name in names}
        return cls.from_state_dict(state, num_heads, prefix=prefix, **options)

    def save_safetensors(
        self, path: str | PathLike[str], layout: str = "torch", *, prefix: str = ""
    ) -> None:
        """Write the weights to a safetensors file, which must not hold anything else.

        Parameters
        ----------
        path : path
        layout, prefix
            As in `state_dict`. Needs the package safetensors, and ml_dtypes for bfloat16.
        """
        from safetensors.numpy import save_file

        state = self.state_dict(layout, prefix=prefix)
        if self._code == BFLOAT16:
            import ml_dtypes

            state = {name: array.view(ml_dtypes.bfloat16) for name, array in state.items()}
        save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)

    # --- The layer --------------------------------------------------------------------------------

    def new_cache(self, batch: int, capacity: int, **options: Any) -> KVCache:
        """Return an empty cache for this layer's keys and values.

        Parameters
        ----------
        batch, capacity : int
            Sequences, and tokens that each can have.
        **options
            dtype, page_size, num_pages and window, as in `KVCache`.
        """
        options = {"dtype": "float64" if self._code == FLOAT64 else "float32"} | options
        return KVCache(batch, self.num_kv_heads, capacity, self.head_dim, **options)

    @overload
    def __call__(
        self,
        x: Any,
        context: Any = ...,
        *,
        is_causal: bool = ...,
        attn_mask: Any = ...,
        key_padding_mask: Any = ...,
        cache: KVCache | None = ...,
        rotary: Rotary | None = ...,
        positions: Ints | None = ...,
        out: Any = ...,
        need_weights: Literal[False] = ...,
        **options: Unpack[LayerOptions],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: Any,
        context: Any = ...,
        *,
        is_causal: bool = ...,
        attn_mask: Any = ...,
        key_padding_mask: Any = ...,
        cache: KVCache | None = ...,
        rotary: Rotary | None = ...,
        positions: Ints | None = ...,
        out: Any = ...,
        need_weights: Literal[True],
        **options: Unpack[LayerOptions],
    ) -> tuple[Array, Array]: ...

    def __call__(
        self,
        x: Any,
        context: Any = None,
        *,
        is_causal: bool = False,
        attn_mask: Any = None,
        key_padding_mask: Any = None,
        cache: KVCache | None = None,
        rotary: Rotary | None = None,
        positions: Ints | None = None,
        out: Any = None,
        need_weights: bool = False,
        **options: Unpack[LayerOptions],
    ) -> Array | tuple[Array, Array]:
        """Compute the layer.

        Parameters
        ----------
        x : array, shape (batch, L, embed_dim) or (L, embed_dim)
            Token vectors that ask: float32, float64, float16 or bfloat16, whatever the weights are.
        context : array (batch, Lk, kdim), pair of arrays, or KVCache, optional
            What is looked at: by default x itself. A pair is for keys (batch, Lk, kdim) and values
            (batch, Lk, vdim). A cache is one that `fill` has made of a context, for a decoder that
            looks at the same context at each step.
        is_causal : bool
            A token sees none after it. With a cache the last token sees all.
        attn_mask : array, broadcastable to (batch, num_heads, L, Lk), optional
            Boolean: True where a token may look, as in `scaled_dot_product_attention`, which is the
            opposite of torch.nn.MultiheadAttention's. Floating: added to the scores.
        key_padding_mask : array of bool, shape (batch, Lk) or (Lk,), optional
            True where a key is padding, as in torch.nn.MultiheadAttention. It is excluded.
        cache : KVCache, optional
            For self-attention token by token: keys and values of x are appended, and x looks at all
            that the cache then has.
        rotary : Rotary, optional
            Rotates queries and keys by their positions. Not with a context.
        positions : ints, broadcastable to (batch, L), optional
            For `rotary`: by default 0, 1, ... behind the tokens that the cache has.
        out : ndarray or tensor of the result's shape and dtype, optional
            Where the result goes. It may be x, or overlap any input.
        need_weights : bool
            Also return what each head gives each key.
        window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, num_threads
            As in `scaled_dot_product_attention`.

        Returns
        -------
        result : ndarray, shape of x
            `out`, or a new array: float32, float64 for such weights, and x's dtype where that has
            16 bits.
        weights : ndarray, shape (batch, num_heads, L, Lk) or (num_heads, L, Lk)
            With `need_weights`.

        Raises
        ------
        TypeError, ValueError
            Shapes and dtypes that don't fit. `out` is untouched, and so is the cache unless it has
            a window and gave pages back.
        """
        call = _layer_call.Call(
            self, x, context, cache, rotary, positions, (attn_mask, key_padding_mask), out,
            {**options, "is_causal": is_causal},
        )  # fmt: skip
        result, weights = call.run(flag("need_weights", need_weights))
        return result if weights is None else (result, weights)

    def fill(self, cache: KVCache, context: Any) -> None:
        """Append a context's keys and values to a cache, to be given as `context` later.

        Parameters
        ----------
        cache : KVCache
            As `new_cache` returns.
        context : array (batch, Lk, kdim), or pair of arrays for keys and values
        """
        key, value = _layer_call.context_pair(self, context)
        _layer_call.check_cache(self, cache, len(key))
        heads = _layer_call.project(self, (None, key, value), None)
        _layer_call.place(self, heads, None, 0)
        cache.append(heads.key, heads.value)
