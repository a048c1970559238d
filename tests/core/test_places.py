"""Where loaders stand when a checkpoint is saved, however they are read, and what they refuse to go on from."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import one_process
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from fabric_core import CheckpointError, ConfigurationError, Fabric, WrongTypeError
from fabric_core.data.iteration import LoaderTracker
from fabric_core.data.loader import wrap_loader
from fabric_core.data.seed import seeded_rng
from fabric_core.data.streams import Streams
from fabric_core.parts.cpu import CPUAccelerator
from fabric_core.resuming import restore_place

pytestmark = [
    pytest.mark.usefixtures("core_alone"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # StatefulDataLoader calls it
]


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with seeded_rng(0):
        yield


fabric = one_process.fabric


def wrap(loader: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"num_replicas": 1, "rank": 0, "seed": 0, "shard": True, "seed_workers": None}
    return wrap_loader(loader, device=None, tracker=LoaderTracker(), **{**defaults, **options})


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def listed(batches: Any) -> list[Any]:
    return [torch.as_tensor(batch).reshape(-1).tolist() for batch in batches]


class Noisy(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(1))])


class Unsized(Sampler):
    def __init__(self, size: int = 12) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


class Stream(IterableDataset):
    """Nobody can say where it stands."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(12):
            self.reads += 1
            yield torch.tensor([float(index), random.random(), float(torch.rand(1))])


class Stateful(IterableDataset):
    """Knows where it stands."""

    def __init__(self) -> None:
        self.at = self.reads = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 12:
            self.at += 1
            self.reads += 1
            yield torch.tensor([float(self.at), float(torch.rand(1))])
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


# -- loops of all kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [0, 1, 3])
@pytest.mark.parametrize("kind", ["unsized", "stateful data set", "stateful loader"])
def test_what_was_fetched_early_is_fetched_again_with_its_own_random_numbers(kind: str, ask: int) -> None:
    def make() -> Any:
        if kind == "unsized":
            return wrap(DataLoader(Noisy(), batch_sampler=BatchSampler(Unsized(), 2, False)))
        maker = DataLoader if kind == "stateful data set" else StatefulDataLoader
        return wrap(maker(Stateful(), batch_size=2))

    def loop(loader: Any, stop: int | None = None) -> tuple[list[Any], Any, Any]:
        given = []
        for number, batch in enumerate(loader, 1):
            if ask:
                loader._fabric.tracker.current.remaining(ask)
            given.append([*batch.flatten().tolist(), float(torch.rand(1)), random.random()])
            if number == stop:
                return given, loader.state_dict(), Streams.capture()
        return given, None, None

    seed(4)
    whole, *_ = loop(make())
    assert len(whole) == 6
    for stop in (1, 4, 6):
        seed(4)
        _, state, streams = loop(make(), stop)
        seed(99)
        loader = make()
        loader.load_state_dict(state)
        streams.restore()
        begun = iter(loader)
        state, streams = loader.state_dict(), Streams.capture()  # saved once more before anything is asked
        del begun
        loader = make()
        loader.load_state_dict(state)
        streams.restore()
        assert loop(loader)[0] == whole[stop:]
        if kind != "unsized":
            assert loader.dataset.reads == 2 * (6 - stop)


def test_two_loaders_that_are_read_in_turn_keep_their_own_places(fabric: Fabric, tmp_path: Path) -> None:
    def run(fabric: Fabric, resume: bool) -> list[Any]:
        data = TensorDataset(torch.arange(20))
        real, fake, seldom = fabric.setup_dataloaders(
            *(DataLoader(data, batch_size=size, shuffle=True) for size in (4, 2, 3))
        )
        state = {"loaders": [real, fake], "seldom": seldom}
        slow = iter(seldom)
        given = []
        if resume:
            fabric.load(tmp_path / "x", state)
            slow = iter(seldom)
        else:
            next(slow)
        for turn, ((one,), (other,)) in enumerate(zip(real, fake, strict=False)):
            if turn == 1 and not resume:
                next(slow)
            given.append((one.tolist(), other.tolist(), torch.rand(1).item()))
            if turn == 2 and not resume:
                fabric.save(tmp_path / "x", state)
        return [*given, *listed(rest for (rest,) in slow), *listed(rest for (rest,) in fake)]

    torch.manual_seed(8)
    whole = run(fabric, resume=False)
    torch.manual_seed(9)
    rest = run(fabric, resume=True)
    assert len(rest) == len(whole) - 3
    assert rest == whole[3:]


def test_an_evaluation_inside_of_the_training_keeps_counting_its_epochs(
    fabric: Fabric, tmp_path: Path
) -> None:
    def run(resume: bool) -> list[Any]:
        train, check = fabric.setup_dataloaders(
            DataLoader(range(9), batch_size=3, shuffle=True), DataLoader(range(4), batch_size=2, shuffle=True)
        )
        state = {"train": train, "check": check}
        if resume:
            fabric.load(tmp_path / "x", state)
        given = []
        for _ in range(train.epoch, 3):
            for batch in train:
                given.append((train.epoch, train.position, check.epoch, batch.tolist(), listed(check)))
                if (train.epoch, train.position) == (1, 1) and not resume:
                    fabric.save(tmp_path / "x", state)
        return given

    torch.manual_seed(1)
    whole = run(resume=False)
    torch.manual_seed(2)
    assert run(resume=True) == whole[5:]


def test_the_last_batch_leaves_an_empty_loop_and_a_save_after_it_the_next_epoch(
    fabric: Fabric, tmp_path: Path
) -> None:
    loader = fabric.setup_dataloaders(DataLoader(range(4), batch_size=2))
    for _ in loader:
        if loader.is_last_batch:
            fabric.save(tmp_path / "inside", {"loader": loader})
    fabric.save(tmp_path / "after", {"loader": loader})
    for name, epoch, batches in (("inside", 0, 0), ("after", 1, 2)):
        again = fabric.setup_dataloaders(DataLoader(range(4), batch_size=2))
        fabric.load(tmp_path / name, {"loader": again})
        assert (again.epoch, again.position) == (epoch, -1)
        assert len(list(again)) == batches
        assert again.epoch == epoch + 1
        assert len(list(again)) == 2


def test_another_epoch_that_is_chosen_begins_at_its_beginning() -> None:
    loader = wrap(DataLoader(range(4)))
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    del batches
    for epoch, count in ((0, 3), (5, 4)):
        loader.load_state_dict(state)
        loader.set_epoch(epoch)
        assert loader.epoch == epoch
        assert len(list(loader)) == count


def test_going_back_while_persistent_workers_run_starts_new_ones() -> None:
    loader = wrap(DataLoader(range(8), batch_size=2, num_workers=1, persistent_workers=True, shuffle=True))
    given: list[Any] = []
    for number, batch in enumerate(loader):
        given.append(batch.tolist())
        if number == 1:
            state = loader.state_dict()
    loader.load_state_dict(state)
    assert listed(loader) == given[2:]
    assert sorted(itertools.chain(*listed(loader))) == list(range(8))


# -- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_knows_nothing_of_its_place_is_read_again_and_says_so(workers: int) -> None:
    def make() -> Any:
        return wrap(DataLoader(Stream(), batch_size=3, num_workers=workers), seed_workers=True)

    seed(3)
    whole = listed(make())
    seed(3)
    loader = make()
    batches = iter(loader)
    next(batches), next(batches)
    state, streams = loader.state_dict(), Streams.capture()
    del batches
    loader = make()
    loader.load_state_dict(state)
    torch.manual_seed(77)
    streams.restore()
    with pytest.warns(UserWarning, match="goes on after 2 batches, which are read again"):
        assert listed(loader) == whole[2:]


def test_a_loader_that_does_not_use_its_sampler_is_read_again() -> None:
    class Own(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            return iter([[1], [2], [3]])

    loader = wrap(Own(range(3)))
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    del batches
    loader.load_state_dict(state)
    with pytest.warns(UserWarning, match="read again"):
        assert list(loader) == [[3]]


class Dropping(DataLoader):
    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if batch[0] % 3)


class Joining(DataLoader):
    def __iter__(self) -> Any:
        batches = super().__iter__()
        return (torch.cat([batch, *itertools.islice(batches, 1)]) for batch in batches)


class LookingAhead(DataLoader):
    def __iter__(self) -> Any:
        return (batch for batch, _ in itertools.pairwise(itertools.chain(super().__iter__(), [None])))


class Twice(DataLoader):
    def __iter__(self) -> Any:
        return itertools.chain.from_iterable(super(Twice, self).__iter__() for _ in range(2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Dropping, Joining, LookingAhead, Twice])
def test_a_loader_whose_class_makes_other_batches_goes_on_where_it_was(
    kind: type[DataLoader[Any]], workers: int
) -> None:
    def make() -> Any:
        return wrap(kind(range(20), batch_size=2, shuffle=True, num_workers=workers))

    seed(4)
    whole = listed(make())
    for stop in (3, 5):
        seed(4)
        loader = make()
        given = listed(itertools.islice(batches := iter(loader), stop))
        state, streams = loader.state_dict(), Streams.capture()
        del batches
        loader = make()
        loader.load_state_dict(state)
        streams.restore()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given += listed(loader)
        assert given == whole
        told = any("are read again and dropped" in str(warning.message) for warning in caught)
        assert told == state["loop"]["rearranged"]
    assert told == (kind is not Twice)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_batches_of_a_class_of_its_own_have_no_place_on_other_ranks() -> None:
    loader = wrap(Joining(range(20), batch_size=2))
    batches = iter(loader)
    next(batches)
    other = wrap(Joining(range(20), batch_size=2), num_replicas=2)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(
        CheckpointError, match=r"of a Joining, whose class gives other batches.*Resume on 1 rank"
    ):
        next(iter(other))


def test_the_place_in_a_second_round_over_a_sampler_is_not_guessed() -> None:
    loader = wrap(Twice(range(4), shuffle=True))
    for number, _ in enumerate(loader):
        if number == 4:
            with pytest.raises(ConfigurationError, match="class Twice lets its sampler begin several times"):
                loader.state_dict()
    in_order = wrap(Twice(range(4)))
    batches = iter(in_order)
    assert listed(itertools.islice(batches, 5)) == [[0], [1], [2], [3], [0]]
    state = in_order.state_dict()
    del batches
    in_order.load_state_dict(state)
    with pytest.warns(UserWarning, match="read again"):
        assert listed(in_order) == [[1], [2], [3]]


def test_a_loader_that_was_not_set_up_is_refused(fabric: Fabric, tmp_path: Path) -> None:
    with pytest.raises(WrongTypeError, match="setup_dataloaders"):
        fabric.save(tmp_path / "x", {"loader": DataLoader(range(3)), "model": nn.Linear(1, 1)})


def test_other_data_in_the_middle_of_an_epoch_is_refused_and_taken_between_two() -> None:
    loader = wrap(DataLoader(range(4)))
    list(loader)
    between = loader.state_dict()
    batches = iter(loader)
    next(batches)
    other = wrap(DataLoader(range(5)))
    with pytest.raises(CheckpointError, match=r"epoch of 4 samples.*has 5"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(between)
    assert (other.epoch, len(list(other))) == (1, 5)


def test_other_batches_go_on_with_the_samples_and_other_kinds_of_batches_are_refused() -> None:
    loader = wrap(DataLoader(range(12), batch_size=2))
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    larger = wrap(DataLoader(range(12), batch_size=4))
    larger.load_state_dict(state)
    assert listed(larger) == [[4, 5, 6, 7], [8, 9, 10, 11]]
    own = wrap(DataLoader(range(12), batch_sampler=[[0], [1]]))
    own.load_state_dict(state)
    with pytest.raises(CheckpointError, match="batch sampler"):
        iter(own)


class Ordered(Sampler):
    """Indices in an order of its own; in batches, if their size is said."""

    def __init__(self, order: Any, size: int | None = None) -> None:
        self.order, self.size = list(order), size

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.order)
        if self.size is None:
            return indices
        return iter(lambda: list(itertools.islice(indices, self.size)), [])

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.size or 1))


class Hidden(Ordered):
    """An order that follows from random numbers that nobody saves."""

    numbers = random.Random(2)

    def __init__(self) -> None:
        super().__init__(range(12))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers.sample(self.order, 12))


OTHER_ORDERS: dict[str, tuple[Any, Any]] = {
    "shuffled, then not": (
        lambda: DataLoader(range(12), batch_size=2, shuffle=True),
        lambda: DataLoader(range(12), batch_size=2),
    ),
    "a sampler with hidden random numbers": (lambda: DataLoader(range(12), batch_size=2, sampler=Hidden()),)
    * 2,
    "a batch sampler with larger batches": (
        lambda: DataLoader(range(12), batch_sampler=Ordered(range(12), 2)),
        lambda: DataLoader(range(12), batch_sampler=Ordered(range(12), 3)),
    ),
    "a sampler that has become short": (
        lambda: DataLoader(range(12), batch_size=2, sampler=Ordered(range(12))),
        lambda: DataLoader(range(12), batch_size=2, sampler=Ordered(range(3))),
    ),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_another_order_in_the_middle_of_an_epoch_is_refused(name: str, ranks: int) -> None:
    make, make_other = OTHER_ORDERS[name]
    seed(5)
    loader = wrap(make())
    batches = iter(loader)
    listed(itertools.islice(batches, 3))
    state = loader.state_dict()
    del batches
    other = wrap(make_other(), num_replicas=ranks)
    other.load_state_dict(state)
    if "short" in name and ranks == 2:
        assert list(other) == []  # nothing is left that could be read twice
        return
    with pytest.raises(
        CheckpointError, match=r"the sample of index \d+ had been read last.*read some samples twice"
    ):
        next(iter(other))
    other.load_state_dict(state)
    other.set_epoch(1)  # which begins at its beginning
    assert len(list(other)) == len(other)


def test_a_share_that_a_sampler_has_made_by_itself_is_not_gone_on_with_on_other_ranks() -> None:
    class Own(DistributedSampler):
        pass

    def make(replicas: int) -> Any:
        sampler: Any = Own(range(12), replicas, 0)
        return wrap(DataLoader(range(12), batch_size=2, sampler=sampler), num_replicas=replicas)

    loader = make(2)
    given = listed(itertools.islice(batches := iter(loader), 1))
    state = loader.state_dict()
    del batches
    (again := make(2)).load_state_dict(state)
    assert given + listed(again) == listed(make(2))
    (other := make(3)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="Own of this loader decides by itself what each rank gets"):
        next(iter(other))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_sampler_whose_state_is_how_far_it_has_come_goes_on_in_any_epoch_on_any_ranks(epoch: int) -> None:
    def make(replicas: int, rank: int) -> Any:
        sampler = StatefulDistributedSampler(range(12), replicas, rank)
        return wrap(
            StatefulDataLoader(range(12), batch_size=2, sampler=sampler), num_replicas=replicas, rank=rank
        )

    def in_order(loaders: list[Any], batches: int | None = None) -> list[int]:
        parts = [itertools.chain(*listed(itertools.islice(loader, batches))) for loader in loaders]
        return [index for turn in zip(*parts, strict=True) for index in turn]

    two = [make(2, 0), make(2, 1)]
    for _ in range(epoch):
        in_order(two)
    running = [iter(loader) for loader in two]
    assert len(in_order(running, 1)) == 4
    states = [loader.state_dict() for loader in two]
    left = in_order(running)
    for ranks in (1, 2, 4):
        others = [make(ranks, rank) for rank in range(ranks)]
        for rank, loader in enumerate(others):
            loader.load_state_dict(states[rank % 2])
        assert in_order(others) == left


def test_a_place_lies_on_the_host_whatever_the_default_device_is() -> None:
    seed(5)
    with torch.device("meta"):
        state = Streams.capture().state_dict()
    drawn = random.random(), torch.rand(1).item()
    Streams.from_state_dict(state).restore()
    assert (random.random(), torch.rand(1).item()) == drawn


def test_an_iterable_data_set_goes_on_on_other_ranks_between_two_epochs_only() -> None:
    def make() -> Any:
        return wrap(DataLoader(Stateful(), batch_size=2))

    two: Any = SimpleNamespace(world_size=2, global_rank=1)
    between = (loader := make()).state_dict()
    next(batches := iter(loader))
    inside = loader.state_dict()
    del batches
    restore_place(make(), [between] * 3, two)
    restore_place(make(), [inside] * 2, two)
    with pytest.raises(
        CheckpointError, match="of an IterableDataset on 3 ranks, and there are 2 now.*Resume on 3 ranks"
    ):
        restore_place(make(), [inside] * 3, two)


def test_what_is_no_place_is_refused(fabric: Fabric, tmp_path: Path) -> None:
    loader = fabric.setup_dataloaders(DataLoader(range(3)))
    fabric.save(tmp_path / "x", {"loader": 5, "model": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="not saved with a loader"):
        fabric.load(tmp_path / "x", {"loader": loader})
    with pytest.raises(CheckpointError, match="state_dict"):
        loader.load_state_dict({"x": 1})


def test_batches_without_an_order_have_no_place() -> None:
    loader = wrap(DataLoader(range(3), num_workers=1, in_order=False))
    loader.state_dict()
    for _ in loader:
        with pytest.raises(ConfigurationError, match="in_order"):
            loader.state_dict()


def test_a_running_loop_that_is_not_in_the_state_is_named(fabric: Fabric, tmp_path: Path) -> None:
    one, other = fabric.setup_dataloaders(DataLoader(range(3)), DataLoader(range(3)))
    for _ in zip(one, other, strict=True):
        with pytest.warns(UserWarning, match="loop over a DataLoader that is not in its state"):
            fabric.save(tmp_path / "x", {"loader": one})
        fabric.save(tmp_path / "x", {"loaders": [one, other]})
        break


def test_random_numbers_that_nobody_saves_are_told(fabric: Fabric, tmp_path: Path) -> None:
    class Own(Sampler):
        def __init__(self) -> None:
            self.numbers = random.Random(2)

        def __iter__(self) -> Iterator[int]:
            return iter(self.numbers.sample(range(12), 12))

        def __len__(self) -> int:
            return 12

    class Epochs(Own):
        def set_epoch(self, epoch: int) -> None:
            self.numbers = random.Random(epoch)

    class Data(Noisy):
        def __init__(self) -> None:
            self.numbers, self.legacy = np.random.default_rng(2), np.random.RandomState(2)

    def save(loader: Any) -> None:
        fabric.save(tmp_path / "x", {"loader": fabric.setup_dataloaders(loader)})

    with pytest.warns(
        UserWarning, match=r"loader whose Own draws from random numbers of its own \(numbers\)"
    ):
        save(DataLoader(range(12), sampler=Own()))
    with pytest.warns(UserWarning, match=r"loader whose Data draws .* \(legacy, numbers\)"):
        save(DataLoader(Data()))
    save(DataLoader(Noisy(), sampler=Epochs()))
    save(DataLoader(range(12), shuffle=True, generator=torch.Generator()))


def test_a_save_within_a_window_of_accumulation_is_warned_of(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = fabric.setup(linear := nn.Linear(1, 1), torch.optim.SGD(linear.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(torch.ones(4, 1)))
    state = {"model": model, "loader": loader}
    for number, batch in enumerate(loader):
        with fabric.accumulate(model, every=2) as window:
            fabric.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
        if number % 2 == 0:
            with pytest.warns(UserWarning, match="in the middle of a window"):
                fabric.save(tmp_path / "x", state)
        else:
            assert window.is_full
            fabric.save(tmp_path / "x", state)
        fabric.save(tmp_path / "y", {"model": model})


def test_random_numbers_of_the_device_go_on_with_those_of_the_host(tmp_path: Path) -> None:
    class Drawing(CPUAccelerator):
        """One whose device draws numbers of its own."""

        numbers = torch.Generator()

        def rng_state(self, device: torch.device) -> torch.Tensor:
            return self.numbers.get_state()

        def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
            self.numbers.set_state(state)

    def drawn() -> list[float]:
        return [
            torch.rand(1, generator=generator).item()
            for generator in (Drawing.numbers, torch.default_generator)
        ]

    with Fabric(accelerator=Drawing()) as fabric:
        state = {"loader": fabric.setup_dataloaders(DataLoader(range(3)))}
        fabric.save(tmp_path / "x", state)
        after = drawn()
        fabric.save(tmp_path / "y", {"step": 1})
        assert drawn() != after
        fabric.load(tmp_path / "x", state)
        assert drawn() == after
        fabric.load(tmp_path / "y", {"step": 0})
        assert drawn() != after


def test_without_a_loader_in_the_state_no_random_number_is_touched(fabric: Fabric, tmp_path: Path) -> None:
    loader = fabric.setup_dataloaders(DataLoader(range(3)))
    model = nn.Linear(1, 1)
    fabric.save(tmp_path / "x", {"loader": loader, "model": model})
    drawn = torch.rand(1)
    rest = fabric.load(tmp_path / "x", {"model": model})
    assert torch.rand(1) != drawn
    assert rest["loader"][0]["epoch"] == 0
    fabric.load(tmp_path / "x", {"loader": loader})
    assert torch.rand(1) == drawn
