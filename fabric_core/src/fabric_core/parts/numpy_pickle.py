"""NumPy's numbers, texts and arrays in a pickle, read without trust."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any


class _ArrayClass:
    """Stands for ``numpy.ndarray`` in a pickle, where it is an argument.

    [Note: arrays without trust] Were the class itself to be had, a file could call it as ``ndarray((1,), "O", bytes)``,
    and NumPy would take the bytes for pointers to objects. ``ndarray.__setstate__`` does not.
    """

    def __new__(cls, *_: Any) -> Any:
        raise pickle.UnpicklingError("numpy.ndarray is not allowlisted to be called")


def _new_array(kind: Any, *_: Any) -> Any:
    """``numpy._core.multiarray._reconstruct``: an empty array, of which ``__setstate__`` makes the true one."""
    if kind is not _ArrayClass:
        raise pickle.UnpicklingError(f"{kind!r} is not allowlisted as a class of arrays")
    return sys.modules["numpy"].ndarray((0,), "b")


def allowed(arrays: bool) -> Iterator[tuple[Any, str]]:
    """What may be brought back, with its name in a pickle. Arrays of objects and of records may not.

    Args:
        arrays: Whether arrays are ours to allow. No, where the user has allowed ``numpy.ndarray`` as a whole.
    """
    numpy = sys.modules.get("numpy")  # PyTorch has imported it where it is installed
    if numpy is None:
        return
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    for home in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the version that has written the file
        yield multiarray.scalar, f"{home}.scalar"
        if arrays:
            yield _new_array, f"{home}._reconstruct"
    if arrays:
        yield _ArrayClass, "numpy.ndarray"
        yield numpy.ndarray, "array"  # may get a state; no pickle can call it by a name that has no dot
    yield numpy.dtype, "numpy.dtype"
    for code in "?bBhHiIlLqQefdFDSUmM":
        kind = type(numpy.dtype(code))
        yield kind, f"numpy.dtypes.{kind.__name__}"
