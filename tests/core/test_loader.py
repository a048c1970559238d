"""The loader that setup_dataloaders returns."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from fabric_core.data.iteration import LoaderTracker
from fabric_core.data.loader import FabricDataLoader, wrap_loader
from fabric_core.data.seed import seeded_rng
from fabric_core.errors import WrongTypeError

CPU = torch.device("cpu")
META = torch.device("meta")


_earlier: list[psutil.Process] = []  # what other tests have started that lives to the end of the session


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in _earlier]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    _earlier[:] = psutil.Process().children()
    threads = set(threading.enumerate())
    with seeded_rng(0):
        yield
    gc.collect()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (children() or set(threading.enumerate()) - threads):
        time.sleep(0.02)
    assert children() == []
    assert set(threading.enumerate()) <= threads


def wrap(loader: Any, **options: Any) -> FabricDataLoader:
    defaults: dict[str, Any] = {
        "device": CPU,
        "num_replicas": 1,
        "rank": 0,
        "seed": 0,
        "tracker": LoaderTracker(),
        "shard": True,
        "seed_workers": False,
    }
    return wrap_loader(loader, **{**defaults, **options})


def flat(batches: Any) -> list[int]:
    return [int(index) for batch in batches for index in torch.as_tensor(batch).reshape(-1)]


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size + 100


class Noise(Dataset):
    """What the random streams of the process that loads it give."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))


class Processes(Noise):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


class OddLoader(DataLoader):
    epoch_of_user = 3

    def __init__(self, *, flavour: str) -> None:
        super().__init__(range(8), batch_size=2, shuffle=True)
        self.flavour = flavour

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield (self.flavour, batch)

    def tasted(self) -> str:
        return f"{self.flavour} of {len(self)}"


# -- what it is ----------------------------------------------------------------------------------------------------


def test_it_is_an_instance_of_the_users_class_and_shares_the_attributes() -> None:
    loader = OddLoader(flavour="mint")
    wrapped: Any = wrap(loader)
    assert isinstance(wrapped, FabricDataLoader)
    assert isinstance(wrapped, OddLoader)
    assert isinstance(wrapped, DataLoader)
    assert wrapped.tasted() == "mint of 4"
    wrapped.flavour = "lime"
    assert loader.flavour == "lime"
    loader.extra = 1
    assert wrapped.extra == 1
    assert wrapped.dataset is loader.dataset
    assert len(wrapped) == 4
    assert [batch[0] for batch in wrapped] == ["lime"] * 4
    assert not hasattr(wrapped, "nothing")
    with pytest.raises(ValueError, match="batch_size"):
        wrapped.batch_size = 3


def test_it_yields_bit_for_bit_what_the_plain_loader_yields() -> None:
    data = TensorDataset(torch.arange(10.0), torch.arange(10))

    def make(workers: int) -> DataLoader:
        return DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)

    def run(loader: DataLoader) -> list[Any]:
        torch.manual_seed(4)
        seen: list[Any] = []
        for _ in range(2):
            for batch in loader:
                seen += [*batch, torch.rand(1)]
        return seen

    for workers in (0, 2):
        plain, ours = run(make(workers)), run(wrap(make(workers)))
        assert len(plain) == len(ours) == 24
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_two_ranks_together_see_the_data_set_in_a_new_order_each_epoch() -> None:
    ranks = [
        wrap(DataLoader(range(12), batch_size=2, shuffle=True), num_replicas=2, rank=rank, seed=5)
        for rank in (0, 1)
    ]
    orders = [[flat(loader) for loader in ranks] for _ in range(3)]
    assert all(sorted(first + second) == list(range(12)) for first, second in orders)
    assert orders[0] != orders[1] != orders[2]
    plain = [DistributedSampler(range(12), 2, rank, seed=5) for rank in (0, 1)]
    for epoch, order in enumerate(orders):
        for sampler in plain:
            sampler.set_epoch(epoch)
        assert [list(sampler) for sampler in plain] == order


def test_the_loader_of_the_user_is_not_touched_by_sharding() -> None:
    loader = DataLoader(range(12), batch_size=2)
    wrapped = wrap(loader, num_replicas=2)
    assert len(loader) == 6
    assert len(wrapped) == 3
    assert len(wrap(loader, num_replicas=2, shard=False)) == 6


@pytest.mark.parametrize("thing", [range(3), TensorDataset(torch.ones(3)), DataLoader, None], ids=str)
def test_what_is_no_loader_is_refused_by_its_type_with_advice(thing: Any) -> None:
    with pytest.raises(WrongTypeError, match=rf"a {type(thing).__qualname__}\..*fabric\.to_device"):
        wrap(thing)


@pytest.mark.parametrize("several", [list, tuple])
def test_loaders_in_a_list_are_answered_with_how_to_pass_them(several: Any) -> None:
    loader = DataLoader(TensorDataset(torch.ones(3)))
    with pytest.raises(WrongTypeError, match=rf"got a {several.__name__} of.*setup_dataloaders\(\*loaders\)"):
        wrap(several([loader, loader]))


def test_an_iterable_dataset_warns_when_it_would_be_duplicated() -> None:
    with pytest.warns(UserWarning, match="all the data"):
        assert flat(wrap(DataLoader(Stream(3)), num_replicas=2)) == [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(DataLoader(Stream(3)), num_replicas=2, shard=False)


def test_pickled_or_copied_it_is_the_plain_loader() -> None:
    loader = DataLoader(range(8), batch_size=2, num_workers=1, persistent_workers=True)
    wrapped = wrap(loader, num_replicas=2, rank=1)
    list(wrapped)
    for twin in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(twin) is DataLoader
        assert list(twin.sampler) == [1, 3, 5, 7]
    single = wrap(DataLoader(range(3)))
    assert flat(pickle.loads(pickle.dumps(single))) == [0, 1, 2]


# -- devices -------------------------------------------------------------------------------------------------------


def test_batches_move_to_the_device_unless_told_not_to() -> None:
    loader = DataLoader([{"x": torch.ones(2), "name": "n"}] * 3, batch_size=2)
    assert all(batch["x"].device == META for batch in wrap(loader, device=META))
    assert wrap(loader, device=META).device == META
    assert all(batch["x"].is_cpu for batch in wrap(loader, device=None))
    assert wrap(loader, device=None).device is None


def test_on_the_cpu_a_batch_is_the_very_object_that_the_loader_made() -> None:
    batch = {"x": torch.ones(2), "more": [torch.ones(1)]}
    (got,) = wrap(DataLoader([batch], batch_size=None, collate_fn=lambda same: same))
    assert got is batch


# -- where the loop stands -----------------------------------------------------------------------------------------


def test_the_position_and_the_last_batch_are_known_in_the_loop_and_forgotten_after_it() -> None:
    wrapped = wrap(DataLoader(range(5), batch_size=2))
    assert (wrapped.position, wrapped.is_last_batch) == (-1, False)
    for _ in range(2):
        seen = [(wrapped.position, wrapped.is_last_batch) for _ in wrapped]
        assert seen == [(0, False), (1, False), (2, True)]
        assert (wrapped.position, wrapped.is_last_batch) == (-1, False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Stream(5), SizedStream(5)], ids=["unsized", "wrong size"])
def test_without_a_length_that_can_be_trusted_the_last_batch_is_found_by_looking_ahead(
    dataset: Any, workers: int
) -> None:
    plain = DataLoader(dataset, batch_size=2, num_workers=workers)
    expected = flat(plain)
    wrapped = wrap(DataLoader(dataset, batch_size=2, num_workers=workers))
    batches, last = [], []
    for batch in wrapped:
        batches.append(batch)
        last.append(wrapped.is_last_batch)
        assert wrapped.is_last_batch is last[-1]  # asking twice loads nothing more
    assert flat(batches) == expected
    assert last == [False] * (len(last) - 1) + [True]


@pytest.mark.parametrize("sized", [True, False])
def test_the_remaining_batches_are_counted_as_far_as_asked(sized: bool) -> None:
    tracker = LoaderTracker()
    wrapped = wrap(DataLoader(range(7) if sized else Stream(7)), tracker=tracker, device=META)
    seen, counts = 0, []
    for batch in wrapped:
        assert batch.device == META
        seen += 1
        assert tracker.current is not None
        counts.append((tracker.current.remaining(3), tracker.current.remaining(1)))
    assert seen == 7
    assert counts == [(3, 1)] * 4 + [(2, 1), (1, 1), (0, 0)]


def test_looking_ahead_only_sometimes_loses_and_repeats_nothing() -> None:
    tracker = LoaderTracker()
    wrapped = wrap(DataLoader(Stream(20), batch_size=None), tracker=tracker)
    for pattern in itertools.product([0, 1, 4], repeat=3):
        ask = itertools.cycle(pattern)
        got = []
        for value in wrapped:
            got.append(int(value))
            assert tracker.current is not None
            tracker.current.remaining(next(ask))
            assert tracker.current.position == len(got) - 1
        assert got == list(range(20))


def test_a_length_that_was_believed_and_wrong_is_reported() -> None:
    class Lying(BatchSampler):
        def __len__(self) -> int:
            return 9

    wrapped = wrap(DataLoader(range(4), batch_sampler=Lying(range(4), 2, False)))
    assert len(list(wrapped)) == 2  # nobody asked
    with pytest.warns(UserWarning, match="is 9, but it yielded 2 batches"):
        assert [wrapped.is_last_batch for _ in wrapped] == [False, False]


def test_the_loop_around_is_the_current_one_again_when_an_inner_one_ends() -> None:
    tracker = LoaderTracker()
    train, val = (wrap(DataLoader(range(size)), tracker=tracker) for size in (3, 4))

    def current() -> tuple[Any, int] | None:
        return tracker.current and (tracker.current.loader, tracker.current.position)

    assert current() is None
    for number, _ in enumerate(train):
        assert current() == (train, number)
        for inner, _ in enumerate(val):
            assert current() == (val, inner)
            if number == 1:
                break
        assert current() == (train, number)
        assert val.position == -1
    assert current() is None
    assert tracker.live == []


def test_loops_side_by_side_know_their_own_positions() -> None:
    tracker = LoaderTracker()
    one, two = (wrap(DataLoader(range(size)), tracker=tracker) for size in (5, 3))
    for number, _ in enumerate(zip(one, two, strict=False)):
        assert (one.position, two.position) == (number, number)
        assert (one.is_last_batch, two.is_last_batch) == (False, number == 2)
    assert tracker.live == []
    left, right = iter(one), iter(two)
    next(left), next(left), next(right), next(left)
    assert tracker.current is not None
    assert (tracker.current.loader, one.position, two.position) == (one, 2, 0)
    del left
    assert tracker.current.loader is two
    del right
    assert tracker.current is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_that_is_left_early_leaves_nothing_for_the_next(workers: int) -> None:
    tracker = LoaderTracker()
    wrapped = wrap(DataLoader(range(6), num_workers=workers), tracker=tracker)
    for _ in range(2):
        for _batch in wrapped:
            _ = wrapped.is_last_batch
            break
        assert (tracker.current, tracker.live, wrapped.position) == (None, [], -1)
    with pytest.raises(KeyError):
        for _batch in wrapped:
            raise KeyError
    assert flat(wrapped) == list(range(6))
    assert tracker.live == []


def test_an_error_of_the_dataset_comes_through_and_the_loop_is_over() -> None:
    class Broken(Stream):
        def __iter__(self) -> Iterator[int]:
            yield 1
            raise OSError("disk")

    tracker = LoaderTracker()
    wrapped = wrap(DataLoader(Broken(2)), tracker=tracker)
    with pytest.raises(OSError, match="disk"):
        list(wrapped)
    assert tracker.live == []


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_nested_and_parallel_loops_over_one_loader_yield_the_right_batches(options: dict[str, Any]) -> None:
    wrapped = wrap(DataLoader(range(3), **options))
    pairs = [(int(a), int(b)) for a in wrapped for b in wrapped]
    assert pairs == list(itertools.product(range(3), repeat=2))
    assert [(int(a), int(b)) for a, b in zip(wrapped, wrapped, strict=True)] == [(0, 0), (1, 1), (2, 2)]
    assert flat(wrapped) == [0, 1, 2]


def test_parallel_loops_keep_their_own_epochs() -> None:
    wrapped = wrap(DataLoader(range(20), shuffle=True), num_replicas=2)
    first, second = zip(*zip(wrapped, wrapped, strict=True), strict=True)
    expected = []
    for epoch in (0, 1):
        sampler = DistributedSampler(range(20), 2, 0)
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert [flat(first), flat(second)] == expected


# -- epochs --------------------------------------------------------------------------------------------------------


class Listening(list):
    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self.heard: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.heard.append(epoch)


def test_each_loop_announces_the_next_epoch_to_samplers_and_dataset() -> None:
    dataset = Listening(range(4))
    wrapped = wrap(DataLoader(dataset, shuffle=True), num_replicas=2)
    assert wrapped.epoch == 0
    for epoch in range(3):
        for _ in wrapped:
            assert wrapped.epoch == epoch
        assert wrapped.sampler.epoch == epoch
        assert wrapped.epoch == epoch + 1
    assert dataset.heard == [0, 1, 2]


def test_the_epoch_can_be_set_for_the_next_loop() -> None:
    wrapped = wrap(DataLoader(range(4), shuffle=True), num_replicas=2)
    wrapped.epoch = 5
    list(wrapped)
    assert wrapped.sampler.epoch == 5
    assert wrapped.epoch == 6
    for _ in wrapped:
        wrapped.set_epoch(2)
        assert wrapped.epoch == 6
    assert wrapped.epoch == 2
    list(wrapped)
    assert wrapped.sampler.epoch == 2
    assert "epoch" not in vars(wrapped)


def test_an_epoch_that_is_set_at_the_sampler_by_hand_counts() -> None:
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    sampler.set_epoch(7)
    wrapped = wrap(DataLoader(range(8), sampler=sampler), num_replicas=2)
    list(wrapped)
    assert sampler.epoch == 7
    list(wrapped)
    assert sampler.epoch == 8
    wrapped.sampler.set_epoch(3)
    list(wrapped)
    assert sampler.epoch == 3
    wrapped.sampler.set_epoch(11)
    wrapped.set_epoch(4)
    list(wrapped)
    assert sampler.epoch == 4


def test_attributes_of_the_users_class_win_over_ours_of_the_same_name() -> None:
    class Counting(DataLoader):
        position = "theirs"

        def __init__(self) -> None:
            super().__init__(range(4))
            self.epoch = 10
            self.told: list[int] = []

        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            return super().__iter__()

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

        def __getattr__(self, name: str) -> str:
            return f"dynamic {name}"

    loader = Counting()
    wrapped: Any = wrap(loader)
    list(wrapped)
    list(wrapped)
    assert (wrapped.epoch, loader.epoch, wrapped.position) == (12, 12, "theirs")
    assert wrapped.told == [0, 1]
    wrapped.set_epoch(6)
    list(wrapped)
    assert wrapped.told == [0, 1, 6]
    assert wrapped.anything == "dynamic anything"
    assert wrapped.device == CPU


# -- workers -------------------------------------------------------------------------------------------------------


def noise(**options: Any) -> list[tuple[float, ...]]:
    """What one loop draws in two workers: (Python, NumPy, torch) per sample."""
    loader_options = {key: options.pop(key) for key in ("generator", "worker_init_fn") if key in options}
    epochs = options.pop("epochs", 1)
    wrapped = wrap(
        DataLoader(Noise(4), num_workers=2, **loader_options), seed_workers=True, shard=False, **options
    )
    for _ in range(epochs - 1):
        list(wrapped)
    return [tuple(float(part) for part in sample) for sample in wrapped]


def test_workers_are_seeded_by_seed_rank_loader_epoch_and_worker_and_by_nothing_else() -> None:
    first = noise(seed=1)
    torch.rand(5)
    random.random()
    assert noise(seed=1) == first
    draws = [
        first,
        noise(seed=2),
        noise(seed=1, rank=1, num_replicas=2),
        noise(seed=1, epochs=2),
        noise(seed=1, generator=torch.Generator().manual_seed(8)),
    ]
    tracker = LoaderTracker()
    tracker.next_number()
    draws.append(noise(seed=1, tracker=tracker))
    numbers = [number for draw in draws for sample in draw for number in sample]
    assert len(set(numbers)) == len(numbers) == 6 * 4 * 3


def test_without_seeded_workers_torch_decides_as_in_a_plain_loader() -> None:
    def run(wrapped: bool) -> list[Any]:
        torch.manual_seed(6)
        loader = DataLoader(Noise(4), num_workers=2)
        return list(wrap(loader) if wrapped else loader)

    assert run(True) == run(False)


class Init:
    """A worker_init_fn that tells the data set which worker it is in, and of which seed."""

    def __call__(self, worker_id: int) -> None:
        info = torch.utils.data.get_worker_info()
        info.dataset.told = worker_id, torch.initial_seed() % 1000


class Told(Noise):
    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.told


def test_the_users_init_function_is_called_last_and_stays_the_one_that_is_seen() -> None:
    init = Init()
    loader = DataLoader(Told(2), num_workers=2, worker_init_fn=init)
    wrapped = wrap(loader, seed_workers=True)
    (first, one_seed), (second, other_seed) = ([int(part) for part in told] for told in wrapped)
    assert wrapped.worker_init_fn is init
    assert loader.worker_init_fn is init
    assert type(loader.dataset) is Told
    assert (first, second) == (0, 1)
    assert one_seed != other_seed


@pytest.mark.parametrize("options", [{}, {"batch_size": None}, {"batch_size": 3}], ids=str)
def test_which_worker_loads_a_sample_does_not_matter_to_its_random_numbers(options: dict[str, Any]) -> None:
    def run(workers: int, persistent: bool = False) -> list[Any]:
        loader = DataLoader(Noise(7), num_workers=workers, persistent_workers=persistent, **options)
        wrapped = wrap(loader, seed_workers=True)
        return [torch.stack([*map(torch.as_tensor, batch)]).tolist() for _ in range(2) for batch in wrapped]

    assert run(1) == run(2) == run(2, persistent=True)
    assert len(set(map(str, run(1)))) == len(run(1))


def test_a_sample_that_is_drawn_twice_is_not_augmented_twice_alike() -> None:
    loader = DataLoader(Noise(2), sampler=[1, 1, 1, 1], batch_size=2, num_workers=1)
    assert len({float(part) for batch in wrap(loader, seed_workers=True) for part in batch[2]}) == 4


def test_without_a_seed_each_run_and_epoch_draws_its_own_without_taking_it_from_the_loop() -> None:
    def run(wrapped: bool, seed: int) -> tuple[list[Any], float]:
        torch.manual_seed(seed)
        loader: Any = DataLoader(Noise(3), num_workers=2)
        loader = wrap(loader, seed_workers=None) if wrapped else loader
        return [float(batch[0]) for _ in range(2) for batch in loader], float(torch.rand(1))

    first = run(True, 6)
    assert run(True, 6) == first
    assert len({*first[0], *run(True, 7)[0]}) == 12
    assert run(False, 6)[1] == first[1]


def test_persistent_workers_serve_every_epoch() -> None:
    wrapped = wrap(DataLoader(Processes(4), num_workers=2, persistent_workers=True), seed_workers=True)
    first = set(flat(wrapped))
    assert len(first) == 2
    assert set(flat(wrapped)) == first
    for _ in wrapped:
        break
    assert set(flat(wrapped)) == first


def test_workers_end_with_the_loop_that_started_them() -> None:
    wrapped = wrap(DataLoader(range(8), num_workers=2))
    for _ in wrapped:
        assert len(children()) == 2
        break
    assert children() == []
    begun = iter(wrapped)
    assert len(children()) == 2
    del begun
    assert children() == []


def test_a_loop_that_is_remembered_keeps_no_worker() -> None:
    tracker = LoaderTracker()
    wrapped = wrap(DataLoader(Stream(9), num_workers=1), tracker=tracker)
    for _ in wrapped:
        loop = tracker.current
        assert loop is not None
        assert loop.remaining(2) == 2
        break
    assert loop.remaining(2) == 0
    assert children() == []


def test_workers_that_another_thread_starts_outlive_that_thread() -> None:
    wrapped = wrap(DataLoader(Processes(40), num_workers=1), seed_workers=True)
    begun: list[Iterator[Any]] = []

    def begin() -> None:
        begun.append(iter(wrapped))
        next(begun[0])  # now the worker is past its initialisation

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert len(flat(begun[0])) == 39


def run_script(tmp_path: Path, body: str, **options: Any) -> Any:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_spawned_workers_get_everything_that_forked_ones_get(tmp_path: Path) -> None:
    process = run_script(
        tmp_path,
        """
        import torch
        from torch.utils.data import DataLoader, Dataset
        from fabric_core.data.iteration import LoaderTracker
        from fabric_core.data.loader import wrap_loader

        class Noise(Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, index):
                return torch.rand(1), torch.utils.data.get_worker_info().dataset.extra

        def init(worker_id):
            torch.utils.data.get_worker_info().dataset.extra = worker_id + 10

        def run(context):
            loader = DataLoader(Noise(), num_workers=2, multiprocessing_context=context, worker_init_fn=init)
            wrapped = wrap_loader(loader, device=None, num_replicas=2, rank=1, seed=3, tracker=LoaderTracker(),
                                  shard=False, seed_workers=True)
            return [(float(value), int(extra)) for value, extra in wrapped]

        if __name__ == "__main__":
            forked, spawned = run("fork"), run("spawn")
            assert forked == spawned, (forked, spawned)
            assert [extra for _, extra in forked] == [10, 11]
            print("same")
        """,
    )
    out, err = process.communicate(timeout=100)
    told = [line for line in err.splitlines() if "resource_tracker" not in line]  # Python's own, now and then
    assert (process.returncode, out, told) == (0, "same\n", []), err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal")
def test_busy_workers_die_with_a_process_that_is_killed(tmp_path: Path) -> None:
    process = run_script(
        tmp_path,
        """
        import time, psutil
        from torch.utils.data import DataLoader
        from fabric_core.data.iteration import LoaderTracker
        from fabric_core.data.loader import wrap_loader

        class Slow:
            def __len__(self):
                return 9

            def __getitem__(self, index):
                time.sleep(60 if index > 1 else 0)
                return index

        loader = wrap_loader(DataLoader(Slow(), num_workers=2), device=None, num_replicas=1, rank=0, seed=0,
                             tracker=LoaderTracker(), shard=True, seed_workers=False)
        for batch in loader:
            print(*[child.pid for child in psutil.Process().children()], flush=True)
        """,
    )
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    try:
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        _, alive = psutil.wait_procs(workers, timeout=30)
        alive = [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
        assert alive == []
    finally:
        process.kill()
        for worker in workers:
            if worker.is_running():
                worker.kill()
