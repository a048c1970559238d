"""On what was measured: the machine, its load, and the versions. No name of the machine, and no path."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = ("torch", "lightning-fabric", "accelerate", "fabric-core")


def describe() -> dict[str, str]:
    """Processor, memory, system and versions."""
    return {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        **{name: version for name in DISTRIBUTIONS if (version := _version(name))},
    }


class Load:
    """How much of the machine others used in the meantime.

    Attributes:
        others: The share of all cores, from 0 to 1.
    """

    others = 0.0


@contextmanager
def watched() -> Iterator[Load]:
    """Watch the load while the block runs. Its processes have to be ended, and waited for, at its end."""
    load = Load()
    busy, total, own = *_jiffies(), _own_seconds()
    yield load
    busy_now, total_now, own_now = *_jiffies(), _own_seconds()
    all_seconds = (total_now - total) / os.sysconf("SC_CLK_TCK")
    busy_seconds = (busy_now - busy) / os.sysconf("SC_CLK_TCK")
    load.others = max(0.0, busy_seconds - (own_now - own)) / all_seconds if all_seconds else 0.0


def _jiffies() -> tuple[int, int]:
    """Of all cores together: busy, and in all."""
    first = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0]
    user, nice, system, idle, waiting, *rest = map(int, first.split()[1:])
    busy = user + nice + system + sum(rest[:3])
    return busy, busy + idle + waiting


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
