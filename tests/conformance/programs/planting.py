"""What test_mutations.py asks of processes forked from a warm one: make plugins, plant faults, run checks.

A function of this module may change the folder, the environment and the modules of its process: it is the only one
that is called there.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

PRELOADED = ["hatchling.build", "numpy", "psutil", "pytest", "torch._dynamo", "torch.distributed.tensor"]
"""What the warm process has imported. Nothing of Fabric's: what a check finds there, it has imported itself."""


def make(kind: str, folder: Path, replaced: dict[str, Path]) -> None:
    """Make a plugin, as ``fabric plugins new`` does, and install it under ``site``, as its wheel is."""
    from hatchling.build import build_wheel

    from fabric_core.cli import fabric

    fabric.main(["plugins", "new", kind, "sample", f"--dir={folder}"], standalone_mode=False)
    for name, source in replaced.items():
        shutil.copy(source, folder / name)
    os.chdir(folder)
    with redirect_stdout(io.StringIO()):
        wheel = build_wheel("..")
    zipfile.ZipFile(folder.parent / wheel).extractall(folder / "site")


def plant(made: Path, folder: Path, file: str, old: str, new: str) -> None:
    """Copy a plugin, and change one text of it."""
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("__pycache__", "src"))
    place = re.sub("^dist-info/", "../fabric_sample-0.1.0.dist-info/", file)
    path = folder / "site" / "fabric_sample" / place
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    planted = text.replace(old, new)
    if path.suffix == ".py":
        compile(planted, path, "exec")  # a fault of the plugin, not of its syntax
    path.write_text(planted, encoding="utf-8")


def run_checks(project: Path, checks: tuple[str, ...]) -> list[Any]:
    """Run some checks of a plugin.

    Returns:
        The entries of the kit's report.
    """
    import pytest

    report = project / "report.json"
    os.chdir(project)
    os.environ["PYTHONPATH"] = str(project / "site")
    sys.path[:0] = [str(project), str(project / "site")]
    words = [
        "-q",
        "--no-header",
        "-pno:cacheprovider",
        "-pno:hypothesispytest",
        f"--fabric-conformance={report}",
    ]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = pytest.main([*words, f"-k={' or '.join(checks)}"])
    assert code in (0, 1), f"pytest ended with {code}\n{printed.getvalue()}"
    return list(json.loads(report.read_text(encoding="utf-8"))["results"])


def run_checks_with_fault(made: Path, project: Path, file: str, old: str, new: str, check: str) -> list[Any]:
    """Plant a fault, and run the check that is about it. As `run_checks`."""
    plant(made, project, file, old, new)
    return run_checks(project, (check,))
