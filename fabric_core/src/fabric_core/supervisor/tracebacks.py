"""What a user sees of an exception: their own frames, in the form that they have chosen."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from types import TracebackType

_LONGEST_SUMMARY = 200
_IMPORT_MACHINERY = {"importlib", "_frozen_importlib", "_frozen_importlib_external"}


def strip_plumbing(error: BaseException) -> None:
    """Let the traceback of ``error`` start at the user's first frame.

    Frames that lead to the user's code say so themselves, by a local variable ``__tracebackhide__``.
    """
    entry = error.__traceback__
    while entry is not None and _is_plumbing(entry):
        entry = entry.tb_next
    error.__traceback__ = entry


def _is_plumbing(entry: TracebackType) -> bool:
    frame = entry.tb_frame
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return "__tracebackhide__" in frame.f_locals or package in _IMPORT_MACHINERY


def summary_of(error: BaseException) -> str:
    """``ValueError: the first line of the message``."""
    name = type(error).__qualname__
    lines = "".join(traceback.format_exception_only(type(error), error)).splitlines()
    line = next((line for line in lines if name in line), name)
    return line if len(line) <= _LONGEST_SUMMARY else f"{line[:_LONGEST_SUMMARY]}…"


def text_of(error: BaseException, *, by_hook: bool) -> str:
    """The traceback of ``error``; where the program has set a ``sys.excepthook`` of its own, as that shows it."""
    plain = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if not by_hook or sys.excepthook is sys.__excepthook__:
        return plain
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        show(error)
    shown = stream.getvalue()
    return plain if _is_marked(plain, shown) else shown


def _is_marked(plain: str, shown: str) -> bool:
    """Whether ``shown`` is ``plain`` with a mark before each line, such as the rank, or nothing at all."""
    lines, marked = plain.splitlines(), shown.splitlines()
    same = len(lines) == len(marked) and all(map(str.endswith, marked, lines))
    return same or not shown


def show(error: BaseException) -> None:
    """Show ``error`` as the interpreter would."""
    sys.excepthook(type(error), error, error.__traceback__)
