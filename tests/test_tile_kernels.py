"""Each kernel of each table against NumPy in float64, on scratch with guard rows behind it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("qkv_fast._engine", reason="no native engine")

from tile_tables import Table, address, pointers, tables

TABLES = tables(4) + tables(8)
GUARD = 1234.5


@pytest.fixture(params=TABLES, ids=lambda t: f"{t.isa.decode()}-f{t.real_bytes * 8}")
def table(request: pytest.FixtureRequest) -> Table:
    return request.param


def real(table: Table) -> type:
    return np.float32 if table.real_bytes == 4 else np.float64


def widths(table: Table) -> range:
    return range(1, table.tile_q // table.lanes + 1)


def scratch(table: Table, x: np.ndarray) -> np.ndarray:
    """Return a copy of x of the table's reals with a guard row behind it."""
    out = np.full((x.shape[0] + 1, *x.shape[1:]), GUARD, real(table))
    out[:-1] = x
    return out


def close(table: Table, actual: np.ndarray, expected: np.ndarray) -> None:
    assert (actual[-1] == GUARD).all()
    eps = np.finfo(real(table)).eps
    np.testing.assert_allclose(actual[:-1], expected, rtol=40 * eps, atol=40 * eps)


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


def test_both_products(table, rng):
    for nvec in widths(table):
        ld = nvec * table.lanes
        for rows in SIZES:
            for red in (0, 1, 2, 7, 33):
                a = rng.standard_normal((rows, red + 3)).astype(real(table))
                b = rng.standard_normal((red, ld)).astype(real(table))
                c = scratch(table, np.full((rows, ld), 9.0))
                table.scores(address(c), address(b), address(a), a.strides[0], rows, red, nvec)
                close(table, c, a[:, :red].astype(float) @ b)
                at = np.ascontiguousarray(a.T)
                decay = rng.random(ld).astype(real(table))
                for decayed in (False, True):
                    acc = scratch(table, np.full((rows, ld), 2.0))
                    table.accumulate(
                        address(acc), address(b), address(at), at.strides[0], red, rows, nvec,
                        address(decay) if decayed else None,
                    )  # fmt: skip
                    close(table, acc, at.T[:, :red].astype(float) @ b + 2 * decay * decayed)


def test_softmax_is_online(table, rng):
    tiny = np.finfo(real(table)).min
    for nvec in widths(table):
        ld = nvec * table.lanes
        for nk in SIZES:
            top = np.full(ld, tiny, real(table))
            total, decay = np.zeros(ld, real(table)), np.zeros(ld, real(table))
            blocks = rng.standard_normal((3, nk, ld)) * 30
            seen = []
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
                table.softmax(
                    address(s), nk, nvec, address(allow) if limited else None,
                    address(top), address(total), address(decay),
                )  # fmt: skip
                seen.append(np.where(bits, block.astype(real(table)).astype(float), -np.inf))
                exact = np.max(seen, axis=(0, 1), initial=tiny)
                np.testing.assert_array_equal(top, exact.astype(real(table)))
                with np.errstate(over="ignore"):
                    shrunk = np.exp2((before - top).astype(float))
                np.testing.assert_allclose(
                    decay, shrunk, rtol=20 * np.finfo(real(table)).eps, atol=1e-37
                )
                assert (np.signbit(s[:-1]) == ~bits).all()  # -0.0 marks what is excluded
                with np.errstate(all="ignore"):
                    p = np.exp2(np.where(bits, block.astype(real(table)) - exact, -np.inf))
                    close(table, s, np.where(p < np.finfo(real(table)).tiny, 0, p))
                    every = np.exp2(np.concatenate(seen) - exact).sum(0)
                np.testing.assert_allclose(total, every, rtol=60 * np.finfo(real(table)).eps)


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


def test_bias_and_range(table, rng):
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
            first = rng.integers(-1, nk + 1, ld).astype(real(table))
            last = rng.integers(-1, nk + 1, ld).astype(real(table))
            allow = np.full(nk, 2**64 - 1, np.uint64)
            table.limit_range(address(allow), nk, nvec, address(first), address(last))
            bits = (allow[:, None] >> lane & np.uint64(1)).astype(bool)
            k = np.arange(nk)[:, None]
            np.testing.assert_array_equal(bits, (first <= k) & (k <= last))


def test_what_is_not_finite(table, rng):
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
            table.accumulate_odd(address(acc), address(p), address(v), v.strides[0], 5, d, 1)
            expected = np.ones((d, ld))
            expected[d - 1, 1::2] += bad
            close(table, acc, expected)
