"""The program that every rank runs, and how it is found again."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from fabric_core.errors import LaunchError
from fabric_core.supervisor.variables import MODULE_FLAG


@dataclass(frozen=True)
class RankCommand:
    """The program that every rank runs.

    Attributes:
        target: The path of a script (or of a folder or archive with a ``__main__``), or the name of a module.
        is_module: Whether ``target`` is the name of a module, as after ``python -m``.
        args: What the program finds in ``sys.argv[1:]``.
    """

    target: str
    is_module: bool = False
    args: tuple[str, ...] = ()

    def check(self) -> None:
        """Find out before anything is started whether there is a script to run.

        Raises:
            LaunchError: There is none.
        """
        if not self.is_module and not os.path.exists(self.target):
            raise LaunchError(
                f"There is no script {self.target!r} in {os.getcwd()}. "
                "Give the path of a file, or -m and the name of a module."
            )

    def argv(self) -> list[str]:
        """The command line of a rank, with the interpreter's flags of this process (``-O``, ``-W``, ``-X`` …)."""
        if not sys.executable:
            raise LaunchError(
                "Python does not know its own executable here, so no further process can be started."
            )
        flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        if getattr(sys.stdout, "write_through", False):
            flags.append("-u")
        module = [MODULE_FLAG] if self.is_module else []
        return [sys.executable, *flags, "-m", "fabric_core.rank", *module, self.target, *self.args]

    def folder(self) -> str:
        """What the program finds first on ``sys.path``."""
        if self.is_module:
            return os.getcwd()
        path = os.path.join(os.getcwd(), self.target)
        return os.path.dirname(os.path.realpath(path)) if _main_in([path]) is None else path

    def source(self) -> bytes:
        """The text of the program, as far as it is found without importing anything; else nothing."""
        path = os.path.join(os.getcwd(), self.target)
        spec = self._module() if self.is_module else _main_in([path])
        loader: Any = SourceFileLoader("__main__", path) if spec is None else spec.loader
        try:
            text: bytes = loader.get_data(path if spec is None else spec.origin)
        except (OSError, AttributeError):  # it is not there, or a module without text
            return b""
        return text

    def _module(self) -> ModuleSpec | None:
        """The module, or the ``__main__`` of the package; ``None`` when it is not found."""
        places: list[str] | None = [os.getcwd(), *sys.path]
        spec, name = None, ""
        for part in self.target.split("."):
            name = f"{name}.{part}" if name else part
            spec = PathFinder.find_spec(name, places)
            if spec is None:
                return None
            places = spec.submodule_search_locations
        return _main_in(places) if places else spec


def _main_in(places: list[str]) -> ModuleSpec | None:
    """The ``__main__`` of folders or archives; ``None`` when there is none, or they are files."""
    return PathFinder.find_spec("__main__", places)


def current_command() -> RankCommand:
    """The program that is running now, so that it can be started again.

    Raises:
        LaunchError: This is an interactive session, or code that came from no file.
    """
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    args = tuple(sys.argv[1:])
    if spec is not None and spec.name != "__main__":
        return RankCommand(spec.name.removesuffix(".__main__"), True, args)
    if spec is not None:
        return RankCommand(sys.argv[0], False, args)
    if file is None or not os.path.exists(file):
        raise LaunchError(
            "The running program cannot be started again, because it is no script: this is an interactive "
            "session, a notebook, or code given by -c. Put it into a file, or choose a launcher that forks."
        )
    # The path as it was typed, unless the program has changed its folder or its arguments since.
    typed = os.path.abspath(sys.argv[0]) == os.path.abspath(file)
    return RankCommand(sys.argv[0] if typed else file, False, args)
