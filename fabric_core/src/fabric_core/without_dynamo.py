"""Keeps ``torch._dynamo`` out of a start that compiles nothing: half its CPU time, 70 MB and 800 modules.

Making any optimizer, stepping it, and making a ``DistributedDataParallel`` import the compiler, only to tell it that
there is nothing to compile. As long as it is not loaded, nobody can be compiling, so that these calls need not tell.

[Note: stepping aside] All of this rests on private parts of PyTorch. So it is done for versions that we have read and
tested, only where each of the places looks as we know it, all or nothing; and it is undone when anybody begins to
import ``torch._dynamo``, before its first line runs, so that the compiler never sees anything but PyTorch's own code.
``FABRIC_WITHOUT_DYNAMO=0`` turns it off. Design: docs/design/0026.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["VARIABLE", "keep_dynamo_out"]

VARIABLE = "FABRIC_WITHOUT_DYNAMO"
"""Set to 0, it leaves PyTorch as it is."""

_VERSIONS = ("2.13",)
_DYNAMO = "torch._dynamo"
_COMES_WITH_DYNAMO = {
    "torch.distributed": ("fsdp", "nn", "tensor"),
    "torch.fx.experimental": ("dynamic_spec", "recording", "symbolic_shapes"),
    "torch.fx.passes": ("graph_transform_observer",),
}
"""Public modules of PyTorch that nobody has to import, because the first optimizer has always brought them along."""


def keep_dynamo_out() -> None:
    """From now on, or from PyTorch's import on, keep the compiler out until somebody imports it.

    Called as early as it suits, on any thread, as often as one likes; PyTorch need not be imported, and is not. Does
    nothing where the variable says so, where the compiler is loaded already, and where PyTorch is none that we know.
    """
    if os.environ.get(VARIABLE) == "0" or _DYNAMO in sys.modules or _watch in sys.meta_path:
        return
    sys.meta_path.insert(0, _watch)
    if "torch" in sys.modules:
        _watch.begin()


class _UnknownLayoutError(Exception):
    """A place in PyTorch is not what we know."""


class _Change:
    """One attribute that has another value as long as the compiler is not loaded."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.before = getattr(owner, name, _ABSENT)

    def make(self) -> None:
        setattr(self.owner, self.name, self.value)

    def undo(self) -> None:
        """Put back what was there, unless somebody else has changed it since."""
        if getattr(self.owner, self.name, _ABSENT) is not self.value:
            return
        if self.before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


_ABSENT = object()


class _Watch:
    """The first finder of imports. It finds nothing: it learns of PyTorch's import, then of the compiler's."""

    def __init__(self) -> None:
        self.changes: list[_Change] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _DYNAMO:
            self.end()
            return importlib.util.find_spec(
                name
            )  # who searches a list that has become shorter, passes one by
        return self._found_by_others(name) if name == "torch" else None

    def begin(self) -> None:
        """Make the changes, if PyTorch is one that we know, and they are not made yet."""
        if self.changes:
            return
        try:
            changes = list(_changes(sys.modules["torch"]))
        except (_UnknownLayoutError, AttributeError, KeyError):
            self.end()
            return
        for change in changes:
            change.make()
        self.changes = changes

    def end(self) -> None:
        """Leave PyTorch as it was."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self.changes:
            self.changes.pop().undo()

    def _found_by_others(self, name: str) -> ModuleSpec | None:
        """What the other finders say, with our beginning at the end of the module's execution."""
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            _follow(spec.loader, self.begin)
        return spec


def _follow(loader: Any, then: Callable[[], None]) -> None:
    """Do something when a loader has executed its module."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        then()

    loader.exec_module = exec_module


_watch = _Watch()


# -- the places in PyTorch ----------------------------------------------------------------------------------------


def _changes(torch: Any) -> Iterator[_Change]:
    """Every change, none made yet.

    Raises:
        _UnknownLayoutError: PyTorch is not one that we know. So do missing names, as other errors.
    """
    if not torch.__version__.startswith(tuple(f"{version}." for version in _VERSIONS)):
        raise _UnknownLayoutError
    optimizer, distributed = torch.optim.Optimizer, torch.nn.parallel.distributed
    parallel = distributed.DistributedDataParallel
    for name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        yield _told_already(torch, optimizer.__dict__[name])
    yield _told_already(torch, parallel.__dict__["_inside_ddp_forward"].__wrapped__)
    for step in _steps(sys.modules["torch.optim.optimizer"]):
        yield _Change(step, "__code__", _CODE_OF_A_STEP)
    yield _Change(parallel, "__init__", _constructor(torch, parallel.__dict__["__init__"]))
    for package, names in _COMES_WITH_DYNAMO.items():
        yield _Change(sys.modules[package], "__getattr__", _brings(package, names))
    unpickler = torch._weights_only_unpickler
    yield _Change(unpickler, "_get_user_allowed_globals", _asked_again(unpickler))


def _told_already(torch: Any, wrapper: FunctionType) -> _Change:
    """A function under ``torch._disable_dynamo``, which keeps in an attribute how to call it with the compiler told."""
    function = wrapper.__wrapped__  # type: ignore[attr-defined]
    if wrapper.__code__ not in torch._compile._disable_dynamo.__code__.co_consts or _TOLD in vars(function):
        raise _UnknownLayoutError
    return _Change(function, _TOLD, function)


_TOLD = "__dynamo_disable"


def _steps(module: Any) -> Iterator[FunctionType]:
    """What ``_use_grad_for_differentiable`` has made of the optimizers' methods ``step``."""
    codes = module._use_grad_for_differentiable.__code__.co_consts
    known = [code for code in codes if isinstance(code, CodeType) and _looks_like_a_step(code)]
    if len(known) != 1:
        raise _UnknownLayoutError
    classes = [module.Optimizer]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        step = cls.__dict__.get("step")
        while step is not None and getattr(step, "__code__", None) is not known[0]:
            step = getattr(step, "__wrapped__", None)
        if step is not None:
            yield step


def _looks_like_a_step(code: CodeType) -> bool:
    names = {
        _DYNAMO,
        "cast",
        "Optimizer",
        "is_grad_enabled",
        "set_grad_enabled",
        "defaults",
        "_dynamo",
        "graph_break",
    }
    return set(code.co_names) == names and code.co_freevars == _CODE_OF_A_STEP.co_freevars


def _like_a_step(func: Callable[..., Any]) -> Any:
    """PyTorch's, less the two breaks of a graph that nobody records. Runs among the names of torch.optim.optimizer."""

    def _use_grad(*args: Any, **kwargs: Any) -> Any:
        prev_grad = torch.is_grad_enabled()  # type: ignore[name-defined]  # noqa: F821
        try:
            torch.set_grad_enabled(args[0].defaults["differentiable"])  # type: ignore[name-defined]  # noqa: F821
            return func(*args, **kwargs)
        finally:
            torch.set_grad_enabled(prev_grad)  # type: ignore[name-defined]  # noqa: F821

    return _use_grad


_CODE_OF_A_STEP: CodeType = _like_a_step(print).__code__


def _constructor(torch: Any, original: Callable[..., None]) -> Callable[..., None]:
    """That of ``DistributedDataParallel``, which asks the compiler's settings how it is to optimize."""
    if not {"_dynamo", "utils", "get_optimize_ddp_mode"} <= set(original.__code__.co_names):
        raise _UnknownLayoutError

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        with _answering(torch):
            original(self, *args, **kwargs)

    return __init__


@contextmanager
def _answering(torch: Any) -> Iterator[None]:
    """Let ``torch._dynamo`` be what answers that question. It is no module that could be imported; those win."""
    names = vars(torch)
    if _DYNAMO not in sys.modules:
        names.setdefault("_dynamo", _answer)
    try:
        yield
    finally:
        if names.get("_dynamo") is _answer:
            del names["_dynamo"]


class _Unloaded:
    """Knows a few names of a module; any other one imports it."""

    def __init__(self, module: str, **known: Any) -> None:
        self._module = module
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


def _standard_mode() -> str:
    """What the compiler says to `DistributedDataParallel` as long as nobody has changed its settings."""
    return "ddp_optimizer"


_answer = _Unloaded(_DYNAMO, utils=_Unloaded(f"{_DYNAMO}.utils", get_optimize_ddp_mode=_standard_mode))


def _brings(package: str, names: tuple[str, ...]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: what the compiler would have brought is there when it is asked for."""
    if "__getattr__" in vars(sys.modules[package]):
        raise _UnknownLayoutError

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names and f"{package}.{name}" not in sys.modules:  # else it is just being imported
            importlib.import_module(_DYNAMO)
            return getattr(sys.modules[package], name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def _asked_again(unpickler: Any) -> Callable[[], dict[str, Any]]:
    """What may be loaded by ``torch.load``; a name that is not among it is looked for again with the compiler loaded.

    Its import declares further classes as safe.
    """
    declared = unpickler._get_user_allowed_globals

    class Allowed(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            return super().__contains__(name) or name in self._after_loading()

        def __missing__(self, name: str) -> Any:
            return self._after_loading()[name]

        def _after_loading(self) -> dict[str, Any]:
            importlib.import_module(_DYNAMO)
            later: dict[str, Any] = declared()
            return later

    def _get_user_allowed_globals() -> dict[str, Any]:
        return Allowed(declared())

    return _get_user_allowed_globals
