"""The C tables of tile kernels, seen from Python through ctypes: csrc/tile_kernels.h."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

PTR, SIZE, INT, DOUBLE = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_double


def _f(result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)


class Table(ctypes.Structure):
    _fields_ = (
        ("isa", ctypes.c_char_p),
        ("real_bytes", INT),
        ("lanes", INT),
        ("tile_q", INT),
        ("pack_rows", _f(None, PTR, PTR, SIZE, INT, DOUBLE)),
        ("scores", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT)),
        ("softcap", _f(None, PTR, SIZE, INT, DOUBLE)),
        ("alibi", _f(None, PTR, SIZE, INT, PTR, PTR)),
        ("bias", _f(None, PTR, SIZE, INT, PTR, INT, PTR)),
        ("limit_range", _f(None, PTR, SIZE, INT, PTR, PTR)),
        ("softmax", _f(None, PTR, SIZE, INT, PTR, PTR, PTR, PTR)),
        ("accumulate", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT, PTR)),
        ("accumulate_odd", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT)),
        ("all_finite", _f(INT, PTR, SIZE, SIZE, SIZE)),
        ("store_rows", _f(None, PTR, INT, PTR, SIZE, INT, PTR)),
        ("fma_chain", _f(DOUBLE, SIZE)),
    )


def tables(real_bytes: int) -> list[Table]:
    """Return the tables that this machine can execute, weakest first."""
    from qkv_fast import _engine

    library = ctypes.CDLL(_engine.__file__)
    library.qkv_tile_table.restype = ctypes.POINTER(Table)
    found = []
    index = 0
    while table := library.qkv_tile_table(index, real_bytes):
        if library.qkv_tile_table_runs(index):
            found.append(table.contents)
        index += 1
    return found


def address(x: np.ndarray) -> int:
    return x.ctypes.data


def pointers(x: np.ndarray) -> np.ndarray:
    """Return the addresses of a matrix' rows, as an array to pass on."""
    return x.ctypes.data + np.arange(len(x), dtype=np.uintp) * np.uintp(x.strides[0])
