"""A torch tensor over addresses that torch did not allocate, mapped or not.

torch reads the addresses of a DLPack capsule without touching them. (Its other door,
`__cuda_array_interface__`, asks the driver about the pointer and fails on unmapped addresses.)
"""

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU = 1  # kDLCPU and kDLCUDA of dlpack.h
CUDA = 2

_SIGNED_INTEGER = 0  # kDLInt


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_dimensions", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# A tensor reads its struct when it is freed, maybe after everything of ours is gone: they are kept.
# It is 100 bytes for each KV tensor of a process.
_kept: list[object] = []


def int8_tensor(address: int, num_bytes: int, device: tuple[int, int]) -> "torch.Tensor":
    """Return an int8 tensor of `num_bytes` at `address`, which must stay reserved.

    Args:
        address: Its first byte.
        num_bytes: Its length.
        device: `CPU` or `CUDA`, and the device's index.
    """
    from torch.utils.dlpack import from_dlpack  # noqa: PLC0415  the core needs torch nowhere else

    shape = (ctypes.c_int64 * 1)(num_bytes)
    strides = (ctypes.c_int64 * 1)(1)
    managed = _ManagedTensor(
        _Tensor(address, _Device(*device), 1, _DataType(_SIGNED_INTEGER, 8, 1), shape, strides, 0)
    )
    _kept.append((managed, shape, strides))
    return from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))
