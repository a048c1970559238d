"""Looking at a pickle without reading it back: which functions and classes would it ask for?"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any


def globals_of(path: Path) -> list[str] | None:
    """The functions and classes that a file of ``pickle.dump`` asks for. Nothing is imported or called.

    Returns:
        Their dotted names (``?`` where a hostile file hides one); ``None`` when the file is no whole pickle.
    """
    names: list[str] = []
    texts: list[Any] = ["?", "?"]
    memo: dict[int, Any] = {}
    try:
        with path.open("rb") as file:
            argument: Any
            for operation, argument, _ in pickletools.genops(file):
                name = operation.name
                if name in ("GLOBAL", "INST"):
                    names.append(argument.replace(" ", "."))
                elif name == "STACK_GLOBAL":
                    names.append(f"{texts[-2]}.{texts[-1]}")
                elif "UNICODE" in name or "STRING" in name:
                    texts = [texts[-1], argument]
                elif name == "MEMOIZE" or "PUT" in name:
                    memo[len(memo) if argument is None else argument] = texts[-1]
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    texts = [texts[-1], memo.get(argument, "?")]
    except Exception:  # whatever comes of taking any bytes for a pickle
        return None
    return list(dict.fromkeys(names))
