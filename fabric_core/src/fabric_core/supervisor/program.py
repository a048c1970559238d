"""Running the user's program inside a rank, as the interpreter itself would have run it."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType

from fabric_core.background import finish
from fabric_core.supervisor.entry import enter_rank
from fabric_core.supervisor.variables import ERROR_DIR, LISTEN_FD, MODULE_FLAG, SUPERVISOR_PID
from fabric_core.without_dynamo import keep_dynamo_out


def run(arguments: Sequence[str]) -> None:
    """Become the rank that the environment describes, and run ``[--module] TARGET [ARGS…]`` as ``__main__``.

    Raises:
        SystemExit: The program raised, or there is none to run.
    """
    __tracebackhide__ = True
    is_module = arguments[:1] == [MODULE_FLAG]
    target, *rest = arguments[1 if is_module else 0 :] or [""]
    if not target:
        raise SystemExit(f"usage: python -m fabric_core.rank [{MODULE_FLAG}] TARGET [ARGS…]")
    rank = int(os.environ.get("RANK", "0"))
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    supervisor = os.environ.pop(SUPERVISOR_PID, None)
    if LISTEN_FD in os.environ:
        os.set_inheritable(int(os.environ[LISTEN_FD]), False)
    parent = int(supervisor) if supervisor else None
    with enter_rank(rank, os.environ.get(ERROR_DIR), parent_pid=parent, alone=alone, excepthook=True):
        keep_dynamo_out()  # before the program makes its first optimizer
        _run_main(*(_load_module(target, rest) if is_module else _load_path(target, rest)))
        finish()
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()  # a reader that is gone is noticed here, where it can be told


def _run_main(main: ModuleType, code: CodeType) -> None:
    __tracebackhide__ = True
    main.__name__ = "__main__"
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # multiprocessing has taken what was there when it was imported
        sys.modules["__mp_main__"] = main
    exec(code, main.__dict__)


def _load_path(path: str, arguments: list[str]) -> tuple[ModuleType, CodeType]:
    """``python path``: a script, a compiled script, or a folder or archive that holds a ``__main__``."""
    __tracebackhide__ = True
    sys.argv[:] = [path, *arguments]
    path = os.path.join(os.getcwd(), path)  # not normalised, as the interpreter leaves it
    spec = PathFinder.find_spec("__main__", [path])
    if spec is not None:
        sys.path.insert(0, path)
        return importlib.util.module_from_spec(spec), _code_of(spec)
    _add_to_path(os.path.dirname(os.path.realpath(path)))
    main = ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__cached__"] = None
    if path.endswith(".pyc"):
        compiled = SourcelessFileLoader("__main__", path)
        main.__loader__ = compiled
        code = compiled.get_code("__main__")
        assert code is not None, "a loader of files has code or raises"
        return main, code
    main.__loader__ = SourceFileLoader("__main__", path)
    with io.open_code(path) as file:
        return main, compile(file.read(), path, "exec", dont_inherit=True)


def _load_module(name: str, arguments: list[str]) -> tuple[ModuleType, CodeType]:
    """``python -m name``: a module, or the ``__main__`` of a package."""
    __tracebackhide__ = True
    _add_to_path(os.getcwd())
    sys.argv[:] = ["-m", *arguments]
    spec = _find(name)
    sys.argv[0] = spec.origin or name
    return importlib.util.module_from_spec(spec), _code_of(spec)


def _find(name: str) -> ModuleSpec:
    __tracebackhide__ = True
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"{sys.executable}: No module named {name}")
    return spec if spec.submodule_search_locations is None else _find(f"{name}.__main__")


def _code_of(spec: ModuleSpec) -> CodeType:
    """Every loader of Python code has ``get_code``; one without it cannot be run by ``-m`` either."""
    __tracebackhide__ = True
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(spec.name) if get_code is not None else None
    if not isinstance(code, CodeType):
        raise SystemExit(f"{sys.executable}: {spec.name} holds no Python code that could be run")
    return code


def _add_to_path(folder: str) -> None:
    """What the interpreter puts first, unless it was told not to (``-P``, ``-I``)."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path.insert(0, folder)
