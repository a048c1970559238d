"""Discovery of plugins.

How long it takes to find the plugins among 50, 300 and 1,000 installed distributions, a third of which have entry
points of other groups. Plain is what the standard library takes to read one group
(``importlib.metadata.entry_points``). What lightning-fabric does at each ``Fabric()`` is measured; accelerate has no
plugins. Caches of the import system are emptied before each call, as in a new process; those of the disk are not.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from harness import LIGHTNING, OURS, PLAIN, Case, Measure, Operation, Operations, main

OURS_INSTALLED = ("fabric-core", "fabric-backends", "fabric-cuda", "fabric-xla", "fabric-deepspeed")


def plain(case: str) -> Operation:
    """The standard library."""
    return _among(int(case), lambda: metadata.entry_points(group="fabric_core.plugins"))


def lightning_fabric(case: str) -> Operation:
    """The peer's search for callbacks of other distributions."""
    from lightning_fabric.utilities.registry import _load_external_callbacks

    return _among(int(case), lambda: _load_external_callbacks("lightning.fabric.callbacks_factory"))


def fabric(case: str) -> Operation:
    """A registry, filled anew."""
    from fabric_core.registry import Registry

    def fill() -> None:
        assert Registry().problems == []

    return _among(int(case), fill)


_PATH = list(sys.path)
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _among(number: int, search: Callable[[], object]) -> Operation:
    """Let the search see our distributions, and as many others as make the number; nothing else is on the path."""
    sys.path[:] = _PATH
    search()  # imports what it needs while that can be found
    _KEPT.append(tempfile.TemporaryDirectory())
    folder = Path(_KEPT[-1].name)
    for name in OURS_INSTALLED:
        found = metadata.distribution(name)
        info = Path(str(found.locate_file(f"{name.replace('-', '_')}-{found.version}.dist-info")))
        shutil.copytree(info, folder / info.name)
    for index in range(number - len(OURS_INSTALLED)):
        _install(folder, f"package_{index}", with_entry_points=index % 3 == 0)

    def run() -> None:
        sys.path[:] = [str(folder)]
        importlib.invalidate_caches()
        search()

    return run


def _install(folder: Path, name: str, with_entry_points: bool) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    (info / "METADATA").write_text(f"{head}\n{'A package like others. ' * 100}\n", encoding="utf-8")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n" * 30, encoding="utf-8")
    if with_entry_points:
        (info / "entry_points.txt").write_text(f"[console_scripts]\n{name} = {name}:main\n", encoding="utf-8")


FIGURE = Operations(
    name="discovery",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, OURS: fabric},
    cases=tuple(Case(name, calls=1, rounds=30) for name in ("50", "300", "1000")),
    measures=(Measure("cpu", "ms", "CPU"), Measure("wall", "ms", "wall"), Measure("calls", "", "calls")),
)

if __name__ == "__main__":
    main(FIGURE)
