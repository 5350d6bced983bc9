"""The C tables of tile kernels, seen from Python through ctypes: csrc/kernels/kernels.h."""

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
        ("input_type", INT),
        ("lanes", INT),
        ("tile_q", INT),
        ("depth_step", INT),
        ("row_step", INT),
        ("enter", _f(None)),
        ("leave", _f(None)),
        ("pack_rows", _f(None, PTR, PTR, SIZE, INT, DOUBLE)),
        ("pack_values", _f(None, PTR, SIZE, PTR, SIZE, SIZE, SIZE)),
        ("scores", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT, PTR, PTR)),
        ("scale", _f(None, PTR, SIZE, INT, DOUBLE)),
        ("softcap", _f(None, PTR, SIZE, INT, DOUBLE)),
        ("alibi", _f(None, PTR, SIZE, INT, PTR, PTR)),
        ("bias", _f(None, PTR, SIZE, INT, PTR, INT, PTR)),
        ("mask_positions", _f(None, PTR, SIZE, INT, PTR, PTR)),
        ("mask_bool", _f(None, PTR, SIZE, INT, PTR, SIZE)),
        ("softmax", _f(None, PTR, SIZE, INT, PTR, PTR, DOUBLE, PTR, PTR, PTR)),
        ("accumulate", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT, PTR, PTR)),
        ("accumulate_nonfinite", _f(None, PTR, PTR, PTR, SIZE, SIZE, SIZE, INT)),
        ("scale_keys", _f(None, PTR, SIZE, INT, PTR, INT)),
        ("all_finite", _f(INT, PTR, SIZE, SIZE, SIZE)),
        ("store_rows", _f(None, PTR, INT, PTR, SIZE, INT, PTR)),
        ("fold", _f(None, PTR, PTR, PTR, SIZE, INT, PTR, INT)),
        ("decode_scores", _f(None, PTR, SIZE, PTR, SIZE, PTR, SIZE, SIZE, SIZE, INT, INT)),
        ("decode_softmax", _f(None, PTR, SIZE, INT, PTR, PTR, PTR, PTR, PTR)),
        (
            "decode_accumulate",
            _f(None, PTR, SIZE, PTR, SIZE, PTR, SIZE, SIZE, SIZE, INT, PTR, INT, INT),
        ),
        ("widen", _f(None, PTR, PTR, SIZE, INT)),
        ("narrow", _f(None, PTR, PTR, SIZE, INT)),
        ("fma_chain", _f(DOUBLE, SIZE)),
        ("fma_chain_flop", INT),
    )


def tables(operand: int) -> list[Table]:
    """Return the tables of an element type that this machine can execute, weakest first."""
    from qkv_fast._native import isa

    library = ctypes.CDLL(isa.__file__)
    library.qkv_tile_table.restype = ctypes.POINTER(Table)
    library.qkv_isa_name.restype = ctypes.c_char_p
    found: list[Table] = []
    index = 0
    while library.qkv_isa_name(index):
        table = library.qkv_tile_table(index, operand)
        seen = table and any(table.contents.isa == t.isa for t in found)
        if table and not seen and library.qkv_isa_runs(index):
            found.append(table.contents)
        index += 1
    return found


def address(x: np.ndarray) -> int:
    return x.ctypes.data


def pointers(x: np.ndarray) -> np.ndarray:
    """Return the addresses of a matrix' rows, as an array to pass on."""
    return x.ctypes.data + np.arange(len(x), dtype=np.uintp) * np.uintp(x.strides[0])
