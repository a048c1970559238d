"""Loads every file of the corpus, and prints a line of JSON about each. Run as ``hostile_loading.py FOLDER``."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # PyTorch allows its types from then on
from hostile_files import FILES

from fabric_core.errors import CheckpointError
from fabric_core.parts.torch_file import TorchFile

_opened: list[str] = []
_watching: list[Path] = []
_HARMLESS = ("/proc/", sys.prefix, sys.base_prefix, str(Path(__file__).parents[3]))


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        name = os.path.abspath(os.fsdecode(arguments[0]))
        if name != str(_watching[0]) and not name.startswith(_HARMLESS):
            _opened.append(name)
    elif event.partition(".")[0] in ("subprocess", "socket", "shutil") or event in (
        "os.system",
        "os.exec",
        "os.fork",
    ):
        _opened.append(f"{event}{arguments}")


def _peak() -> int:
    """Bytes of memory at the most since the last call; 0 where the kernel does not say."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
    Path("/proc/self/clear_refs").write_text("5")
    return found


def _attempt(path: Path) -> dict[str, Any]:
    _opened.clear()
    _peak()
    before = _peak()
    _watching.append(path)
    message, error = "", "none"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TorchFile().load(path)
    except CheckpointError as refused:
        error, message = type(refused).__name__, str(refused)
    except BaseException:
        error, message = "another", traceback.format_exc()
    finally:
        _watching.clear()
    return {"error": error, "message": message, "opened": list(_opened), "grown": _peak() - before}


def main(folder: Path) -> Iterator[dict[str, Any]]:
    """What comes of each file."""
    TorchFile().save(folder / "warm", {"w": torch.ones(1)})  # imports what has to be imported
    TorchFile().load(folder / "warm")
    (folder / "warm").unlink()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_notice)
    for name, write in FILES.items():
        place = folder / name
        place.mkdir()
        path = place / "x.pt"
        os.chdir(place)
        write(path)
        before = sorted(entry.name for entry in folder.iterdir())
        found = _attempt(path)
        left = sorted({entry.name for entry in place.iterdir()} - {"x.pt"})
        left += sorted({entry.name for entry in folder.iterdir()} - set(before))
        yield {"name": name, **found, "left": left, "imported": "antigravity" in sys.modules}
        if path.is_file() and not path.is_symlink():
            path.unlink()


if __name__ == "__main__":
    for line in main(Path(sys.argv[1])):
        print(json.dumps(line), flush=True)
