"""A batch through a data loader.

A batch is a dict of 4 tensors that lie ready (``batch_size=None``), so only the way through the loader is measured;
the plain loop does not even call ``.to``. One operation is an epoch of 200 batches; numbers are per batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Measure,
    Operation,
    Operations,
    Target,
    main,
)

BATCHES = 200


def plain(_case: str) -> Operation:
    """``DataLoader`` itself."""
    return _epoch_of(_loader())


def lightning_fabric(_case: str) -> Operation:
    """The peer's loader."""
    from lightning_fabric import Fabric

    return _epoch_of(Fabric(accelerator="cpu", devices=1).setup_dataloaders(_loader()))


def accelerate(_case: str) -> Operation:
    """The peer's loader."""
    from accelerate import Accelerator

    return _epoch_of(Accelerator(cpu=True).prepare(_loader()))


def fabric(_case: str) -> Operation:
    """Ours."""
    from fabric_core import Fabric

    ours = Fabric(accelerator="cpu", devices=1)
    ours.launch()
    return _epoch_of(ours.setup_dataloaders(_loader()))


def _loader() -> Any:
    import torch
    from torch.utils.data import DataLoader

    batches = [{key: torch.zeros(8, 8) for key in "abcd"} for _ in range(BATCHES)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _epoch_of(loader: Iterable[Any]) -> Operation:
    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


FIGURE = Operations(
    name="loader",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(Case("", calls=3, rounds=100, per=BATCHES),),
    measures=(Measure("cpu", "µs", "CPU"), Measure("wall", "µs", "wall"), Measure("calls", "", "calls")),
    targets=(Target("", "cpu", 2, Against.OVER),),
)

if __name__ == "__main__":
    main(FIGURE)
