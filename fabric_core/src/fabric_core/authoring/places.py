"""Where in an author's own files something happens: the line of a frame, of an exception, of a class."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

Place = tuple[str, int]

_DEFINES = re.compile(r"\s*(async\s+)?(def|class)\s")


class Places:
    """Tells the author's lines from those of everybody else.

    Args:
        own: The author's package, a folder or a file.
    """

    def __init__(self, own: Path) -> None:
        self._own = own.resolve()

    def is_own(self, file: str | None) -> bool:
        """Whether a file is the author's."""
        return bool(file) and Path(str(file)).resolve().is_relative_to(self._own)

    def of_error(self, error: BaseException) -> Place | None:
        """The author's line that raised, or that led to it; ``None`` when none did."""
        if isinstance(error, SyntaxError) and self.is_own(error.filename):
            return str(error.filename), error.lineno or 0
        frames = traceback.extract_tb(error.__traceback__)
        return next(((f.filename, f.lineno or 0) for f in reversed(frames) if self.is_own(f.filename)), None)

    def innermost(self) -> Place | None:
        """The author's line that is at work now, the nearest one."""
        return next(self._at_work(), None)

    def outermost(self) -> Place | None:
        """The author's line that is at work now, the one that began it."""
        return next(reversed(list(self._at_work())), None)

    def _at_work(self) -> Iterator[Place]:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if self.is_own(frame.f_code.co_filename):
                yield frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back

    def of_definition(self, defined: Any) -> Place | None:
        """Where a class or function is defined; ``None`` when that is not in the author's files."""
        try:
            file, (lines, first) = inspect.getsourcefile(defined), inspect.findsource(defined)
        except (OSError, TypeError):  # made at run time, or written in C
            return None
        below = range(first, len(lines))  # the first line may be that of a decorator
        line = next((index for index in below if _DEFINES.match(lines[index])), first)
        return (str(file), line + 1) if self.is_own(file) else None
