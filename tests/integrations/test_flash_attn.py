"""The shim of flash_attn against that package's documented rules, written out in NumPy."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_error_at_most_twice

import qkv_fast

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed")

import qkv_fast.integrations.flash_attn as shim  # noqa: E402

DTYPES = ["float32", "float64", "float16", "bfloat16"]
SEEDS = 300


@pytest.fixture(params=["python", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native":
        request.getfixturevalue("native")
    with qkv_fast.backend(request.param):
        yield


def array(x: Any) -> np.ndarray:
    """Return a tensor as an array, of ml_dtypes for bfloat16."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, real: Any, *, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = (-1, -1), softcap: float = 0.0, slopes: Any = None,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return out (Lq, Hq, Dv) and lse (Hq, Lq) of one sequence, whose first keys are padding."""
    q, k, v = (x.astype(real) for x in (q, k, v))
    q_len, heads, size = q.shape
    k_len, groups = len(k), heads // k.shape[1] if k.shape[1] else 1
    out, lse = np.zeros((q_len, heads, v.shape[2]), real), np.full((heads, q_len), -np.inf, real)
    scale = real(size**-0.5 if softmax_scale is None else softmax_scale)
    for h in range(heads):
        for i in range(q_len):
            at = i + k_len - q_len  # the last query stands at the last key
            left = 0 if window_size[0] < 0 else at - window_size[0]
            right = k_len - 1 if window_size[1] < 0 else at + window_size[1]
            right = min(right, at) if causal else right
            seen = np.arange(max(left, first, 0), min(right, k_len - 1) + 1)
            if not len(seen):
                continue
            s = k[seen, h // groups] @ q[i, h] * scale
            if softcap > 0:
                s = real(softcap) * np.tanh(s / real(softcap))
            if slopes is not None:
                s = s - real(slopes[h]) * np.abs(at - seen).astype(real)
            weights = np.exp(s - s.max())
            out[i, h] = weights / weights.sum() @ v[seen, h // groups]
            lse[h, i] = s.max() + np.log(weights.sum())
    return out, lse


def rotated(x: np.ndarray, cos: Any, sin: Any, positions: Any, interleaved: bool) -> np.ndarray:
    """Return (length, heads, size) rotated by the rows of cos and sin at its positions."""
    y = x.astype(np.float64)
    pairs = cos.shape[1]
    for j in range(pairs):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + pairs)
        c, s = (t[positions, j].astype(np.float64)[:, None] for t in (cos, sin))
        y[..., a], y[..., b] = y[..., a] * c - y[..., b] * s, y[..., a] * s + y[..., b] * c
    return y.astype(x.dtype)


class Draw:
    """A random configuration, and the check of its answer."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.dtype = str(rng.choice(DTYPES))
        self.batch = int(rng.integers(1, 4))
        self.kv_heads = int(rng.integers(1, 3))
        self.heads = self.kv_heads * int(rng.integers(1, 4))
        self.size = 2 * int(rng.integers(1, 20))
        self.v_size = self.size if rng.random() < 0.7 else int(rng.integers(1, 20))
        self.options: dict[str, Any] = {"causal": bool(rng.random() < 0.5)}
        if rng.random() < 0.4:
            window = tuple(int(x) for x in rng.integers(-1, 12, 2))
            self.options["window_size"] = window
        if rng.random() < 0.3:
            self.options["softcap"] = float(rng.choice([0.0, 1.5, 30.0]))
        if rng.random() < 0.3:
            self.options["softmax_scale"] = float(rng.choice([0.0, -0.3, 0.5]))
        self.slopes = None
        if rng.random() < 0.3:
            shape = (self.heads,) if rng.random() < 0.5 else (self.batch, self.heads)
            self.slopes = torch.from_numpy(rng.random(shape, np.float32))
            self.options["alibi_slopes"] = self.slopes
        self.wants_lse = bool(rng.random() < 0.5)

    def tensor(self, *shape: int) -> Any:
        x = torch.from_numpy(self.rng.standard_normal(shape)).to(getattr(torch, self.dtype))
        if self.rng.random() < 0.3:  # other strides
            x = torch.stack((x, x), -2).flatten(-2)[..., : x.shape[-1]]
        return x

    def ints(self, low: int, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(low, high, shape).astype(np.int32)

    def check(self, sequences: list[tuple[Any, ...]], out: list[Any], lse: list[Any]) -> None:
        """Compare out (Lq, Hq, Dv) and lse (Hq, Lq) of each sequence (q, k, v, first)."""
        options = {name: x for name, x in self.options.items() if name != "alibi_slopes"}
        for i, (q, k, v, first) in enumerate(sequences):
            slopes = self.slopes
            if slopes is not None:
                slopes = (slopes[i] if slopes.dim() == 2 else slopes).numpy().astype(np.float64)
            more = {**options, "slopes": slopes, "first": first}
            exact, exact_lse = reference(q, k, v, np.float64, **more)
            real = np.float64 if self.dtype == "float64" else np.float32
            plain, plain_lse = reference(q, k, v, real, **more)
            actual = array(out[i])
            # A score is no more exact than the last place of its largest term.
            largest = 0.0 if slopes is None else float(slopes.max()) * (len(q) + len(k))
            largest += self.options.get("softcap", 0.0)
            assert_error_at_most_twice(actual, plain.astype(actual.dtype), exact, largest)
            if self.wants_lse:
                assert lse[i].dtype == (torch.float64 if real is np.float64 else torch.float32)
                if self.dtype == "bfloat16":  # units that multiply pairs round it to 3e-6
                    np.testing.assert_allclose(lse[i].numpy(), exact_lse, rtol=1e-6, atol=4e-6)
                else:
                    assert_error_at_most_twice(lse[i].numpy(), plain_lse, exact_lse, largest)


def draw_dense(draw: Draw) -> None:
    b, h = draw.batch, draw.heads
    q_len, k_len = (int(n) for n in draw.ints(0, 40, 2))
    q = draw.tensor(b, q_len, h, draw.size)
    k = draw.tensor(b, k_len, draw.kv_heads, draw.size)
    v = draw.tensor(b, k_len, draw.kv_heads, draw.v_size)
    more = {**draw.options, "return_attn_probs": draw.wants_lse}
    kind = draw.rng.integers(3)
    if kind == 1:
        v = draw.tensor(b, k_len, draw.kv_heads, draw.size)
        answer = shim.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **more)
    elif kind == 2:
        q, k, v = draw.tensor(3, b, q_len, h, draw.size)
        answer = shim.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **more)
    else:
        answer = shim.flash_attn_func(q, k, v, **more)
    out, lse, mask = answer if draw.wants_lse else (answer, [], torch.empty(0))
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.is_contiguous()
    assert mask.numel() == 0
    draw.check([(array(q[i]), array(k[i]), array(v[i]), 0) for i in range(b)], list(out), list(lse))


def starts_of(lengths: np.ndarray) -> Any:
    return torch.from_numpy(np.concatenate(([0], lengths)).cumsum().astype(np.int32))


def pages_of(draw: Draw, blocks: int) -> tuple[Any, Any, Any]:
    """Return pages of keys and values, and a table in which no page comes twice."""
    page_size, count = int(draw.ints(1, 9)), draw.batch * blocks + 2
    k = draw.tensor(count, page_size, draw.kv_heads, draw.size)
    v = draw.tensor(count, page_size, draw.kv_heads, draw.v_size)
    table = draw.rng.permutation(count)[: draw.batch * blocks].reshape(draw.batch, blocks)
    return k, v, torch.from_numpy(table.astype(np.int32))


def draw_packed(draw: Draw) -> None:
    q_lengths = draw.ints(0, 20, draw.batch)
    starts_q = starts_of(q_lengths)
    q = draw.tensor(int(starts_q[-1]), draw.heads, draw.size)
    more: dict[str, Any] = {**draw.options, "return_attn_probs": draw.wants_lse}
    kind = draw.rng.integers(4)
    if kind == 1:
        k, v, table = pages_of(draw, 4)
        k_lengths = draw.ints(0, 4 * k.shape[1] + 1, draw.batch)
        starts_k = starts_of(k_lengths)
        more["block_table"] = table
        keys = [array(k[t.long()].flatten(0, 1)[:n]) for t, n in zip(table, k_lengths, strict=True)]
        values = [array(v[t.long()].flatten(0, 1)[:n])
                  for t, n in zip(table, k_lengths, strict=True)]  # fmt: skip
    else:
        k_lengths = q_lengths if kind == 2 else draw.ints(0, 20, draw.batch)
        starts_k = starts_of(k_lengths)
        v_size = draw.v_size if kind == 0 else draw.size
        k = draw.tensor(int(starts_k[-1]), draw.kv_heads, draw.size)
        v = draw.tensor(int(starts_k[-1]), draw.kv_heads, v_size)
        if kind == 2:
            k, v = draw.tensor(2, len(q), draw.heads, draw.size)
        bounds = range(draw.batch)
        keys, values = ([array(x[starts_k[i] : starts_k[i + 1]]) for i in bounds] for x in (k, v))
    lengths = int(q_lengths.max()), int(k_lengths.max())
    if kind == 2:
        answer = shim.flash_attn_varlen_qkvpacked_func(
            torch.stack((q, k, v), 1), starts_q, lengths[0], **more
        )
    elif kind == 3:
        answer = shim.flash_attn_varlen_kvpacked_func(
            q, torch.stack((k, v), 1), starts_q, starts_k, *lengths, **more
        )
    else:
        answer = shim.flash_attn_varlen_func(q, k, v, starts_q, starts_k, *lengths, **more)
    out, lse, _ = answer if draw.wants_lse else (answer, None, None)
    assert out.is_contiguous()
    spans = [slice(starts_q[i], starts_q[i + 1]) for i in range(draw.batch)]
    if draw.wants_lse:
        assert lse.shape == (draw.heads, len(q))
    draw.check(
        [(array(q[s]), keys[i], values[i], 0) for i, s in enumerate(spans)],
        [out[s] for s in spans],
        [lse[:, s] for s in spans] if draw.wants_lse else [],
    )


def draw_cached(draw: Draw) -> None:
    rng, b = draw.rng, draw.batch
    q_len = int(draw.ints(1, 6))
    q = draw.tensor(b, q_len, draw.heads, draw.size)
    more: dict[str, Any] = {**draw.options, "return_softmax_lse": draw.wants_lse}
    in_pages = rng.random() < 0.4
    if in_pages:
        k_cache, v_cache, table = pages_of(draw, 5)
        room = 5 * k_cache.shape[1]
        more["block_table"] = table
    else:
        cached, room = b + int(rng.integers(0, 3)), int(draw.ints(5, 50))
        k_cache = draw.tensor(cached, room, draw.kv_heads, draw.size)
        v_cache = draw.tensor(cached, room, draw.kv_heads, draw.v_size)
        table = torch.arange(b, dtype=torch.int32)[:, None]
        if rng.random() < 0.5 or cached > b:
            rows = rng.permutation(cached)[:b].astype(np.int32)
            more["cache_batch_idx"] = torch.from_numpy(rows)
            table = more["cache_batch_idx"][:, None]
    new = int(draw.ints(0, 5)) if rng.random() < 0.6 else None
    lengths = draw.ints(0, room - (new or 0) + 1, b)
    kind = rng.integers(3) if new is None else rng.integers(1, 3)
    if kind == 0:
        lengths[:] = room
    elif kind == 1:
        lengths[:] = lengths[0]
        more["cache_seqlens"] = int(lengths[0])
    else:
        more["cache_seqlens"] = torch.from_numpy(lengths)
    first = np.zeros(b, int)
    if not in_pages and rng.random() < 0.3:
        first = (rng.random(b) * (lengths + 1)).astype(int)
        more["cache_leftpad"] = torch.from_numpy(first.astype(np.int32))

    queries = [array(x).copy() for x in q]

    def held(cache: Any) -> list[np.ndarray]:
        return [array(cache[row.long()].flatten(0, 1)).copy() for row in table]

    keys, values = held(k_cache), held(v_cache)
    if new is not None:
        more["k"] = k = draw.tensor(b, new, draw.kv_heads, draw.size)
        more["v"] = v = draw.tensor(b, new, draw.kv_heads, draw.v_size)
        added = [array(x).copy() for x in k]
        if rng.random() < 0.5:
            pairs = int(rng.integers(1, draw.size // 2 + 1))
            angles = torch.from_numpy(rng.random((room + q_len, pairs)) * 6)
            interleaved = bool(rng.random() < 0.5)
            cos, sin = (x.to(q.dtype) for x in (angles.cos(), angles.sin()))
            more |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
            moves = draw.options["causal"] or draw.options.get("window_size", (-1, -1)) != (-1, -1)
            tables = array(cos), array(sin)
            for i, n in enumerate(lengths):
                at = n + np.arange(q_len) * moves
                queries[i] = rotated(queries[i], *tables, at, interleaved)
                added[i] = rotated(added[i], *tables, n + np.arange(new), interleaved)
        for i, n in enumerate(lengths):
            keys[i][n : n + new] = added[i]
            values[i][n : n + new] = array(v[i])
        lengths = lengths + new
    kept = {name: x.clone() for name, x in more.items() if isinstance(x, torch.Tensor)}
    answer = shim.flash_attn_with_kvcache(q, k_cache, v_cache, **more)
    for name, x in kept.items():
        assert torch.equal(x, more[name]), name
    for mine, expected in ((held(k_cache), keys), (held(v_cache), values)):
        for x, y in zip(mine, expected, strict=True):
            eps = 2.0**-7 if draw.dtype == "bfloat16" else float(np.finfo(x.dtype).eps)
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=0, atol=4 * eps)
    out, lse = answer if draw.wants_lse else (answer, [])
    assert out.is_contiguous()
    # Rotated keys may differ in their last place: the answer is judged by those in the cache.
    keys, values = held(k_cache), held(v_cache)
    if "rotary_cos" in more and draw.dtype not in ("float32", "float64"):
        return
    draw.check(
        [(queries[i], keys[i][:n], values[i][:n], int(first[i])) for i, n in enumerate(lengths)],
        list(out), list(lse))  # fmt: skip


KINDS = {"dense": draw_dense, "packed": draw_packed, "cached": draw_cached}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(0, SEEDS, 10))
def test_the_documented_rules(engine, kind, seed):
    for i in range(10):
        KINDS[kind](Draw(1000 * list(KINDS).index(kind) + seed + i))


SIGNATURES = {  # as flash_attn 2.8 documents them; a letter stands for a default
    "flash_attn_func": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes "
    "deterministic return_attn_probs",
    "flash_attn_qkvpacked_func": "qkv dropout_p softmax_scale causal window_size softcap "
    "alibi_slopes deterministic return_attn_probs",
    "flash_attn_kvpacked_func": "q kv dropout_p softmax_scale causal window_size softcap "
    "alibi_slopes deterministic return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
    "softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs "
    "block_table",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p softmax_scale causal "
    "window_size softcap alibi_slopes deterministic return_attn_probs",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens "
    "cache_batch_idx cache_leftpad block_table softmax_scale causal window_size softcap "
    "rotary_interleaved alibi_slopes num_splits return_softmax_lse",
}
DEFAULTS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
    "block_table": None, "k": None, "v": None, "rotary_cos": None, "rotary_sin": None,
    "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None,
    "rotary_interleaved": True, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults(name):
    assert sorted(shim.__all__) == sorted(SIGNATURES)
    parameters = inspect.signature(getattr(shim, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == DEFAULTS[parameter.name], parameter.name
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert len(required) == len(parameters) - sum(
        n in DEFAULTS and not (n in "kv" and name != "flash_attn_with_kvcache") for n in parameters
    )


def test_nothing_is_copied_and_the_cache_is_the_callers(engine, monkeypatch):
    seen: list[int] = []
    for name in ("scaled_dot_product_attention", "paged_attention", "varlen_attention"):
        function = getattr(qkv_fast, name)

        def note(*arguments: Any, function: Any = function, **options: Any) -> Any:
            seen.extend(x.data_ptr() for x in (*arguments[:3], options["out"]))
            return function(*arguments, **options)

        monkeypatch.setattr(qkv_fast, name, note)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    given = [x.data_ptr() for x in (q, k, v)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    rows, starts = torch.tensor([1, 0]), torch.tensor([0, 5, 10])
    for call in (
        lambda: shim.flash_attn_func(q, k, v),
        lambda: shim.flash_attn_with_kvcache(q, k, v, cache_batch_idx=rows),
        lambda: shim.flash_attn_varlen_func(*packed, starts, starts, 5, 5),
    ):
        seen.clear()
        answer = call()
        assert seen == [*given, answer.data_ptr()]


def cache(**more: Any) -> Any:
    q, k, v = torch.randn(3, 2, 4, 2, 8)
    tables = {"rotary_cos": torch.zeros(3, 2), "rotary_sin": torch.zeros(3, 2)}
    given = {"k": k, "v": v, "cache_seqlens": 1, **(tables if "rotary" in more else {})}
    given |= {name: x for name, x in more.items() if name != "rotary"}
    return shim.flash_attn_with_kvcache(q, torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 8),
                                        **given)  # fmt: skip


def x(*shape: int) -> Any:
    return torch.zeros(shape)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "dropout": (lambda: shim.flash_attn_func(*x(3, 1, 2, 1, 4), 0.1), ValueError, "dropout_p is"),
    "grad": (lambda: shim.flash_attn_func(x(1, 2, 1, 4), x(1, 2, 1, 4).requires_grad_(),
                                          x(1, 2, 1, 4)), TypeError, r"k is .*k\.detach"),
    "array": (lambda: shim.flash_attn_func(*np.zeros((3, 1, 2, 1, 4))), TypeError, "must be a te"),
    "axes": (lambda: shim.flash_attn_func(*x(3, 2, 1, 4)), ValueError, r"q has shape \(2, 1, 4\)"),
    "batch": (lambda: shim.flash_attn_func(x(2, 2, 1, 4), *x(2, 1, 2, 1, 4)), ValueError, "axis 0"),
    "qkv": (lambda: shim.flash_attn_qkvpacked_func(x(1, 2, 2, 1, 4)), ValueError, "length, 3, hea"),
    "no lengths": (lambda: cache(cache_seqlens=None), ValueError, "cache_seqlens is needed"),
    "no values": (lambda: cache(v=None), ValueError, "k and v must both"),
    "no room": (lambda: cache(cache_seqlens=3), ValueError, "room for 6 tokens.* 7 are needed"),
    "lengths": (lambda: cache(cache_seqlens=7), ValueError, "may have 0 to 6 tokens"),
    "number": (lambda: cache(cache_seqlens=torch.ones(3)), ValueError, "each of 2 sequences"),
    "shape of k": (lambda: cache(k=x(2, 4, 2, 7)), ValueError, r"k has shape .*\(2, new, 2, 8\)"),
    "new tokens": (lambda: cache(v=x(2, 3, 2, 8)), ValueError, "k has 4 new tokens, but v has 3"),
    "rotary": (lambda: cache(rotary=True), ValueError, "has 3 positions, but position 4 is needed"),
    "rotary alone": (lambda: cache(rotary=True, k=None, v=None), ValueError, "with new k and v"),
    "table": (lambda: cache(block_table=x(3, 1).int()), ValueError, "block_table has shape .* 2 s"),
    "pages": (lambda: cache(block_table=torch.tensor([[0], [2]])), ValueError, "from 0 to 1 only"),
    "index": (lambda: cache(cache_batch_idx=x(3).int()), ValueError, r"cache_batch_idx .*\(3,\)"),
    "both": (lambda: cache(block_table=x(2, 1).int(), cache_leftpad=x(2)), ValueError, "neither"),
    "packed pages": (lambda: shim.flash_attn_varlen_func(
        x(5, 1, 4), *x(2, 3, 2, 1, 4), torch.tensor([0, 4]), torch.tensor([0, 2]), 5, 2,
        block_table=x(1, 1).int()), ValueError, "q has 5 tokens of 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_call_leaves_the_cache_as_it_was():
    k_cache, v_cache = torch.zeros(2, 1, 4, 1, 8)
    new = torch.ones(1, 3, 1, 8)
    for wrong in ({"cache_seqlens": 2}, {"cache_seqlens": 0, "v": torch.ones(1, 3, 1, 7)}):
        with pytest.raises(ValueError, match=r"room|v has shape"):
            shim.flash_attn_with_kvcache(new, k_cache, v_cache, **{"k": new, "v": new, **wrong})
    assert not k_cache.any()
    assert not v_cache.any()


def test_parameters_of_a_model_under_no_grad():
    q = torch.ones(1, 2, 1, 4, requires_grad=True)
    with torch.no_grad():
        assert not shim.flash_attn_func(q, q, q).requires_grad


def test_docstrings():
    result = doctest.testmod(shim)
    assert result.attempted > 10
    assert result.failed == 0
