"""The pages for authors are true: what they show is run from top to bottom and compared, and nothing is stale."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "plugins"
GENERATE = ROOT / "docs" / "tools" / "generate.py"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"# (\S+\.\w+)\n")
EXIT_CODE = re.compile(r"\s+# exit code (\d+)$")
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

PARSERS: Mapping[str, Callable[[str], object]] = {
    "python": lambda code: compile(code, "block", "exec"),
    "pyi": lambda code: compile(code, "block", "exec"),
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": yaml.safe_load,
}
"""The languages of blocks, beside ``console``: everything that is shown can be looked at by a machine."""

OFFLINE = {"python -m build": "python -m build --no-isolation"}
"""What the tests call in place of what a page shows, because they download nothing."""

MODULES = {"fabric": "fabric_core", "pip": "pip", "pytest": "pytest", "twine": "twine"}
OURS = (
    "FABRIC_",
    "MASTER_",
    "RANK",
    "LOCAL_",
    "WORLD_",
    "NODE_",
    "GROUP_",
    "TORCHELASTIC_",
    "PYTHON",
    "PIP_",
)


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
        environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
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
            raise AssertionError(f"{script}\nended with {done.returncode}:\n{done.stdout}")
        self.folder = Path(self._where.read_text(encoding="utf-8").strip())
        return done.stdout

    def console(self, block: Block) -> None:
        """Do what a block shows, and compare what is printed; ``...`` stands for anything."""
        commands, shown = conversation(block.code)
        printed = self.shell("\n".join(map(command, commands)))
        if not doctest.OutputChecker().check_output(shown, printed, LOOSELY):
            raise AssertionError(f"{block.code}\nprinted:\n{printed}")


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


def pages() -> list[str]:
    """The pages that show something."""
    return [page.name for page in sorted(PAGES.glob("*.md")) if blocks(page)]


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
        except (AssertionError, subprocess.TimeoutExpired) as error:
            pytest.fail(f"{page.name}, line {block.line}:\n{error}", pytrace=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", pages())
def test_what_a_page_shows_works(page: str, tmp_path: Path) -> None:
    follow(PAGES / page, tmp_path)


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ("```python\n# odd.py\nassert 1 > 2\n```\n", "AssertionError"),
        ("```console\n$ echo one\ntwo\n```\n", "printed:\none"),
        ("```console\n$ fabric --version  # exit code 3\n```\n", "ended with 99"),
        ("```console\n$ cd nowhere\n```\n", "nowhere"),
    ],
)
def test_a_page_that_shows_what_is_not_so_is_found(shown: str, told: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"One line.\n\n{shown}", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="page.md, line 3") as failure:
        follow(page, tmp_path)
    assert told in str(failure.value)


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_can_be_looked_at_by_a_machine(page: str) -> None:
    for block in blocks(PAGES / page):
        where = f"docs/plugins/{page}, line {block.line}"
        assert block.language in (*PARSERS, "console"), f"{where}: nothing here reads {block.language!r}"
        assert block.language != "python" or block.file, f"{where}: Python that is never run; name its file"
        if block.language == "console":
            assert conversation(block.code)[0], f"{where}: no command; begin its line with '$ '"
        else:
            PARSERS[block.language](block.code)


DIVIDED = """
import sys

import torch

import averaging
from fabric_core import Fabric

torch.set_default_dtype(torch.float64)
torch.manual_seed(int(sys.argv[2]))
features = torch.randn(6, 2, 8, 3)
fabric = Fabric(accelerator="cpu", strategy="averaging")
fabric.launch()
torch.manual_seed(int(sys.argv[2]) + fabric.global_rank)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
for window in features:
    for batch in window:
        mine = batch[fabric.global_rank :: fabric.world_size]
        with fabric.accumulate(model, every=2):
            fabric.backward(model(mine).square().mean())
            fabric.clip_gradients(model, optimizer, max_norm=0.9)
            optimizer.step()
            optimizer.zero_grad()
torch.save(model.state_dict(), f"{sys.argv[1]}-{fabric.global_rank}.pt")
fabric.close()
"""
"""A training by the strategy of the tutorial. Only rank 0 begins with the weights that the plain loop begins with."""


def test_the_strategy_of_the_tutorial_equals_a_plain_loop_on_two_processes(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for block in blocks(PAGES / "tutorial.md"):
        if block.file == "averaging.py":
            reader.write(block)
    (reader.folder / "divided.py").write_text(DIVIDED, encoding="utf-8")
    reader.shell("fabric run --devices=2 divided.py weights 7")
    found = [torch.load(reader.folder / f"weights-{rank}.pt") for rank in (0, 1)]

    double = {"dtype": torch.float64}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        features = torch.randn(6, 2, 8, 3, **double)
        torch.manual_seed(7)
        layers = (torch.nn.Linear(3, 4, **double), torch.nn.Tanh(), torch.nn.Linear(4, 1, **double))
        model = torch.nn.Sequential(*layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for window in features:
        optimizer.zero_grad()
        for batch in window:
            (model(batch).square().mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.9)
        optimizer.step()

    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name])
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][name], value, rtol=1e-12, atol=1e-12)


def generate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Call the generator on a folder of pages."""
    return subprocess.run(
        [sys.executable, "-W", "error", GENERATE, *options, folder],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_generated_parts_of_the_pages_are_what_the_code_says() -> None:
    done = generate(PAGES, *(() if os.environ.get("FABRIC_WRITE_DOCS") else ("--check",)))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_no_longer_says_what_the_code_says_is_found(tmp_path: Path) -> None:
    page = tmp_path / "strategy.md"
    shutil.copy(PAGES / page.name, page)
    assert generate(tmp_path).returncode == 0
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("### `setup_module`", "### `set_up_module`"), encoding="utf-8")
    done = generate(tmp_path, "--check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{page}: stale; write it anew with: make docs-write"]
    assert "set_up_module" in page.read_text(encoding="utf-8"), "with --check nothing is written"
    assert generate(tmp_path).returncode == 0
    assert page.read_text(encoding="utf-8") == text
