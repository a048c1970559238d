"""The worker processes of loaders: which signals end them, and what they leave alone."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from fabric_core import Fabric

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there")


class Pids(Dataset[int]):
    """Which process has loaded a sample, after it has collected its garbage."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, _: int) -> int:
        gc.collect()
        return os.getpid()


def loaded(fabric: Fabric) -> DataLoader[int]:
    return fabric.setup_dataloaders(DataLoader(Pids(), batch_size=None, num_workers=1, prefetch_factor=1))


def test_a_worker_loads_on_when_an_end_is_announced_and_ends_when_it_is_told_twice() -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        batches = iter(loaded(fabric))
        pid = int(next(batches))
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, signum)
        assert [int(next(batches)) for _ in range(4)] == [pid] * 4
        os.kill(pid, signal.SIGTERM)
        psutil.Process(pid).wait(20)


class Group:
    """Becomes garbage that nothing frees but a collection; tells where that happened."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.itself = folder, self

    def __del__(self) -> None:
        (self.folder / str(os.getpid())).touch()


def test_a_worker_does_not_collect_what_was_garbage_before_it_was_there(tmp_path: Path) -> None:
    """A process group that was left hangs, or crashes, where its threads do not exist."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        loader = loaded(fabric)
        gc.disable()
        try:
            Group(tmp_path)
            batches = iter(loader)
            assert {int(next(batches)) for _ in range(3)} != {os.getpid()}
            assert not list(tmp_path.iterdir())
        finally:
            gc.enable()
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
