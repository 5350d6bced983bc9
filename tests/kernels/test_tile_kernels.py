"""Each kernel of each table agrees with NumPy in float64 and leaves guard rows as they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("qkv_fast._native", reason="no native engine")
pytest.importorskip("ml_dtypes")

import ml_dtypes
from tile_tables import StaleTable, Table, address, compare, declarations, pointers, tables

from qkv_fast._dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8

TABLES = tables(FLOAT32) + tables(FLOAT64)
GUARD = 1234.5
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=TABLES, ids=lambda t: f"{t.isa.decode()}-f{t.real_bytes * 8}")
def table(request: pytest.FixtureRequest) -> Table:
    return request.param


def real(table: Table) -> type:
    return np.float32 if table.real_bytes == 4 else np.float64


def widths(table: Table) -> range:
    return range(1, table.tile_q // table.lanes + 1)


def scratch(table: Table, x: np.ndarray) -> np.ndarray:
    """Return a copy of x in the table's real type, followed by a guard row."""
    out = np.full((x.shape[0] + 1, *x.shape[1:]), GUARD, real(table))
    out[:-1] = x
    return out


def close(table: Table, actual: np.ndarray, expected: np.ndarray) -> None:
    assert (actual[-1] == GUARD).all()
    eps = np.finfo(real(table)).eps
    np.testing.assert_allclose(actual[:-1], expected, rtol=40 * eps, atol=40 * eps)


def spans(bits: np.ndarray, lanes: int) -> np.ndarray:
    """Return [begin, end) of the keys that each vector of lanes needs, given [nk][ld]."""
    needed = [b.any(1).nonzero()[0] for b in np.split(bits, bits.shape[1] // lanes, axis=1)]
    return np.array([(n[0], n[-1] + 1) if n.size else (0, 0) for n in needed], np.intc)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("int a; void (*scale)(void *S, float c); int z;", r"'scale' as .*double c.*float c"),
        ("int a; void (*scale)(void *S, double c); long z;", "'z' as 'int', and the header as 'l"),
        ("int a; int b; void (*scale)(void *S, double c); int z;", "lacks the field 'b'"),
        ("int a; void (*scale)(void *S, double c); int z, y;", "lacks the field 'y'"),
        ("int a; int z;", "has the field 'scale', which the header lacks"),
        ("int a; void (*scale)(void *S, double c);", "has the field 'z', which the header lacks"),
        ("int a; int z; void (*scale)(void *S, double c);", "'scale' where the header has 'z'"),
    ],
)
def test_a_stale_table_is_refused_with_the_field(header, message):
    library = declarations("int a; void (*scale)(void *S, double c); int z;")
    compare(library, dict(library))
    with pytest.raises(StaleTable, match=message):
        compare(library, declarations(header))


SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 25, 33, 64]


def test_pack_and_store_are_transposes(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        for d in SIZES:
            rows = rng.standard_normal((ld, d)).astype(real(table))
            packed = scratch(table, np.zeros((d, ld)))
            table.pack_rows(address(packed), address(pointers(rows)), d, nvec, 0.5)
            close(table, packed, rows.T * 0.5)
            for count in {1, ld // 2 + 1, ld}:
                out = np.full((ld + 1, d + 1), GUARD, real(table))
                weight = rng.random(ld).astype(real(table))
                table.store_rows(
                    address(pointers(out)), count, address(packed), d, nvec, address(weight)
                )
                np.testing.assert_array_equal(
                    out[:count, :-1], packed[:d, :count].T * weight[:count, None]
                )
                out[:count, :-1] = GUARD
                assert (out == GUARD).all()


def test_scores_and_accumulate(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        for rows in SIZES:
            for red in (0, 1, 2, 7, 33):
                a = rng.standard_normal((rows, red + 3)).astype(real(table))
                b = rng.standard_normal((red, ld)).astype(real(table))
                c = scratch(table, np.full((rows, ld), 9.0))
                table.scores(address(c), address(b), address(a), a.strides[0], rows, red, nvec,
                             None, None)  # fmt: skip
                close(table, c, a[:, :red].astype(float) @ b)
                at = np.ascontiguousarray(a.T)
                rescale = rng.random(ld).astype(real(table))
                for rescaled in (False, True):
                    acc = scratch(table, np.full((rows, ld), 2.0))
                    table.accumulate(
                        address(acc), address(b), address(at), at.strides[0], red, rows, nvec,
                        address(rescale) if rescaled else None, None,
                    )  # fmt: skip
                    close(table, acc, at.T[:, :red].astype(float) @ b + 2 * rescale * rescaled)


def test_softmax_is_online(table, rng):
    tiny = np.finfo(real(table)).min
    for nvec in widths(table):
        ld = nvec * table.lanes
        for nk in SIZES:
            top = np.full(ld, tiny, real(table))
            total, rescale = np.zeros(ld, real(table)), np.zeros(ld, real(table))
            blocks = rng.standard_normal((3, nk, ld)) * 30
            blocks_so_far = []
            for block, limited in zip(blocks, (False, True, True), strict=True):
                allow = np.full(nk, 2**64 - 1, np.uint64)
                bits = np.ones((nk, ld), bool)
                if limited:
                    bits = rng.random((nk, ld)) > 0.5
                    allow = (bits.astype(np.uint64) << np.arange(ld, dtype=np.uint64)).sum(
                        1, dtype=np.uint64
                    )
                s = scratch(table, block)
                before = top.copy()
                span = spans(bits, table.lanes)
                table.softmax(
                    address(s), nk, nvec, address(allow) if limited else None, address(span), 1.0,
                    address(top), address(total), address(rescale),
                )  # fmt: skip
                blocks_so_far.append(
                    np.where(bits, block.astype(real(table)).astype(float), -np.inf)
                )
                exact = np.max(blocks_so_far, axis=(0, 1), initial=tiny)
                np.testing.assert_array_equal(top, exact.astype(real(table)))
                with np.errstate(over="ignore"):
                    shrunk = np.exp2((before - top).astype(float))
                np.testing.assert_allclose(
                    rescale, shrunk, rtol=20 * np.finfo(real(table)).eps, atol=1e-37
                )
                assert (np.signbit(s[:-1]) == ~bits).all()  # -0.0 marks excluded keys
                with np.errstate(all="ignore"):
                    p = np.exp2(np.where(bits, block.astype(real(table)) - exact, -np.inf))
                    close(table, s, np.where(p < np.finfo(real(table)).tiny, 0, p))
                    every = np.exp2(np.concatenate(blocks_so_far) - exact).sum(0)
                np.testing.assert_allclose(total, every, rtol=60 * np.finfo(real(table)).eps)


def test_statistics(table, rng):
    """Sums over a block: of all lanes and keys, of some, and of scores that are no numbers."""
    tiny, eps = np.finfo(real(table)).min, np.finfo(real(table)).eps
    for nvec in widths(table):
        ld = nvec * table.lanes
        for nk in [*SIZES, 128]:
            for limited in (False, True):
                s = scratch(table, rng.standard_normal((nk, ld)) * 8)
                s[-2, ::3] = s[0, ::3]  # equal ones, of which the first may be the largest
                bits = np.ones((nk, ld), bool)
                if limited:
                    bits = rng.random((nk, ld)) > 0.5
                    s[:-1][~bits] = rng.choice([np.nan, np.inf, 99], (~bits).sum())
                s[nk // 2, -1] = -np.inf
                allow = (bits.astype(np.uint64) << np.arange(ld, dtype=np.uint64)).sum(
                    1, dtype=np.uint64
                )
                top = np.where(np.arange(ld) % 2, 4.5, tiny).astype(real(table))
                old, given = top.astype(float), s.copy()
                position = (np.arange(ld) * 5 - 9).astype(real(table))
                sums = scratch(table, np.zeros((4, ld)))
                table.statistics(
                    address(s), nk, nvec, address(allow) if limited else None,
                    address(spans(bits, table.lanes)), address(position), address(top),
                    address(sums),
                )  # fmt: skip
                np.testing.assert_array_equal(s, given)
                seen = np.where(bits, s[:-1].astype(float), -np.inf)
                np.testing.assert_array_equal(top, np.maximum(seen.max(axis=0), old))
                below = np.where(seen > -np.inf, top - seen, 0)
                p = np.exp2(np.maximum(np.where(seen > -np.inf, -below, -np.inf), -5000))
                distance = np.abs(position - np.arange(nk)[:, np.newaxis])
                exact = np.stack([p.sum(0), (p * below).sum(0), (p * distance).sum(0)])
                np.testing.assert_allclose(sums[:3], exact, rtol=nk * eps + 40 * eps, atol=1e-37)
                some = bits.any(axis=0) & (seen.max(axis=0) > -np.inf)
                np.testing.assert_array_equal(sums[3, some], seen.argmax(axis=0)[some])
                assert (sums[-1] == GUARD).all()


def test_statistics_of_nan(table):
    """A score that is NaN makes its lane's sums NaN, and no other's."""
    s = scratch(table, np.zeros((5, table.lanes)))
    s[2, 1] = np.nan
    top, position = np.full(table.lanes, -1, real(table)), np.zeros(table.lanes, real(table))
    sums = scratch(table, np.zeros((4, table.lanes)))
    table.statistics(address(s), 5, 1, None, None, address(position), address(top), address(sums))
    np.testing.assert_array_equal(np.isnan(sums[:3]).any(axis=0), np.arange(table.lanes) == 1)
    np.testing.assert_array_equal(sums[0, 2:], 5)


def test_fold_keeps_rounding_errors(table, rng):
    """With or without rescaled rows, the sums have the error of a single rounding."""
    eps = float(np.finfo(real(table)).eps)
    for nvec in widths(table):
        ld = nvec * table.lanes
        for rows in (1, 2, 5, 17):
            total, error = (scratch(table, np.zeros((rows, ld))) for _ in range(2))
            exact = np.zeros((rows, ld), np.longdouble)
            for step in range(40):
                acc = scratch(table, rng.standard_normal((rows, ld)) + 3)
                rescale = np.ones(ld, real(table))
                if step % 5 == 4:
                    rescale[: ld // 2 + 1] = rng.random(ld // 2 + 1)
                exact = exact * rescale.astype(np.longdouble) + acc[:-1]
                given = acc.copy()
                table.fold(address(total), address(error), address(acc), rows, nvec,
                           address(rescale), step == 39)  # fmt: skip
                if step < 39:
                    np.testing.assert_array_equal(acc, given)
            fused = table.isa != b"scalar"  # scalar kernels round a rescaled sum once more
            tolerance = (1 if fused else 10) * eps
            np.testing.assert_allclose(acc[:-1].astype(np.longdouble), exact, rtol=tolerance)
            assert (np.stack([acc[-1], total[-1], error[-1]]) == GUARD).all()


def test_fold_keeps_nonfinite_sums(table):
    ld = table.lanes
    total, error = (scratch(table, np.zeros((1, ld))) for _ in range(2))
    rescale = np.ones(ld, real(table))
    for value in (np.inf, 1.0):
        acc = scratch(table, np.full((1, ld), value))
        acc[0, 1] = 2
        table.fold(address(total), address(error), address(acc), 1, 1, address(rescale), value == 1)
    np.testing.assert_array_equal(acc[0], np.where(np.arange(ld) == 1, 4, np.inf))


def test_softcap(table, rng):
    ld = table.lanes
    for c in (0.1, 1.0, 50.0):
        s = np.concatenate([rng.standard_normal((20, ld)) * x for x in (1e-3, 1, 100, 1e4)])
        out = scratch(table, s)
        table.softcap(address(out), len(s), 1, c)
        natural = s.astype(real(table)).astype(float) * np.log(2)
        np.testing.assert_allclose(
            out[:-1], c * np.tanh(natural / c) / np.log(2), rtol=20 * np.finfo(real(table)).eps
        )
        assert (out[-1] == GUARD).all()


def test_alibi(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        s = rng.standard_normal((17, ld))
        slope, position = rng.random(ld).astype(real(table)), np.arange(ld).astype(real(table)) - 5
        out = scratch(table, s)
        table.alibi(address(out), 17, nvec, address(slope), address(position))
        distance = np.abs(position - np.arange(17)[:, None])
        close(table, out, s - slope.astype(float) * distance / np.log(2))


def test_bias(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        lane = np.arange(ld, dtype=np.uint64)
        for nk in SIZES:
            s = rng.standard_normal((nk, ld))
            rows = rng.standard_normal((ld, nk)).astype(real(table))
            rows[rng.random((ld, nk)) > 0.8] = -np.inf
            for shared in (0, 1):
                allow = np.full(nk, 2**64 - 1, np.uint64)
                out = scratch(table, s)
                table.bias(address(out), nk, nvec, address(pointers(rows)), shared, address(allow))
                b = (rows[:1] if shared else rows).T
                bits = (allow[:, None] >> lane & np.uint64(1)).astype(bool)
                np.testing.assert_array_equal(bits, np.broadcast_to(b > -np.inf, bits.shape))
                expected = np.where(bits, s + np.where(b > -np.inf, b, 0) / np.log(2), out[:-1])
                close(table, out, expected)


def test_nonfinite_values(table, rng):
    ld = table.lanes
    for d in SIZES:
        v = rng.standard_normal((5, d)).astype(real(table))
        assert table.all_finite(address(v), v.strides[0], 5, d) == 1
        for bad in (np.nan, np.inf, -np.inf):
            v[3, d - 1] = bad
            assert table.all_finite(address(v), v.strides[0], 5, d) == 0
            p = np.full((5, ld), 0.5, real(table))
            p[3, ::2] = -0.0
            acc = scratch(table, np.ones((d, ld)))
            table.accumulate_nonfinite(address(acc), address(p), address(v), v.strides[0], 5, d, 1)
            expected = np.ones((d, ld))
            expected[d - 1, 1::2] += bad
            close(table, acc, expected)


def test_mask_bool(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        for nk in (1, 7, 64, 65, 128):
            for stride in (1, 3):
                rows = rng.random((ld, nk * stride)) > 0.5
                allow = np.full(nk + 1, 2**64 - 1, np.uint64)
                table.mask_bool(address(allow), nk, nvec, address(pointers(rows)), stride)
                bits = allow[:nk, None] >> np.arange(ld, dtype=np.uint64) & np.uint64(1)
                np.testing.assert_array_equal(bits, rows[:, ::stride].T)
                assert allow[nk] == 2**64 - 1


def test_a_span_limits_the_products(table, rng):
    """Inside spans the bits are the same; scores outside are not written."""
    nvec, nk, d = len(widths(table)), 32, 20
    ld = nvec * table.lanes
    k = rng.standard_normal((nk, d)).astype(real(table))
    qt = rng.standard_normal((d, ld)).astype(real(table))
    span = np.array([(3 * v % 5, nk - 4 * v) for v in range(nvec)], np.intc)
    key = np.arange(nk)[:, None]
    inside = (key >= span[:, 0]) & (key < span[:, 1])
    inside = inside.repeat(table.lanes, axis=1)
    whole, spanned = scratch(table, np.zeros((nk, ld))), scratch(table, np.zeros((nk, ld)))
    scores = (address(qt), address(k), k.strides[0], nk, d, nvec)
    table.scores(address(whole), *scores, None, None)
    table.scores(address(spanned), *scores, address(span), None)
    np.testing.assert_array_equal(spanned[:-1], np.where(inside, whole[:-1], 0))
    p = np.where(inside, rng.random((nk, ld)), -0.0).astype(real(table))
    acc = [scratch(table, np.ones((d, ld))) for _ in range(2)]
    rescale = rng.random(ld).astype(real(table))
    for a, limits in zip(acc, (None, address(span)), strict=True):
        table.accumulate(
            address(a), address(p), address(k), k.strides[0], nk, d, nvec, address(rescale), limits
        )
    np.testing.assert_array_equal(*acc)


def test_prefetching_changes_nothing(table, rng):
    """Rows to prefetch may have any length, and may lie at addresses without memory."""
    nvec, nk, d = len(widths(table)), 29, 50
    k = rng.standard_normal((nk, d)).astype(real(table))
    qt = rng.standard_normal((d, nvec * table.lanes)).astype(real(table))
    scores = (address(qt), address(k), k.strides[0], nk, d, nvec, None)
    alone = scratch(table, np.zeros((nk, nvec * table.lanes)))
    table.scores(address(alone), *scores, None)
    for row in ((k.ctypes.data, k.strides[0], 200, 9, 0), (16, -64, 1, 3, 0), (16, 0, 0, 2, 0),
                (0, 0, 0, 0, 0)):  # fmt: skip
        prefetch = np.array([row, (1 << 40, 1 << 33, 1 << 20, 1 << 20, 64)], np.intp)
        before, beside = prefetch.copy(), np.zeros_like(alone)
        table.scores(address(beside), *scores, address(prefetch))
        np.testing.assert_array_equal(beside[:-1], alone[:-1])
        np.testing.assert_array_equal(prefetch, before)


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16])
def test_widen_and_narrow(kind, rng):
    """Widening is exact for every 16-bit pattern; narrowing rounds to nearest even."""
    dtype = np.dtype(np.float16) if kind == FLOAT16 else BF16
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    floats = np.concatenate(
        [
            rng.standard_normal(5000) * 10.0 ** rng.integers(-44, 38, 5000),
            [0.0, -0.0, np.inf, -np.inf, np.nan, 65519, 65520, 3.3e38, 1.00390625, 1.01171875],
        ]
    ).astype(np.float32)
    for table in tables(FLOAT32):
        out = np.zeros(2**16 + 1, np.float32)
        table.widen(address(out), address(every), 2**16, kind)
        with np.errstate(invalid="ignore"):  # NumPy's cast of signalling NaN, on AArch64
            exact = every.astype(np.float32)
        np.testing.assert_array_equal(out[:-1], exact)
        for n in (1, 5, 17, len(floats)):
            back = np.full(n + 1, 7, np.uint16)
            table.narrow(address(back), address(floats), n, kind)
            assert back[n] == 7
            with np.errstate(over="ignore", invalid="ignore"):
                expected = floats[:n].astype(dtype)
            np.testing.assert_array_equal(
                back[:n].view(dtype).astype(np.float32), expected.astype(np.float32)
            )


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_merge_rows(table, rng, count):
    dtypes = {FLOAT32: np.dtype("f4"), FLOAT16: np.dtype("f2"), BFLOAT16: BF16}
    if table.real_bytes == 8:
        dtypes = {FLOAT64: np.dtype("f8")}
    for (kind, dtype), (out_kind, out_dtype) in itertools.product(dtypes.items(), repeat=2):
        for n in [*SIZES, 65, 127, 200]:
            parts = rng.standard_normal((count, n)).astype(dtype)
            weights = rng.random(count).astype(real(table))
            expected = (weights[:, np.newaxis] * parts.astype(float)).sum(0)
            out = np.full(n + 1, 77, out_dtype)
            rows = pointers(parts)
            table.merge_rows(
                address(out), out_kind, address(rows), address(weights), count, n, kind
            )
            assert out[n] == 77
            eps = float(ml_dtypes.finfo(out_dtype).eps)
            got = out[:n].astype(float)
            np.testing.assert_allclose(got, expected, rtol=2 * eps, atol=4 * eps)
            if count and kind == out_kind:  # into a part, the same bits
                last = parts[-1]
                table.merge_rows(address(last), kind, address(rows), address(weights), count, n,
                                 kind)  # fmt: skip
                assert last.tobytes() == out[:n].tobytes()


# --- The tables whose inputs are pairs of bfloat16 ------------------------------------------

PAIRED = tables(BFLOAT16)
DIMS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 80]


@pytest.fixture(params=PAIRED, ids=lambda t: t.isa.decode())
def paired(request):
    table = request.param
    if table.enter:
        table.enter()
    yield table
    if table.leave:
        table.leave()


def up(n: int, step: int) -> int:
    return -(-n // step) * step


def test_paired_tables_compute_in_float32_from_bfloat16():
    if not PAIRED:
        pytest.skip("this CPU has no bfloat16 instructions")
    assert all(t.input_type == BFLOAT16 and t.real_bytes == 4 for t in PAIRED)


def ungroup(x: np.ndarray, table) -> np.ndarray:
    """Return the matrix [steps][ld] of elements that a table keeps in groups of steps."""
    ld, group = x.shape[1], table.depth_group
    if group == 2:
        return x.reshape(-1, ld, 2).swapaxes(1, 2).reshape(-1, ld)
    # [steps / 4][first or last half][vector][2 lanes][4 steps]
    halves = x.reshape(-1, 2, ld // table.lanes, 2, 4)
    return halves.transpose(0, 4, 2, 1, 3).reshape(-1, ld)


def bf16(rng, *shape):
    return rng.standard_normal(shape).astype(BF16)


def test_paired_products(paired, rng):
    for nvec in widths(paired):
        ld = nvec * paired.lanes
        for d in DIMS:
            for nk in (1, 2, 16, 17, 33, 128):
                query, key = bf16(rng, ld, d), bf16(rng, up(nk, paired.row_step), up(d, 32))
                key[:, d:] = 0
                packed = np.full((up(d, paired.depth_step) // 2 + 1, ld, 2), 7, query.dtype)
                for sign in (1, -1):
                    paired.pack_rows(
                        address(packed), address(pointers(query)), d, nvec, float(sign)
                    )
                    assert (packed[-1] == 7).all()
                    s = np.full((up(nk, paired.row_step) + 1, ld), GUARD, np.float32)
                    paired.scores(
                        address(s),
                        address(packed),
                        address(key),
                        key.strides[0],
                        nk,
                        d,
                        nvec,
                        None,
                        None,
                    )
                    assert (s[-1] == GUARD).all()
                    exact = sign * key[:nk].astype(float) @ np.pad(
                        query.astype(float), ((0, 0), (0, up(d, 32) - d))
                    ).T  # fmt: skip
                    np.testing.assert_allclose(s[:nk], exact, rtol=1e-5, atol=1e-5)


def test_paired_values(paired, rng):
    """pack_values pads with zeros, also where NaN follows; accumulate sums what it packed."""
    for nvec in widths(paired):
        ld = nvec * paired.lanes
        for d in DIMS:
            for nk in (1, 2, 31, 32, 33, 128):
                value, weights = bf16(rng, nk + 1, d + 1), bf16(rng, up(nk, 32) // 2, ld, 2)
                value[nk], value[:, d] = np.nan, np.nan
                packed = np.full((up(d, 32) + 1, up(nk, 32)), 7, value.dtype)
                paired.pack_values(
                    address(packed), packed.strides[0], address(value), value.strides[0], nk, d
                )
                assert (packed[-1] == 7).all()
                rows, depth = up(d, paired.row_step), up(nk, paired.depth_step)
                np.testing.assert_array_equal(
                    packed[:rows, :depth].astype(float),
                    np.pad(value[:nk, :d].T, ((0, rows - d), (0, depth - nk))).astype(float),
                )
                p = ungroup(weights.astype(float), paired)[:nk]
                exact = value[:nk, :d].T.astype(float) @ p
                rescale = rng.random(ld).astype(np.float32)
                for rescaled in (False, True):
                    acc = np.full((up(d, paired.row_step) + 1, ld), 2, np.float32)
                    paired.accumulate(
                        address(acc), address(weights), address(packed), packed.strides[0], nk, d,
                        nvec, address(rescale) if rescaled else None, None,
                    )  # fmt: skip
                    assert (acc[-1] == 2).all()
                    np.testing.assert_allclose(
                        acc[:d], exact + 2 * rescale * rescaled, rtol=1e-5, atol=2e-5
                    )


def test_paired_softmax(paired, rng):
    for nvec in widths(paired):
        ld = nvec * paired.lanes
        for nk in (1, 2, 3, 4, 5, 31, 32, 33, 127, 128):
            for limited in (False, True):
                scale = 0.3
                s = np.full((up(nk, 32) + 1, ld), GUARD, np.float32)
                s[:nk] = rng.standard_normal((nk, ld)) * 20
                before = s[:nk].astype(float)
                bits = rng.random((nk, ld)) > 0.5 if limited else np.ones((nk, ld), bool)
                allow = (bits.astype(np.uint64) << np.arange(ld, dtype=np.uint64)).sum(
                    1, dtype=np.uint64
                )
                top = np.full(ld, -10, np.float32)
                total, rescale = np.ones(ld, np.float32), np.zeros(ld, np.float32)
                span = spans(bits, paired.lanes)
                paired.softmax(
                    address(s), nk, nvec, address(allow) if limited else None, address(span),
                    scale, address(top), address(total), address(rescale),
                )  # fmt: skip
                assert (s[-1] == GUARD).all()
                exact_top = np.maximum(-10, np.where(bits, before * scale, -np.inf).max(0))
                np.testing.assert_allclose(top, exact_top, rtol=1e-6)
                np.testing.assert_allclose(rescale, np.exp2(-10 - exact_top), rtol=1e-5)
                p = np.exp2(before * scale - exact_top)
                np.testing.assert_allclose(total, np.where(bits, p, 0).sum(0) + rescale, rtol=1e-5)
                pairs = s[: up(nk, paired.depth_step) // 2].view(BF16)
                stored = ungroup(pairs.reshape(-1, ld, 2), paired).astype(float)
                np.testing.assert_allclose(stored[:nk], np.where(bits, p, 0), rtol=2**-8)
                assert (np.signbit(stored[:nk]) == ~bits).all()
                assert (stored[nk:] == 0).all()


def test_paired_nonfinite_values(paired, rng):
    ld = paired.lanes
    for d in DIMS:
        v = bf16(rng, 5, d)
        assert paired.all_finite(address(v), v.strides[0], 5, d) == 1
        for bad in (np.nan, np.inf, -np.inf):
            for key in (2, 3):
                nonfinite = v.copy()
                nonfinite[key, d - 1] = bad
                assert paired.all_finite(address(nonfinite), nonfinite.strides[0], 5, d) == 0
                p = np.full((4, ld, 2), 0.5, nonfinite.dtype)
                ungrouped = np.arange(p.size).reshape(p.shape)
                p.flat[ungroup(ungrouped, paired)[key, ::2]] = -0.0
                acc = scratch_like(d, ld)
                paired.accumulate_nonfinite(
                    address(acc), address(p), address(nonfinite), nonfinite.strides[0], 5, d, 1
                )
                expected = np.ones((d, ld))
                expected[d - 1, 1::2] += bad
                np.testing.assert_array_equal(acc[:-1], expected)
                assert (acc[-1] == GUARD).all()


def scratch_like(rows: int, ld: int) -> np.ndarray:
    out = np.full((rows + 1, ld), GUARD, np.float32)
    out[:-1] = 1
    return out


# --- The decode kernels ---------------------------------------------------------------------

STORED = {FLOAT32: np.dtype("f4"), FLOAT64: np.dtype("f8"), FLOAT16: np.dtype("f2"), BFLOAT16: BF16,
          INT8: np.dtype("i1")}  # fmt: skip


def stored_types(table: Table) -> list[int]:
    """Return the element types that the decode kernels read."""
    return [FLOAT64] if table.real_bytes == 8 else [FLOAT32, FLOAT16, BFLOAT16, INT8]


def rows_of(rng: np.random.Generator, n: int, d: int, code: int) -> np.ndarray:
    """Return (n, d) integers in an element type; each row is followed by NaN (99 in int8)."""
    whole = np.full((n, d + 3), 99 if code == INT8 else np.nan, STORED[code])
    whole[:, :d] = np.round(rng.standard_normal((n, d)) * 10)
    return whole[:, :d]


def runs(x: np.ndarray) -> np.ndarray:
    """Return the address of each run of 16 rows, then the last one four times more."""
    begins = x.ctypes.data + np.arange(-(-len(x) // 16)) * 16 * x.strides[0]
    return np.append(begins, np.repeat(begins[-1:], 4)).astype(np.uintp)


def padded(table: Table, x: np.ndarray) -> np.ndarray:
    """Return rows in the table's real type, padded with zeros to whole vectors."""
    wide = np.zeros((len(x), -(-x.shape[1] // table.lanes) * table.lanes), real(table))
    wide[:, : x.shape[1]] = x
    return wide


@pytest.mark.parametrize("d", [1, 3, 16, 21, 64, 100, 128])
def test_decode_scores(table, rng, d):
    for code in stored_types(table):
        for rows in [*range(1, 10), table.tile_q // 2]:
            ld = -(-rows // table.lanes) * table.lanes
            for nk in (1, 2, 5, 16, 17, 40):
                q = rng.standard_normal((rows, d)).astype(real(table))
                key, wide = rows_of(rng, nk, d, code), padded(table, q)
                at = runs(key)
                got = np.full((nk + 1, ld), GUARD, real(table))
                table.decode_scores(
                    address(got), ld, address(wide), wide.shape[1], address(at), key.strides[0],
                    nk, d, rows, code,
                )  # fmt: skip
                assert (got[nk:] == GUARD).all()
                assert (got[:, rows:] == GUARD).all()
                exact = key.astype(float) @ q.T.astype(float)
                eps = np.finfo(real(table)).eps * d * 10
                np.testing.assert_allclose(got[:nk, :rows], exact, rtol=eps, atol=eps * 10)


def test_a_decode_score_has_the_same_bits_at_any_place(table, rng):
    q, key = rng.standard_normal((7, 70)), rng.standard_normal((33, 70)).astype(real(table))
    wide, code = padded(table, q), FLOAT32 if table.real_bytes == 4 else FLOAT64
    ld = -(-7 // table.lanes) * table.lanes
    all_of = np.zeros((33, ld), real(table))
    at = runs(key)
    table.decode_scores(address(all_of), ld, address(wide), wide.shape[1], address(at),
                        key.strides[0], 33, 70, 7, code)  # fmt: skip
    for k in range(33):
        for r in range(7):
            one, at = np.zeros((1, ld), real(table)), runs(key[k : k + 1])
            table.decode_scores(address(one), ld, address(wide[r]), wide.shape[1], address(at),
                                key.strides[0], 1, 70, 1, code)  # fmt: skip
            assert one[0, 0] == all_of[k, r]


@pytest.mark.parametrize("dv", [1, 5, 16, 24, 40, 64, 128, 130])
@pytest.mark.parametrize("masked", [0, 1])
def test_decode_accumulate(table, rng, dv, masked):
    for code in stored_types(table):
        for rows in [*range(1, 10), table.tile_q // 2]:
            ld = -(-rows // table.lanes) * table.lanes
            for nk in (1, 3, 16, 21):
                value = rows_of(rng, nk, dv, code)
                p = rng.random((nk, ld)).astype(real(table))
                if masked:
                    p[rng.random(p.shape) < 0.3] = -0.0
                exact_v, at = value.astype(float), runs(value)
                if masked and code != INT8:  # an excluded key may hold anything
                    p[0, :rows] = -0.0
                    value[0], exact_v[0] = np.nan, 0
                before = rng.standard_normal((rows, dv)).astype(real(table))
                acc = np.vstack([padded(table, before), np.full((1, 1), GUARD)
                                 .repeat(padded(table, before).shape[1], 1)])  # fmt: skip
                acc = np.ascontiguousarray(acc, real(table))
                rescale = rng.random(rows).astype(real(table))
                table.decode_accumulate(
                    address(acc), acc.shape[1], address(p), ld, address(at), value.strides[0],
                    nk, dv, rows, address(rescale), masked, code,
                )  # fmt: skip
                assert (acc[rows] == GUARD).all()
                exact = (
                    before * rescale[:, None].astype(float) + p[:, :rows].T.astype(float) @ exact_v
                )
                eps = np.finfo(real(table)).eps * 40
                np.testing.assert_allclose(acc[:rows, :dv], exact, rtol=eps, atol=eps * 10)
                assert not acc[:rows, dv:].any()


def test_decode_accumulate_without_rescale_adds(table):
    code = FLOAT32 if table.real_bytes == 4 else FLOAT64
    value, p = np.ones((3, 8), real(table)), np.ones((3, table.lanes), real(table))
    acc, at = padded(table, np.full((1, 8), 5.0)), runs(value)
    table.decode_accumulate(address(acc), acc.shape[1], address(p), table.lanes, address(at),
                            value.strides[0], 3, 8, 1, None, 0, code)  # fmt: skip
    assert (acc[:, :8] == 8).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_decode_softmax(table, rng, scaled):
    """The second of two blocks continues the sums of the first."""
    ld = 1
    while ld <= table.lanes:
        for nk in (1, 3, 16, 37, 64):
            blocks = rng.standard_normal((2, nk, ld)) * 5
            scales = np.ones((2, 2, nk + table.lanes), np.float32)
            scales[:, :, nk:] = np.nan
            if scaled:
                scales[:, :, :nk] = rng.random((2, 2, nk)) + 0.5
            top, total = (np.full(table.lanes, x, real(table)) for x in (-3e38, 0))
            weights = []
            for block, block_scales in zip(blocks, scales, strict=True):
                s = np.full(nk * ld + 2 * table.lanes, GUARD, real(table))
                s[: nk * ld] = block.ravel()
                rescale = np.empty(table.lanes, real(table))
                table.decode_softmax(
                    address(s), nk, ld, *(address(x) if scaled else None for x in block_scales),
                    address(top), address(total), address(rescale),
                )  # fmt: skip
                assert (s[nk * ld + table.lanes :] == GUARD).all()
                weights.append(s[: nk * ld].reshape(nk, ld).astype(float))
            keys, values = scales[:, :, :nk, None].swapaxes(0, 1).astype(float)
            both = blocks.astype(real(table)).astype(float) * keys
            exact_top = both.max((0, 1))
            eps = np.finfo(real(table)).eps * 80
            np.testing.assert_allclose(top[:ld], exact_top, rtol=eps)
            np.testing.assert_allclose(rescale[:ld], np.exp2(both[0].max(0) - exact_top), rtol=eps)
            exact = np.exp2(both - exact_top)
            np.testing.assert_allclose(weights[1], exact[1] * values[1], rtol=eps)
            np.testing.assert_allclose(weights[0] * rescale[:ld], exact[0] * values[0], rtol=eps)
            np.testing.assert_allclose(total[:ld], exact.sum((0, 1)), rtol=eps)
        ld *= 2


def test_scale_keys(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        s = rng.standard_normal((9, ld))
        scales = rng.random(9).astype(np.float32)
        got = scratch(table, s)
        table.scale_keys(address(got), 9, nvec, address(scales), 0)
        close(table, got, s.astype(real(table)) * scales[:, None].astype(float))
        p = np.abs(s)
        p[rng.random(s.shape) < 0.3] = -0.0
        scales[3] = np.nan
        p[3] = -0.0
        got = scratch(table, p)
        table.scale_keys(address(got), 9, nvec, address(scales), 1)
        assert (np.signbit(got[:-1]) == np.signbit(p)).all()
        scales[3] = 1
        close(table, got, p.astype(real(table)) * scales[:, None].astype(float))


def test_widen_int8(table):
    if table.real_bytes == 8:
        assert not table.widen
        return
    everything = np.arange(-128, 128).astype(np.int8)
    for n in (1, 7, 16, 31, 256):
        got = np.full(n + 1, GUARD, np.float32)
        table.widen(address(got), address(everything), n, INT8)
        np.testing.assert_array_equal(got[:n], everything[:n])
        assert got[n] == GUARD
