"""A run that was interrupted and goes on from a checkpoint is the run that was never interrupted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from fabric_core import Fabric, seed_everything
from fabric_core.data.iteration import LoaderTracker
from fabric_core.data.loader import wrap_loader
from fabric_core.data.samplers import DistributedBatchSampler
from fabric_core.data.seed import seeded_rng

pytestmark = [
    pytest.mark.usefixtures("core_alone"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # StatefulDataLoader calls it
]

EPOCHS = 3
SIZE = 22
POINTS: tuple[Any, ...] = (2, 6, "between")
"""After how many steps checkpoints are saved: within an epoch, after its last batch; and after its loop."""


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with seeded_rng(0):
        yield


class Noisy(Dataset):
    """Samples that are augmented by numbers from all three generators; counts how often it is read in this process."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        noise = random.random(), float(np.random.rand()), float(torch.rand(1))
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Together(Noisy):
    """Loads a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Eager(Sampler):
    """A sampler that draws with Python's and NumPy's generators, as soon as it is asked to begin."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        random.shuffle(order)
        return iter(np.random.permutation(order).tolist())

    def __len__(self) -> int:
        return self.size


class Buckets(Sampler):
    """A batch sampler with batches of different sizes."""

    def __init__(self, size: int = SIZE, sized: bool = True) -> None:
        self.size = size
        if sized:
            self.length = 7

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(torch.randperm(self.size).tolist())
        for length in itertools.cycle((2, 5, 3)):
            if not (batch := list(itertools.islice(order, length))):
                return
            yield batch

    def __len__(self) -> int:
        return self.length


class Remembering(Sampler):
    """A sampler that goes on where it was left, and says so in its state."""

    def __init__(self) -> None:
        self.shift = 0

    def __iter__(self) -> Iterator[int]:
        self.shift += 5
        yield from ((index + self.shift) % SIZE for index in range(SIZE))

    def __len__(self) -> int:
        return SIZE

    def state_dict(self) -> dict[str, int]:
        return {"shift": self.shift}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.shift = state["shift"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


Maker = Callable[..., Any]
PLAIN: dict[str, Maker] = {
    "in order": lambda **o: DataLoader(Noisy(), batch_size=4, **o),
    "shuffled": lambda **o: DataLoader(Noisy(), batch_size=4, shuffle=True, **o),
    "own generator": lambda **o: DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator(), **o),
    "drop last": lambda **o: DataLoader(Noisy(), batch_size=4, shuffle=True, drop_last=True, **o),
    "one by one": lambda **o: DataLoader(Noisy(), batch_size=None, sampler=RandomSampler(range(6)), **o),
    "replacement": lambda **o: DataLoader(
        Noisy(),
        batch_size=4,
        sampler=RandomSampler(range(SIZE), replacement=True, num_samples=70, generator=generator()),
        **o,
    ),
    "weighted": lambda **o: DataLoader(
        Noisy(), batch_size=4, sampler=WeightedRandomSampler(range(1, SIZE + 1), SIZE), **o
    ),
    "subset": lambda **o: DataLoader(Subset(Noisy(), range(3, 20)), batch_size=4, shuffle=True, **o),
    "random subset": lambda **o: DataLoader(
        Noisy(), batch_size=3, sampler=SubsetRandomSampler(range(18)), **o
    ),
    "eager sampler": lambda **o: DataLoader(Noisy(), batch_size=4, sampler=Eager(), **o),
    "batch sampler": lambda **o: DataLoader(Noisy(), batch_sampler=Buckets(), **o),
    "batches at once": lambda **o: DataLoader(Together(), batch_size=4, shuffle=True, **o),
    "stateful sampler": lambda **o: DataLoader(Noisy(), batch_size=4, sampler=Remembering(), **o),
    "stateful loader": lambda **o: StatefulDataLoader(Noisy(), batch_size=4, shuffle=True, **o),
    "stateful loader, own generator": lambda **o: StatefulDataLoader(
        Noisy(), batch_size=4, shuffle=True, generator=generator(), **o
    ),
}
WORKERS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "two workers": {"num_workers": 2},
    "two persistent workers": {"num_workers": 2, "persistent_workers": True},
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)).double()


def step(model: Any, optimizer: Any, batch: torch.Tensor, backward: Callable[[Any], None]) -> None:
    loss = model(batch.reshape(-1, 4) / SIZE).square().mean()
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Run:
    """A training, its parameters at the end and what its loop was given."""

    seen: list[tuple[int, list[float]]] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    steps: int = 0

    def same_end_as(self, other: Run) -> bool:
        tail = other.seen[len(other.seen) - len(self.seen) :]
        return self.seen == tail and all(map(torch.equal, self.parameters, other.parameters))


def plain(make: Maker, seed: int, **options: Any) -> Run:
    """A loop that knows nothing of Fabric and is never interrupted."""
    seed_everything(seed)
    model, run = network(), Run()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = make(**options)
    for epoch in range(EPOCHS):
        for batch in loader:
            run.seen.append((epoch, batch.flatten().tolist()))
            step(model, optimizer, batch, lambda loss: loss.backward())
        torch.rand(3)
    run.parameters = [parameter.detach().clone() for parameter in model.parameters()]
    return run


def trained(
    make: Maker, seed: int, folder: Path, resume: Any = None, look_ahead: bool = False, **options: Any
) -> tuple[Run, Any]:
    """The same with Fabric: a checkpoint after every step and every epoch, or on from one of them."""
    seed_everything(seed)
    run = Run()
    with Fabric(accelerator="cpu") as fabric:
        model = network()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        loader = fabric.setup_dataloaders(make(**options))
        state = {"model": model, "optimizer": optimizer, "loader": loader, "steps": 0}
        if resume is not None:
            fabric.load(folder / str(resume), state)
        points = POINTS if resume is None else ()
        for epoch in range(loader.epoch, EPOCHS):
            for batch in loader:
                assert loader.epoch == epoch
                run.seen.append((epoch, batch.flatten().tolist()))
                if look_ahead:
                    _ = loader.is_last_batch
                step(model, optimizer, batch, fabric.backward)
                state["steps"] += 1
                if state["steps"] in points:
                    fabric.save(folder / str(state["steps"]), state)
            torch.rand(3)
            if epoch == 0 and points:
                fabric.save(folder / "between", state)
        run.parameters = [parameter.detach().clone() for parameter in model.parameters()]
        run.steps = state["steps"]
        return run, loader


# -- exact ---------------------------------------------------------------------------------------------------------


WITH_WORKERS = ("own generator", "one by one", "eager sampler", "stateful loader")


@pytest.mark.parametrize(
    ("name", "workers"),
    [(name, "no workers") for name in PLAIN]
    + [(name, workers) for name in WITH_WORKERS for workers in list(WORKERS)[1:]],
)
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(
    name: str, workers: str, tmp_path: Path
) -> None:
    make, options = PLAIN[name], WORKERS[workers]
    whole, _ = trained(make, 5, tmp_path, **options)
    if not options:
        assert whole.same_end_as(plain(make, 5))
    for point in POINTS:
        resumed, loader = trained(make, 77, tmp_path, resume=point, **options)
        assert resumed.steps == whole.steps
        assert resumed.same_end_as(whole), point
        if not options:
            data = getattr(loader.dataset, "dataset", loader.dataset)
            assert data.reads == sum(len(batch) // 4 for _, batch in resumed.seen)


# -- other shares, without processes ---------------------------------------------------------------------------------


def wrapped(make: Maker, ranks: int, seed: int = 3, **options: Any) -> list[Any]:
    """The loaders of all ranks, in this process."""
    return [
        wrap_loader(
            make(),
            device=None,
            num_replicas=ranks,
            rank=rank,
            seed=seed,
            tracker=LoaderTracker(),
            shard=True,
            seed_workers=True,
            **options,
        )
        for rank in range(ranks)
    ]


def epoch_of(loaders: list[Any], batches: int | None = None) -> tuple[list[Any], list[Any]]:
    """The samples in global order that the loops of all ranks give, and the states after some batches.

    Ranks take turns at samples; at batches, if a batch sampler of the user's decides what is in one.
    """
    given = []
    states: list[Any] = [None] * len(loaders)
    for rank, loader in enumerate(loaders):
        mine: list[list[Any]] = []
        whole = isinstance(loader.batch_sampler, DistributedBatchSampler | Pairs)
        for number, batch in enumerate(loader, 1):
            batch = torch.atleast_1d(torch.as_tensor(batch)).tolist()
            mine += [batch] if whole else [[sample] for sample in batch]
            if number == batches:
                states[rank] = loader.state_dict()
                break
        given.append(mine)
    return [sample for turn in zip(*given, strict=True) for part in turn for sample in part], states


class Pairs(Sampler):
    """A batch sampler with batches of one and three in turn."""

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(torch.randperm(48).tolist())
        return (list(itertools.islice(order, size)) for size in (1, 3) * 12)

    def __len__(self) -> int:
        return 24


ORDERS: dict[str, Callable[[int], Maker]] = {
    "in order": lambda size: lambda: DataLoader(range(48), batch_size=size),
    "shuffled": lambda size: lambda: DataLoader(range(48), batch_size=size, shuffle=True),
    "own generator": lambda size: (
        lambda: DataLoader(range(48), batch_size=size, shuffle=True, generator=generator())
    ),
    "own sampler": lambda size: lambda: DataLoader(range(48), batch_size=size, sampler=Eager(48)),
    "one by one": lambda _: lambda: DataLoader(range(48), batch_size=None, shuffle=True),
    "batch sampler": lambda _: lambda: DataLoader(range(48), batch_sampler=Pairs()),
    "stateful loader": lambda size: lambda: StatefulDataLoader(range(48), batch_size=size, shuffle=True),
    "stateful loader with workers": lambda size: (
        lambda: StatefulDataLoader(Noisy(48), batch_size=size, shuffle=True, num_workers=2)
    ),
    "workers": lambda size: lambda: DataLoader(Noisy(48), batch_size=size, shuffle=True, num_workers=2),
}
"""With so many samples in a batch. Where workers add noise, it has to be the same, too."""

IN_SIXTEEN = {"one by one": 16, "batch sampler": 8}
"""How many batches there are in 16 samples; where that is not told, as many as the batches are large."""

CHANGES = list(itertools.product((1, 2, 4), repeat=2))


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [(name, *change) for name in ORDERS for change in (CHANGES if "workers" not in name else CHANGES[1::3])],
)
def test_on_any_number_of_ranks_the_same_order_goes_on(name: str, before: int, after: int) -> None:
    first, second = (ORDERS[name](8 // ranks) for ranks in (before, after))
    given, next_given = (IN_SIXTEEN.get(name, 2 * ranks) // ranks for ranks in (before, after))
    seed_all(1)
    loaders = wrapped(first, before)
    whole, _ = epoch_of(loaders)
    if before > 1:
        later, _ = epoch_of(loaders)
    seed_all(1)
    begun, states = epoch_of(wrapped(first, before), given)
    assert begun == whole[:16]
    torch.manual_seed(99)
    loaders = wrapped(second, after, seed=8)
    for rank, loader in enumerate(loaders):
        loader.load_state_dict(states[rank % before])
    rest, again = epoch_of(loaders, next_given)
    assert rest == whole[16:32]
    for rank, loader in enumerate(loaders):  # interrupted once more, in what was taken over
        loader.load_state_dict(again[rank])
    assert epoch_of(loaders)[0] == whole[32:]
    if before > 1:
        assert epoch_of(loaders)[0] == later


@pytest.mark.parametrize("name", ["shuffled", "batch sampler", "stateful loader"])
def test_other_ranks_that_save_before_they_were_given_anything_are_where_they_began(name: str) -> None:
    whole, _ = epoch_of(wrapped(ORDERS[name](4), 2))
    _, states = epoch_of(wrapped(ORDERS[name](4), 2), IN_SIXTEEN.get(name, 4) // 2)
    for _ in range(2):
        loaders = wrapped(ORDERS[name](2), 4)
        for rank, loader in enumerate(loaders):
            loader.load_state_dict(states[rank % len(states)])
        unread = [iter(loader) for loader in loaders]
        states = [loader.state_dict() for loader in loaders]
        del unread
    for loader, state in zip(loaders, states, strict=True):
        loader.load_state_dict(state)
    assert epoch_of(loaders)[0] == whole[16:]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (4, 2)])
@pytest.mark.parametrize("name", ["shuffled", "batch sampler", "stateful loader", "workers"])
def test_at_the_end_of_an_epoch_other_ranks_have_nothing_left_and_go_on_with_the_next(
    name: str, before: int, after: int
) -> None:
    first, second = (ORDERS[name](8 // ranks) for ranks in (before, after))
    loaders = wrapped(first, before)
    _, in_the_last = epoch_of(loaders, 3 * IN_SIXTEEN.get(name, 2 * before) // before)
    between = [loader.state_dict() for loader in loaders]
    later, _ = epoch_of(loaders)
    for states, left in ((in_the_last, [[]]), (between, [])):
        loaders = wrapped(second, after, seed=8)
        for rank, loader in enumerate(loaders):
            loader.load_state_dict(states[rank % before])
        for expected in (*left, later):
            assert epoch_of(loaders)[0] == expected
