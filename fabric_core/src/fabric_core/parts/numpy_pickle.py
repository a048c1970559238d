"""NumPy's numbers, texts and arrays in a pickle, read without trust.

[Note: arrays without trust] Neither ``numpy.ndarray`` nor ``numpy.dtype`` can be had while a file is read: called as
``ndarray((1,), "O", buffer)``, or given a state with flags of its choice, NumPy takes bytes of the file for pointers to
objects. A stand-in is read in their place ([Note: stand-ins]), and the true arrays are made from the text of a dtype
and from bytes.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterator
from typing import Any

from fabric_core.parts.stand_ins import StandIn

_DTYPE = re.compile(r"[biufcSUmM]\d+")
"""Numbers, texts and dates of a fixed size: what needs no objects."""


class _Dtype(StandIn):
    """Stands for ``numpy.dtype``."""

    def __init__(self, text: Any, *_: Any) -> None:
        if not (isinstance(text, str) and _DTYPE.fullmatch(text)):
            raise pickle.UnpicklingError(f"the dtype {text!r} is not allowlisted")
        self._text, self._order = text, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subdtype, names, fields, *rest = state
        if (subdtype, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("a dtype with fields is not allowlisted")
        self._order = order if order in ("<", ">") else "="
        if self._text[0] in "mM" and len(rest) > 3:
            unit, number = rest[3][1][:2]
            unit = unit.decode("ascii") if isinstance(unit, bytes) else str(unit)
            self._text = f"{self._text}[{int(number)}{unit if unit.isalpha() else ''}]"

    def real(self) -> Any:
        """The true dtype."""
        dtype = sys.modules["numpy"].dtype(self._text)
        return dtype if self._order == "=" else dtype.newbyteorder(self._order)


class _Array(StandIn):
    """Stands for an array, and for its class where that is an argument."""

    _value: Any = None

    def __init__(self, *_: Any) -> None:
        raise pickle.UnpicklingError("numpy.ndarray is not allowlisted to be called")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, content = state
        if not (isinstance(dtype, _Dtype) and isinstance(content, bytes)):
            raise pickle.UnpicklingError(
                "an array of anything but plain numbers and texts is not allowlisted"
            )
        numpy, order = sys.modules["numpy"], "F" if by_columns else "C"
        flat = numpy.frombuffer(bytearray(content), dtype.real()) if content else numpy.zeros(0, dtype.real())
        self._value = flat.reshape(shape, order=order)

    def real(self) -> Any:
        """The true array."""
        return self._value


def _new_array(kind: Any, *_: Any) -> Any:
    """``numpy._core.multiarray._reconstruct``."""
    if kind is not _Array:
        raise pickle.UnpicklingError(f"{kind!r} is not allowlisted as a class of arrays")
    return object.__new__(_Array)


def _number(dtype: Any, content: Any) -> Any:
    """``numpy._core.multiarray.scalar``."""
    if not (isinstance(dtype, _Dtype) and isinstance(content, bytes)):
        raise pickle.UnpicklingError(
            "a NumPy scalar of anything but plain numbers and texts is not allowlisted"
        )
    return sys.modules["numpy"].frombuffer(content, dtype.real())[0]


def allowed(arrays: bool) -> Iterator[tuple[Any, str]]:
    """What may be brought back, with its name in a pickle. Arrays of objects and of records may not.

    Args:
        arrays: Whether arrays are ours to allow. No, where the user has allowed ``numpy.ndarray`` as a whole: then
            the user's trust in NumPy's own classes holds for their dtypes as well.
    """
    numpy = sys.modules.get("numpy")  # PyTorch has imported it where it is installed
    if numpy is None:
        return
    multiarray = sys.modules.get("numpy._core.multiarray") or sys.modules["numpy.core.multiarray"]
    for home in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the version that has written the file
        yield _number if arrays else multiarray.scalar, f"{home}.scalar"
        if arrays:
            yield _new_array, f"{home}._reconstruct"
    if arrays:
        yield _Array, "numpy.ndarray"
        yield _Dtype, "numpy.dtype"
    else:
        yield numpy.dtype, "numpy.dtype"
        yield from ((type(numpy.dtype(code)), f"numpy.dtypes.{code}") for code in "?bBhHiIlLqQefdFDSUmM")
