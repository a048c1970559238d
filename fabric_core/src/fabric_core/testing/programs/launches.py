"""A script that launches: ``python -m fabric_core.testing.programs.launches FOLDER``.

``FOLDER/asked.json`` says with which launcher, and what; every rank writes down who it is, and the script what came
back. A launcher that starts the script again brings the ranks to the same line; they know it by their variables.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DOCUMENTED = (
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LONG = 60.0


class NoLuckError(Exception):
    """What a rank fails with."""


def who(folder: str, name: str) -> dict[str, Any]:
    """Say who this rank is."""
    answer = {key: os.environ.get(key) for key in DOCUMENTED} | {"pid": os.getpid()}
    _write(Path(folder, f"{name}-{os.environ.get('RANK')}.json"), answer)
    return answer


def fail(folder: str, name: str) -> None:
    """Rank 1 fails, the others wait for it."""
    who(folder, name)
    if os.environ["RANK"] == "1":
        raise NoLuckError("no such luck")
    time.sleep(LONG)


def be_killed(folder: str, name: str) -> None:
    """Rank 1 is killed, the others wait for it."""
    who(folder, name)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG)


def wait(folder: str, name: str) -> None:
    """Wait to be ended."""
    who(folder, name)
    time.sleep(LONG)


FUNCTIONS: dict[str, Callable[[str, str], Any]] = {
    "who": who,
    "alone": who,
    "fail": fail,
    "be_killed": be_killed,
    "wait": wait,
}


def main(folder: Path) -> None:
    """Launch what was asked for, one after the other."""
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    if "RANK" in os.environ:
        (name,) = asked["launches"]
        FUNCTIONS[name](str(folder), name)
        return
    launcher, before, told = _launcher(asked), dict(os.environ), {}
    for number, name in enumerate(asked["launches"]):
        told[name] = _launch(launcher, folder, name)
        told[name] |= {"environment": _changed(before), "left": _left(), "held": _held()}
        _write(folder / "told.json", told | {"launches": number + 1})


def _launch(launcher: Any, folder: Path, name: str) -> dict[str, Any]:
    from fabric_core.contracts.launcher import LaunchJob
    from fabric_core.errors import LaunchError, RankFailedError

    began = time.monotonic()
    job = LaunchJob(1 if name == "alone" else 2)
    try:
        result = launcher.launch(partial(FUNCTIONS[name], str(folder), name), job)
        told: dict[str, Any] = {"result": result}
    except RankFailedError as error:
        told = {"error": str(error), "rank": error.rank, "exit code": error.exit_code}
    except LaunchError as error:  # one that it refuses is no reason not to look at the others
        told = {"error": str(error)}
    return {**told, "seconds": time.monotonic() - began}


def _launcher(asked: dict[str, Any]) -> Any:
    from fabric_core.registry import default_registry
    from fabric_core.testing.parts import made

    return made(default_registry().one("launcher", asked["name"]), asked["options"])


def _changed(before: dict[str, str]) -> list[str]:
    now = dict(os.environ)
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _left() -> list[str]:
    """The processes that this one has started and that are still there, dead or alive.

    But for the one in which Python keeps books on semaphores, which stays until the end.
    """
    import psutil

    left = []
    for child in psutil.Process().children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            if "resource_tracker" not in words:
                left.append(f"{child.pid} {child.status()} {words[:200]}")
        except psutil.NoSuchProcess:
            continue
    return left


def _held() -> dict[str, int]:
    import psutil

    own = psutil.Process()
    return {"file descriptors": own.num_fds(), "threads": own.num_threads(), "semaphores": _semaphores()}


def _semaphores() -> int:
    """How many semaphores that have a name this process uses; others on the machine have some, too."""
    maps, shared = Path("/proc/self/maps"), Path("/dev/shm")
    if not (maps.exists() and shared.is_dir()):
        return 0
    lines = [
        line.split() for line in maps.read_text(encoding="utf-8").splitlines() if "/dev/shm/sem." in line
    ]
    # By inode: the name under which one is created is not the one that it keeps.
    used = {words[4] for words in lines}
    return sum(str(entry.inode()) in used for entry in os.scandir(shared))


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
