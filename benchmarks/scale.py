"""What it costs one rank to begin a job of many, with the other ranks simulated.

    .venv/bin/python benchmarks/scale.py

PyTorch's fake process group stands for the collectives, and a store that lies for the other ranks: whatever they count
or answer is there at once. So only what this rank does itself is measured: calls of Python and C functions, operations
on the store, CPU time. What PyTorch does for so many ranks is in it; ``plain`` is that share, without this library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import ClusterEnvironment, Fabric

PER_NODE = 8
VERB = "save"
SIZES = (8, 64, 512, 4_096, 32_768, 65_536)


_ports = itertools.count(29_500)


class OneOfMany(ClusterEnvironment):
    """The environment of the last rank of a job, or of another one."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, world_size: int, rank: int) -> None:
        self._world_size, self._rank = world_size, rank
        self.main_port = next(_ports)  # stores are kept by their address

    def world_size(self) -> int:
        """How many ranks there are said to be."""
        return self._world_size

    def global_rank(self) -> int:
        """Which of them this is."""
        return self._rank

    def local_rank(self) -> int:
        """Of eight."""
        return self._rank % PER_NODE

    def node_rank(self) -> int:
        """Of one per eight ranks."""
        return self._rank // PER_NODE

    def shared_store(self, timeout: timedelta) -> Any:
        """The simulated one."""
        return SimulatedStore(self._world_size, self._rank)


class SimulatedStore(dist.HashStore):
    """As if all other ranks had come before this one, and done what it does.

    Attributes:
        operations: How often each method was called.
    """

    last: SimulatedStore

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__()
        self.others, self.rank = world_size - 1, rank
        self.operations: Counter[str] = Counter()
        self.plan = ""
        SimulatedStore.last = self

    def add(self, key: str, amount: int) -> int:
        """Count, after all others have."""
        self.operations["add"] += 1
        counts_ranks = key.endswith(("/come", "/confirmed", f"/{VERB}"))
        if counts_ranks and not super().check([key]):
            super().add(key, self.others)
        return int(super().add(key, amount))

    def set(self, key: str, value: str) -> None:
        """As PyTorch's."""
        self.operations["set"] += 1
        super().set(key, value)

    def get(self, key: str) -> bytes:
        """As PyTorch's; the others have the same plan."""
        self.operations["get"] += 1
        if key.startswith("fabric/plan/") and not super().check([key]):
            super().set(key, self.plan if key.endswith("/0") else json.dumps(""))
        return bytes(super().get(key))

    def check(self, keys: list[str]) -> bool:
        """As PyTorch's."""
        self.operations["check"] += 1
        return bool(super().check(keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Rank 0 has answered."""
        self.operations["wait"] += 1
        for key in keys:
            if not super().check([key]):
                super().set(key, "fabric/simulated")  # the answer of rank 0

    def delete_key(self, key: str) -> bool:
        """As PyTorch's."""
        self.operations["delete_key"] += 1
        return bool(super().delete_key(key))


@dataclass
class Cost:
    """What one phase cost this rank."""

    calls: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    milliseconds: float = 0.0


def costs(world_size: int, rank: int | None = None, strategy: str = "ddp") -> dict[str, Cost]:
    """Begin a training as one rank of so many, phase by phase.

    Args:
        world_size: How many ranks the job has; a multiple of 8.
        rank: Which of them this is (default: the last).
        strategy: How it trains.
    """
    who = OneOfMany(world_size, world_size - 1 if rank is None else rank)
    found: dict[str, Cost] = {}
    with _counting(found, "construct"):
        fabric = Fabric(
            accelerator="cpu",
            devices=PER_NODE,
            num_nodes=world_size // PER_NODE,
            strategy=strategy,
            strategy_options={"process_group_backend": "fake"},
            plugins=[who],
        )
    with _counting(found, "meet"):
        fabric.strategy.store  # noqa: B018
    # What has a prefix is asked by PyTorch's own code, which knows nothing of a class in Python.
    joined: Any = fabric.strategy
    joined._store = SimulatedStore(world_size, who.global_rank())
    SimulatedStore.last.plan = json.dumps({"node": 0, "plan": dict(fabric.plan.fingerprint())})
    with _counting(found, "launch"):
        fabric.launch()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _counting(found, "setup"):
        fabric.setup(model, optimizer)
    rows = TensorDataset(torch.zeros(4 * max(SIZES), 1))
    with _counting(found, "setup_dataloaders"):
        loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=2))
    with _counting(found, "first batch"):
        next(iter(loader))
    with _counting(found, "barrier"):
        fabric.barrier()
    with _counting(found, "agree"):
        fabric.strategy.agreement.meet(VERB)
        with fabric.strategy.agreement.jointly("save"):
            pass
        fabric.strategy.agreement.first_failure(None, range(world_size))
    fabric.close()
    return found


def plain(world_size: int) -> dict[str, Cost]:
    """What PyTorch does for a process group of that size, and for a module in it."""
    found: dict[str, Cost] = {}
    with _counting(found, "launch"):
        dist.init_process_group("fake", store=dist.HashStore(), rank=world_size - 1, world_size=world_size)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with _counting(found, "setup"):
        torch.nn.parallel.DistributedDataParallel(model)
    dist.destroy_process_group()
    return found


@contextmanager
def _counting(found: dict[str, Cost], phase: str) -> Iterator[None]:
    cost = found[phase] = Cost()
    before, store = SimulatedStore.last.operations.copy(), SimulatedStore.last

    def note(_frame: object, event: str, _argument: object) -> None:
        cost.calls += event in ("call", "c_call")

    began = time.process_time()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        cost.milliseconds = 1e3 * (time.process_time() - began)
        now = SimulatedStore.last
        cost.operations = dict(now.operations - (before if now is store else Counter()))


SimulatedStore.last = SimulatedStore(1, 0)


def measured(sizes: Sequence[int], rank: int | None, strategy: str) -> dict[str, dict[int, Cost]]:
    """The phases, each for every size; the first two runs are not counted."""
    for _ in range(2):
        costs(sizes[0], rank, strategy)
        plain(sizes[0])
    found: dict[str, dict[int, Cost]] = {}
    for size in sizes:
        for phase, cost in costs(size, rank, strategy).items():
            found.setdefault(phase, {})[size] = cost
        for phase, cost in plain(size).items():
            found.setdefault(f"plain: {phase}", {})[size] = cost
    return found


def main() -> None:
    """Print a table, or what it is made of."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of ranks")
    parser.add_argument("--rank", type=int, help="which rank this is (default: the last)")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    found = measured(options.sizes, options.rank, options.strategy)
    if options.json:
        whole = {phase: {size: asdict(cost) for size, cost in each.items()} for phase, each in found.items()}
        sys.stdout.write(json.dumps(whole))
        return
    table = Table(
        "phase", *(f"{size:,}" for size in options.sizes), title="calls / store operations / CPU ms"
    )
    for phase, each in found.items():
        cells = [f"{c.calls} / {sum(c.operations.values())} / {c.milliseconds:.1f}" for c in each.values()]
        table.add_row(phase, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
