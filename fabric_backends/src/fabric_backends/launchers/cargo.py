"""What travels between the parent and its new processes: a call and a result.

Tensors are copied. PyTorch's own way of sending them would put them into memory that all processes share, where the
ranks would overwrite each other's weights, and would leave the file descriptors of that memory behind.
"""

from __future__ import annotations

import copyreg
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from fabric_core.errors import LaunchError


@dataclass
class Call:
    """A function with its arguments, in the process that calls it or on its way there."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def unpack(self) -> Call:
        """The call itself. Arguments that came by a fork share no weights with other processes from now on."""
        for module in _modules_in((self.function, self.args, self.kwargs)):
            _own_memory(module)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled when it is sent to a new process; what its arguments share with this one has to be inherited."""
        try:
            return PackedCall, (_dumps((self.function, self.args, self.kwargs)),)
        except Exception as error:
            raise LaunchError(
                f"{_name(self.function)} and its arguments cannot be sent to new processes, because they do not pickle "
                f"({type(error).__name__}: {error}). {_WAYS_OUT}"
            ) from error


@dataclass
class PackedCall:
    """A `Call` on its way. It is unpacked late, where a failure can be told."""

    data: bytes

    def unpack(self) -> Call:
        """The call.

        Raises:
            LaunchError: Something that it refers to is not there.
        """
        try:
            return Call(*_loads(io.BytesIO(self.data)))
        except Exception as error:
            raise LaunchError(
                f"The function to run cannot be found in the new process ({type(error).__name__}: {error}). {_WAYS_OUT}"
            ) from error


_WAYS_OUT = (
    "A process that is spawned imports what it runs: define the function and its classes at the top level of a module "
    "or script, not within a function, and not in a notebook. Or fork: strategy='ddp_fork', and in a notebook "
    "strategy='ddp_notebook', send nothing."
)


def write_result(path: Path, result: Any) -> None:
    """Leave what the function returned for the parent.

    Raises:
        LaunchError: It cannot be pickled.
    """
    try:
        with path.open("wb") as file:
            torch.save(result, file)
    except OSError as error:
        raise LaunchError(f"The result of the function cannot be written to {path}: {error}") from error
    except Exception as error:
        raise LaunchError(
            f"The function returned a {type(result).__qualname__}, which cannot be sent back from its process "
            f"({type(error).__name__}: {error}). Return tensors, numbers, text, or collections of them."
        ) from error


def read_result(path: Path) -> Any:
    """What `write_result` left, its tensors on the CPU; ``None`` when the process left nothing.

    Raises:
        LaunchError: It cannot be brought back to life here.
    """
    if not path.exists():
        return None
    try:
        return _loads(path, "cpu")
    except Exception as error:
        raise LaunchError(
            f"The result of the function cannot be taken over from its process ({type(error).__name__}: {error}). "
            "Return tensors, numbers, text, or collections of them."
        ) from error


class _Pickler(ForkingPickler):
    """Sends queues, locks and pipes as ``multiprocessing`` does, but not tensors as PyTorch does."""

    def __init__(self, file: Any, protocol: int | None = None) -> None:
        super().__init__(file, protocol)
        extra: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        own = {cls: reduce for cls, reduce in extra.items() if cls.__module__.partition(".")[0] != "torch"}
        self.dispatch_table = {**copyreg.dispatch_table, **own}


def _dumps(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, pickle_module=SimpleNamespace(__name__=__name__, Pickler=_Pickler))
    return buffer.getvalue()


def _loads(source: Any, device: str | None = None) -> Any:
    """Written by our own parent or child, into its memory or a directory that is closed to others."""
    return torch.load(source, map_location=device, weights_only=False)


def _modules_in(obj: Any) -> Iterator[nn.Module]:
    """Modules among arguments: in containers, bound to a method, captured or named by a function."""
    seen, rest = set[int](), [obj]
    while rest:
        obj = rest.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if isinstance(obj, nn.Module):
            yield obj
        else:
            rest.extend(_parts_of(obj))


def _parts_of(obj: Any) -> Iterator[Any]:
    if isinstance(obj, (list, tuple, set)):
        yield from obj
    elif isinstance(obj, dict):
        yield from obj.values()
    elif isinstance(obj, partial):
        yield from (obj.func, obj.args, obj.keywords)
    elif isinstance(obj, MethodType):
        yield from (obj.__self__, obj.__func__)
    elif isinstance(obj, FunctionType):
        for cell in obj.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield cell.cell_contents
        for name in obj.__code__.co_names:
            found = obj.__globals__.get(name)
            if not isinstance(found, FunctionType) or found.__globals__ is obj.__globals__:
                yield found


def _own_memory(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.is_shared():  # type: ignore[no-untyped-call]
            tensor.data = tensor.data.clone()


def _name(function: Callable[..., Any]) -> str:
    return f"The function {getattr(function, '__qualname__', repr(function))!r}"
