"""The C tables of kernels, as ctypes structures.

csrc/kernels/kernels.h alone declares the fields of the struct. A library contains the text of that
declaration from when it was compiled, and `Table` gets its fields from this text.
"""

from __future__ import annotations

import ctypes
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).parents[2] / "csrc" / "kernels" / "kernels.h"
NUMBERS = {"int": ctypes.c_int, "double": ctypes.c_double, "ptrdiff_t": ctypes.c_ssize_t}


class StaleTable(Exception):
    """The library and csrc/kernels/kernels.h do not declare the same struct."""


class Table(ctypes.Structure):
    """A qkv_tile_kernels: its fields and their meaning are in csrc/kernels/kernels.h."""


def declarations(text: str) -> dict[str, str]:
    """Return the declaration of each field of a struct, given the C text between its braces.

    >>> declarations("int lanes, tile_q; /* reals */ void (*scale)(void *S, double scale);")
    {'lanes': 'int', 'tile_q': 'int', 'scale': 'void (*)(void *S, double scale)'}
    """
    fields = {}
    for declaration in re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL).split(";"):
        declaration = " ".join(declaration.split())
        if function := re.fullmatch(r"(.+?)\(\*(\w+)\)(\(.*\))", declaration):
            fields[function[2]] = f"{function[1]}(*){function[3]}"
        elif numbers := re.fullmatch(r"(.+?)(\w+(?:, \w+)*)", declaration):
            fields |= dict.fromkeys(numbers[2].split(", "), numbers[1].strip())
        elif declaration:
            raise ValueError(f"cannot read this declaration of a field: {declaration}")
    return fields


def header_declarations() -> dict[str, str]:
    """Return the declarations of the struct's fields in csrc/kernels/kernels.h."""
    struct = re.search(
        r"^QKV_STRUCT\(qkv_tile_kernels,$(.*?)^\);$",
        HEADER.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    if not struct:
        raise ValueError(f"{HEADER} has no QKV_STRUCT(qkv_tile_kernels, ...)")
    return declarations(struct[1])


def compare(library: dict[str, str], header: dict[str, str]) -> None:
    """Raise StaleTable, which names the first field that differs, unless both are the same."""
    for name, expected in zip_longest(library, header):
        if name != expected or library[name] != header[name]:
            break
    else:
        return
    if name == expected:
        what = f"has the field {name!r} as {library[name]!r}, and the header as {header[name]!r}"
    elif expected not in library and expected:
        what = f"lacks the field {expected!r} of the header"
    elif name not in header and name:
        what = f"has the field {name!r}, which the header lacks"
    else:
        what = f"has the field {name!r} where the header has {expected!r}"
    raise StaleTable(f"the library was built from another {HEADER.name}, build it again: it {what}")


def parameter_type(declared: str) -> Any:
    """Return the ctypes type of a parameter or result, with or without its name."""
    if "*" in declared:
        return ctypes.c_void_p
    return NUMBERS[declared.split()[0]]


def field_type(name: str, declared: str) -> Any:
    """Return the ctypes type of a field."""
    try:
        if function := re.fullmatch(r"(.+?) ?\(\*\)\((.*)\)", declared):
            result = None if function[1] == "void" else parameter_type(function[1])
            parameters = [] if function[2] == "void" else function[2].split(", ")
            return ctypes.CFUNCTYPE(result, *map(parameter_type, parameters))
        return ctypes.c_char_p if declared == "const char *" else NUMBERS[declared]
    except KeyError as error:
        raise ValueError(
            f"field_type knows no ctypes type for {error}, in the field {name!r}: {declared}"
        ) from None


def complete_table(library: ctypes.CDLL) -> None:
    """Give Table the fields that the library was compiled with.

    Raises StaleTable if csrc/kernels/kernels.h exists and declares others.
    """
    if hasattr(Table, "_fields_"):
        return
    library.qkv_kernels_fields.restype = ctypes.c_char_p
    library.qkv_kernels_size.restype = ctypes.c_size_t
    fields = declarations(library.qkv_kernels_fields().decode())
    if HEADER.exists():  # an installed package may be tested without csrc/
        compare(fields, header_declarations())
    Table._fields_ = [(name, field_type(name, declared)) for name, declared in fields.items()]
    if ctypes.sizeof(Table) != library.qkv_kernels_size():
        last = list(fields)[-1]
        raise StaleTable(
            f"the library's table has {library.qkv_kernels_size()} bytes, but ctypes ends it after "
            f"{last!r}, at {ctypes.sizeof(Table)}: field_type gives a field another size than C"
        )


def tables(input_type: int) -> list[Table]:
    """Return the tables of an input type that this machine can execute, weakest first."""
    from qkv_fast._native import isa

    library = ctypes.CDLL(isa.__file__)
    complete_table(library)
    library.qkv_tile_table.restype = ctypes.POINTER(Table)
    library.qkv_isa_name.restype = ctypes.c_char_p
    found: list[Table] = []
    index = 0
    while library.qkv_isa_name(index):
        table = library.qkv_tile_table(index, input_type)
        is_known = table and any(table.contents.isa == t.isa for t in found)
        if table and not is_known and library.qkv_isa_runs(index):
            found.append(table.contents)
        index += 1
    return found


def address(x: np.ndarray) -> ctypes.c_void_p:
    """Return the address of an array's first element, which keeps the array for the call."""
    return x.ctypes.data_as(ctypes.c_void_p)


def pointers(x: np.ndarray) -> np.ndarray:
    """Return the addresses of a matrix' rows, as an array to pass on."""
    return x.ctypes.data + np.arange(len(x), dtype=np.uintp) * np.uintp(x.strides[0])
