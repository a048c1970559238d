"""Makes torch_xla on the CPU take this machine for one with two chips, for a process each, as it does on a TPU.

Python imports this first, where its folder is in ``PYTHONPATH``. Nothing is imported before its time: what torch_xla
asks its devices is replaced when it is imported itself. The place of a process is what torch_xla's launch tells it, or
what stands in the file that the variable ``XLA_PLACE`` names.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHIPS = 2


def place() -> dict[str, int] | None:
    """Where this process is; ``None`` outside of a job."""
    if "XLA_PLACE" in os.environ:
        told: dict[str, int] = json.loads(Path(os.environ["XLA_PLACE"]).read_text())
        return told
    rank = os.environ.get("PJRT_LOCAL_PROCESS_RANK")
    if rank is None:
        return None
    size, ordinal = int(os.environ["PJRT_LOCAL_PROCESS_COUNT"]), int(rank)
    return {
        "world_size": size,
        "global_ordinal": ordinal,
        "local_ordinal": ordinal,
        "local_device_count": size,
        "host_index": 0,
    }


def runtime(module: Any) -> None:
    """The questions about ranks."""
    for name in ("world_size", "global_ordinal", "local_ordinal", "local_device_count", "host_index"):
        setattr(module, name, answering(name, getattr(module, name)))


def answering(name: str, theirs: Callable[[], int]) -> Callable[[], int]:
    def answer() -> int:
        here = place()
        return theirs() if here is None else here[name]

    return answer


def model(module: Any) -> None:
    """A process sees one device only."""
    every = module.get_xla_supported_devices
    module.get_xla_supported_devices = lambda *args, **kwargs: every(*args, **kwargs)[:1]


def launching(module: Any) -> None:
    """A process is started for each chip."""
    chips = SimpleNamespace(
        physical_chip_count=lambda: CHIPS, configure_multiprocess=lambda local_rank, local_world_size: None
    )
    module.plugins = SimpleNamespace(using_dynamic_plugins=lambda: True, default=lambda: chips)
    module._merge_replica_results = dict  # every process takes its device for the first one


CHANGES = {
    "torch_xla.runtime": runtime,
    "torch_xla.core.xla_model": model,
    "torch_xla._internal.pjrt": launching,
}


class Changing(MetaPathFinder):
    """Finds these modules, and changes them once they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in CHANGES else None
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        load = spec.loader.exec_module

        def load_and_change(module: Any) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changing())
