"""A Python function as a custom call of XLA on CPUs: NumPy views of its buffers, no copies.

XLA calls foreign code through structs of C that its header ``xla/ffi/api/c_api.h`` describes and
versions. They are declared here once more, for ctypes, so that neither building nor importing this
package needs JAX or its headers. The declarations are those of version 0.1; versions add fields at
the end only, and XLA refuses at registration a version that it no longer supports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes  # a requirement of JAX
import numpy as np

from .._dtypes import Array

VERSION = 0, 1  # of the interface, major and minor
ATTRIBUTE = "call"  # the name of the string that a call carries

Function = Callable[[str, list[Array], list[Array]], None]

_METADATA = 1  # the extension by which XLA asks for the version
_INVALID_ARGUMENT, _CANCELLED, _RESOURCE_EXHAUSTED, _INTERNAL = 3, 1, 8, 13
_DTYPES = {
    1: np.dtype(np.bool_), 2: np.dtype(np.int8), 3: np.dtype(np.int16), 4: np.dtype(np.int32),
    5: np.dtype(np.int64), 6: np.dtype(np.uint8), 7: np.dtype(np.uint16), 8: np.dtype(np.uint32),
    9: np.dtype(np.uint64), 10: np.dtype(np.float16), 11: np.dtype(np.float32),
    12: np.dtype(np.float64), 16: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


# --- The interface, version 0.1: names of fields are XLA's --------------------------------------

_Pointer = ctypes.c_void_p


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", _Pointer))


class _ApiVersion(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("major_version", ctypes.c_int),
        ("minor_version", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("api_version", _ApiVersion),
        ("traits", ctypes.c_uint32),
    )


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("extension_base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _ErrorCreateArgs(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("message", ctypes.c_char_p),
        ("errc", ctypes.c_int),
    )


class _Api(ctypes.Structure):  # its first function; others follow
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("api_version", _ApiVersion),
        ("internal_api", _Pointer),
        ("error_create", ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_ErrorCreateArgs))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("dtype", ctypes.c_int),
        ("data", _Pointer),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):  # the arguments; the results have the same fields
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("size", ctypes.c_int64),
        ("types", _Pointer),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ByteSpan(ctypes.Structure):
    _fields_ = (("ptr", _Pointer), ("len", ctypes.c_size_t))


class _Attributes(ctypes.Structure):  # `attrs` points to strings where the type is a string
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", _Pointer),
        ("size", ctypes.c_int64),
        ("types", _Pointer),
        ("names", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),
        ("attrs", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension_start", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("ctx", _Pointer),
        ("stage", ctypes.c_int),
        ("args", _Buffers),
        ("rets", _Buffers),
        ("attrs", _Attributes),
    )


# --- Its use ------------------------------------------------------------------------------------


class Handler:
    """What XLA calls for a custom call; ``address`` is its address.

    It must live as long as the process: XLA keeps the address.

    Parameters
    ----------
    function : callable (call, inputs, outputs)
        Gets the call's string, views of the inputs, which are read-only, and views of the results,
        which it fills. What it raises becomes an error of XLA with the same message.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._entry = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_CallFrame))(self._called)
        self.address = ctypes.cast(self._entry, _Pointer).value

    def _called(self, pointer: Any) -> int | None:
        frame = pointer.contents
        extension = frame.extension_start
        if extension and extension.contents.type == _METADATA:
            given = ctypes.cast(extension, ctypes.POINTER(_MetadataExtension)).contents
            version = given.metadata.contents.api_version
            version.major_version, version.minor_version = VERSION
            return None
        try:
            outputs = [_view(frame.rets.buffers[i].contents, True) for i in range(frame.rets.size)]
            inputs = [_view(frame.args.buffers[i].contents, False) for i in range(frame.args.size)]
            self._function(_text(frame.attrs), inputs, outputs)
        except BaseException as error:  # nothing may pass through XLA's frames
            return _error(frame.api.contents, error)
        return None


class _Memory:
    """Memory of XLA, as NumPy takes it."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _view(buffer: Any, is_output: bool) -> Array:
    """Return a view of a buffer, whose elements lie in C order."""
    shape = tuple(buffer.dims[: buffer.rank]) if buffer.rank else ()
    dtype = _DTYPES[buffer.dtype]
    if 0 in shape:
        return np.empty(shape, dtype)
    typestr = dtype.str if dtype.kind != "V" else "<u2"
    interface = {"data": (buffer.data, not is_output), "shape": shape, "typestr": typestr,
                 "version": 3}  # fmt: skip
    array: Array = np.asarray(_Memory(interface))
    return array if dtype.kind != "V" else array.view(dtype)


def _text(attributes: Any) -> str:
    """Return the string that a call carries."""
    for i in range(attributes.size):
        name = attributes.names[i].contents
        if ctypes.string_at(name.ptr, name.len) == ATTRIBUTE.encode():
            value = attributes.attrs[i].contents
            return ctypes.string_at(value.ptr, value.len).decode()
    raise ValueError(f"the custom call has no attribute {ATTRIBUTE}")


def _error(api: Any, error: BaseException) -> int | None:
    """Return an error of XLA with the message of an exception."""
    code = _INTERNAL
    if isinstance(error, TypeError | ValueError):
        code = _INVALID_ARGUMENT
    elif isinstance(error, MemoryError):
        code = _RESOURCE_EXHAUSTED
    elif isinstance(error, KeyboardInterrupt):
        code = _CANCELLED
    message = str(error) or type(error).__name__
    size = _ErrorCreateArgs.errc.offset + _ErrorCreateArgs.errc.size
    arguments = _ErrorCreateArgs(size, None, message.encode(), code)
    address: int | None = api.error_create(ctypes.byref(arguments))
    return address
