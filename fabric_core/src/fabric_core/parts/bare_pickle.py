"""Looking at a pickle without reading it back: which functions and classes would it ask for?"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


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


def harmful_call(file: BinaryIO, pickles: int = 1) -> str | None:
    """What PyTorch allows a pickle to ask for, and does harm. Nothing is imported or called.

    Those are PyTorch's types of distributed tensors, whose making joins a process group, and types that allocate as
    much as they are told by a number.

    Args:
        file: Some pickles, one after the other.
        pickles: How many.

    Returns:
        A dotted name; ``None`` when there is nothing of the sort.

    Raises:
        Exception: Of any kind: these are no whole pickles.
    """
    return next((name for _ in range(pickles) for name in _harmful(file)), None)


def may_harm(pickled: bytes) -> bool:
    """Whether a pickle so much as names what `harmful_call` looks for. Quick."""
    return _NAMED.search(pickled) is not None


_NAMED = re.compile(rb"\n(?:bytearray|\w*Tensor|(?:Unt|T)ypedStorage)\n|ctorch\.distributed")
_SIZED = re.compile(r"(?:builtins|__builtin__) bytearray|torch\S* \w*(?:Tensor|Storage)")
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")


def _harmful(pickled: BinaryIO) -> Iterator[str]:
    """Follow one pickle as far as needed to know which numbers are given to what."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(pickled):
        name = operation.name
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name:
            memo[argument] = stack[-1]
        else:
            taken = _take(stack, marks, operation)
            if name == "GLOBAL" and argument.startswith("torch.distributed"):
                yield argument.replace(" ", ".")
            elif name in ("REDUCE", "NEWOBJ") and _is_sized(*taken):
                yield taken[0].replace(" ", ".")
            stack += _pushed(operation, argument, taken, memo)


def _is_sized(called: Any, arguments: Any) -> bool:
    named = isinstance(called, str) and _SIZED.fullmatch(called) is not None
    return named and isinstance(arguments, tuple) and any(isinstance(given, int) for given in arguments)


def _take(stack: list[Any], marks: list[int], operation: pickletools.OpcodeInfo) -> list[Any]:
    """Pop what an operation takes from the stack."""
    before = operation.stack_before
    if pickletools.stackslice in before:
        start = marks.pop() - before.index(pickletools.markobject)
    else:
        start = len(stack) - len(before)
    taken = stack[start:]
    del stack[start:]
    return taken


def _pushed(operation: pickletools.OpcodeInfo, argument: Any, taken: list[Any], memo: dict[Any, Any]) -> Any:
    """What stands on the stack afterwards: names as texts, numbers, tuples of these; ``None`` for all else."""
    if operation.name in ("GLOBAL", *_NUMBERS):
        return [argument]
    if "GET" in operation.name:
        return [memo.get(argument)]
    if "TUPLE" in operation.name:
        return [tuple(taken)]
    return [None for _ in operation.stack_after]
