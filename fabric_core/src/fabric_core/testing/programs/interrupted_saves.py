"""Saves that end before they are done: the disk is full, or the process is killed.

Each save runs in a fork of this process, which need not import PyTorch again.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

SIZE = 200_000  # numbers, which is a save of some milliseconds
LIMIT = 100_000  # bytes


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Interrupt saves, and look at what is there afterwards.

    Args:
        arguments: ``what``: ``"kill"`` or ``"full"``; ``part``: kind, name and options of the checkpoint io; ``path``:
            where to save; ``kills``: how many times.
    """
    from fabric_core.registry import default_registry
    from fabric_core.testing.parts import made

    torch.set_num_threads(1)  # a fork has no pool of threads
    kind, name, options = arguments["part"]
    io = made(default_registry().one(kind, name), options)
    path = Path(arguments["path"])
    io.save(path, _state(0))
    if arguments["what"] == "full":
        return _on_a_full_disk(io, path)
    return _killed(io, path, arguments["kills"])


def _killed(io: Any, path: Path, kills: int) -> dict[str, Any]:
    chance = random.Random(0)
    seconds = _seconds_of_a_save(io, path)
    newest, damaged = 1, []
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _save_for_ever(io, path, newest, writing)
        os.close(writing)
        if chance.random() < 0.7:  # else it may be the first save that is interrupted
            os.read(reading, 1)
        time.sleep(chance.uniform(0, 1.5) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        try:
            found = io.load(path)
        except Exception as error:
            damaged.append(f"{type(error).__name__}: {error}")
            io.save(path, _state(newest))
            continue
        number = found["number"]
        if not bool((found["values"] == number).all()) or number < newest:
            damaged.append(f"it holds values of several saves, or of one before {newest}: {number}")
        newest = max(newest, number)
    return {"damaged": damaged, "advanced": newest, "left": _left_for_days(io, path)}


def _left_for_days(io: Any, path: Path) -> list[str]:
    """What is there beside the checkpoint after a save two days later."""
    before = time.time() - 2 * 24 * 3600
    for file in path.parent.rglob("*"):
        os.utime(file, (before, before))
    io.save(path, _state(0))
    return [entry.name for entry in path.parent.iterdir() if entry != path]


def _save_for_ever(io: Any, path: Path, number: int, told: int) -> None:
    while True:
        number += 1
        io.save(path, _state(number))
        os.write(told, b".")


def _seconds_of_a_save(io: Any, path: Path) -> float:
    began = time.monotonic()
    io.save(path, _state(1))
    return time.monotonic() - began


def _on_a_full_disk(io: Any, path: Path) -> dict[str, Any]:
    """A limit for the size of a file fails a write in the same place as a disk without room."""
    import resource

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            io.save(path, _state(1))
            told = "no error:it was saved"
        except Exception as error:
            told = f"{type(error).__name__}:{error}"
        os.write(writing, told.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        kind, _, message = answer.read().partition(":")
    os.waitpid(child, 0)
    try:
        intact = io.load(path)["number"] == 0
    except Exception as error:
        sys.stderr.write(f"after a full disk: {error}\n")
        intact = False
    entries = len(list(path.parent.iterdir()))
    return {"error": kind, "message": message, "old is intact": intact, "entries": entries}


def _state(number: int) -> dict[str, Any]:
    return {"number": number, "values": torch.full((SIZE,), float(number))}
