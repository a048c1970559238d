"""Somebody who follows a page of the documentation: writes what it shows, runs it, and compares what is printed."""

from __future__ import annotations

import doctest
import os
import re
import site
import subprocess
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outside import outside_of_jobs

PAGES = Path(__file__).parents[3] / "docs" / "plugins"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"# (\S+\.\w+)\n")
EXIT_CODE = re.compile(r"\s+# exit code (\d+)$")
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

OFFLINE = {"python -m build": "python -m build --no-isolation"}
"""What the tests call in place of what a page shows, because they download nothing."""

MODULES = {"fabric": "fabric_core", "pip": "pip", "pytest": "pytest", "twine": "twine"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page: its language, what is in it, and the line of the page where it begins."""

    language: str
    code: str
    line: int

    @property
    def file(self) -> str:
        """The file that its first line names; empty when it names none."""
        named = NAME.match(self.code)
        return named[1] if named and self.language != "console" else ""

    @property
    def is_program(self) -> bool:
        """Whether it is a Python file outside of every folder, which can be run where it lies."""
        return self.file.endswith(".py") and "/" not in self.file


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in BLOCK.finditer(text)
    ]


class Untrue(Exception):
    """A page shows what is not so."""


class Reader:
    """Somebody who follows a page: in a folder and an environment that hold nothing else, as an author would.

    The environment sees what is installed in ours. What the page installs goes into its own.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / "work"
        self.folder.mkdir()
        self._where = home / "where"
        environment = home / "environment"
        venv.create(environment, symlinks=True, with_pip=False)
        self._bin = environment / "bin"
        (packages,) = environment.glob("lib/*/site-packages")
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
        (packages / "ours.pth").write_text("".join(lines), encoding="utf-8")
        for command, module in MODULES.items():
            script = self._bin / command
            script.write_text(f'#!/bin/sh\nexec "{self._bin}/python" -m {module} "$@"\n', encoding="utf-8")
            script.chmod(0o755)

    @property
    def _environ(self) -> dict[str, str]:
        environ = outside_of_jobs("PYTHON", "PIP_")
        return environ | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "error",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "dist",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of build_isolation
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def write(self, block: Block) -> None:
        """Put a file where the page says."""
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code.partition("\n")[2], encoding="utf-8")

    def shell(self, script: str, environ: Mapping[str, str] | None = None) -> str:
        """Run a script, and stay in the folder where it ends; what it printed."""
        ending = f'\npwd > "{self._where}"'
        done = subprocess.run(
            ["sh", "-e", "-c", script + ending],
            cwd=self.folder,
            env=self._environ | dict(environ or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        if done.returncode != 0:
            raise Untrue(f"{script}\nended with {done.returncode}:\n{done.stdout}")
        self.folder = Path(self._where.read_text(encoding="utf-8").strip())
        return done.stdout

    def console(self, block: Block) -> None:
        """Do what a block shows, and compare what is printed; ``...`` stands for anything."""
        commands, shown = conversation(block.code)
        printed = self.shell("\n".join(map(command, commands)))
        if not doctest.OutputChecker().check_output(shown, printed, LOOSELY):
            raise Untrue(f"{block.code}\nprinted:\n{printed}")


def conversation(code: str) -> tuple[list[str], str]:
    """The commands of a console block, and what it shows of their answers."""
    commands, shown = [], []
    for line in code.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
        elif commands and commands[-1].endswith("\\"):
            commands[-1] += f"\n{line}"
        else:
            shown.append(f"{line}\n")
    return commands, "".join(shown)


def command(line: str) -> str:
    """A command as the tests run it: without an index, and with the exit code that the page states."""
    for shown, offline in OFFLINE.items():
        line = line.replace(shown, offline)
    wanted = EXIT_CODE.search(line)
    return (
        line if wanted is None else f"{{ {line[: wanted.start()]}; }} && exit 99 || test $? -eq {wanted[1]}"
    )


def follow(page: Path, home: Path) -> None:
    """Do all that a page shows, in its order."""
    found = blocks(page)
    called = [line for block in found if block.language == "console" for line in conversation(block.code)[0]]
    reader = Reader(home)
    for block in found:
        try:
            if block.file:
                reader.write(block)
            if block.language == "console":
                reader.console(block)
            elif block.is_program and not any(f" {block.file}" in line for line in called):
                reader.shell(f"python {block.file}")
        except (Untrue, subprocess.TimeoutExpired) as error:
            raise Untrue(f"{page.name}, line {block.line}:\n{error}") from error
