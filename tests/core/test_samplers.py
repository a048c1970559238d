"""Splitting the data of a loader between ranks."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabric_core.data.samplers import DistributedBatchSampler, DistributedSamplerWrapper
from fabric_core.data.seed import seeded_rng
from fabric_core.data.sharding import epoch_listeners, shard_loader, twin_of
from fabric_core.errors import ConfigurationError

Make = Callable[[], DataLoader]


@pytest.fixture(autouse=True)
def _own_streams() -> Iterator[None]:
    with seeded_rng(0):
        yield


class ByHand:
    """A sampler that derives from nothing and shuffles with Python's global generator."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = "red"

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return self.size


class NumpyOrder(ByHand):
    """The same with NumPy's global generator."""

    def __iter__(self) -> Iterator[int]:
        return iter([int(index) for index in np.random.permutation(self.size)])


class Buckets(BatchSampler):
    """Batches of neighbours in a random order and of a random size, with a constructor of its own."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.epochs: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        starts = list(range(0, self.size, 3))
        for position in torch.randperm(len(starts)).tolist():
            yield list(range(starts[position], min(starts[position] + 3, self.size)))

    def __len__(self) -> int:
        return (self.size + 2) // 3

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class OddLoader(DataLoader):
    """A loader whose constructor takes none of DataLoader's arguments."""

    def __init__(self, size: int, *, flavour: str) -> None:
        super().__init__(range(size), batch_size=2, shuffle=True)
        self.flavour = flavour

    def tasted(self) -> str:
        return f"{self.flavour} of {len(self)}"


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def flat(batches: Any) -> list[int]:
    return [int(index) for batch in batches for index in torch.as_tensor(batch).reshape(-1)]


def shares(make: Make, ranks: int, epoch: int = 0, seed: int = 0, **options: Any) -> list[list[list[int]]]:
    """The batches of every rank, each rank with another state of the global generators, as after other work."""
    result = []
    for rank in range(ranks):
        with seeded_rng(1000 + rank):
            loader = shard_loader(make(), num_replicas=ranks, rank=rank, seed=seed, **options)
            for listener in epoch_listeners(loader):
                listener.set_epoch(epoch)
            result.append([flat([batch]) for batch in loader])
    return result


def assert_split(per_rank: list[list[list[int]]], expected: list[int]) -> None:
    """Every element once, but for what fills the last round up; the same number of batches and samples for all."""
    counted = Counter(index for batches in per_rank for index in flat(batches))
    assert set(counted) == set(expected)
    assert all(count >= Counter(expected)[index] for index, count in counted.items())
    assert len({len(batches) for batches in per_rank}) == 1


SAMPLERS: dict[str, Callable[[int], Any]] = {
    "by hand": ByHand,
    "subset": lambda size: SubsetRandomSampler(range(size)),
    "subset with a generator": lambda size: SubsetRandomSampler(
        range(size), generator=torch.Generator().manual_seed(random.randrange(10**6))
    ),
    "a list": lambda size: list(range(size)),
    "numpy": NumpyOrder,
}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("size", "ranks", "batch"), [(10, 2, 2), (11, 3, 2), (2, 4, 1), (64, 4, 5), (1, 3, 2)]
)
def test_a_plain_loader_gives_exactly_what_torch_gives(
    shuffle: bool, size: int, ranks: int, batch: int
) -> None:
    def make() -> DataLoader:
        return DataLoader(range(size), batch_size=batch, shuffle=shuffle)

    for epoch, seed in ((0, 0), (1, 0), (3, 17)):
        per_rank = shares(make, ranks, epoch, seed)
        for rank, batches in enumerate(per_rank):
            sampler = DistributedSampler(range(size), ranks, rank, shuffle=shuffle, seed=seed)
            sampler.set_epoch(epoch)
            assert batches == [flat([b]) for b in DataLoader(range(size), batch_size=batch, sampler=sampler)]
        assert_split(per_rank, list(range(size)))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize(("size", "ranks"), [(12, 2), (13, 3), (1, 4), (3, 5), (100, 7)])
def test_any_sampler_is_split_whatever_the_ranks_drew_before(sampler: Any, size: int, ranks: int) -> None:
    def make() -> DataLoader:
        return DataLoader(range(size), batch_size=2, sampler=sampler(size))

    per_rank = shares(make, ranks)
    assert_split(per_rank, list(range(size)))
    counted = Counter(index for batches in per_rank for index in flat(batches))
    assert sum(counted.values()) == -(-size // ranks) * ranks
    if size >= ranks:
        assert max(counted.values()) <= 2


@pytest.mark.parametrize("sampler", [SAMPLERS["by hand"], SAMPLERS["subset with a generator"], NumpyOrder])
def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else(sampler: Any) -> None:
    def make() -> DataLoader:
        return DataLoader(range(40), batch_size=4, sampler=sampler(40))

    first = shares(make, 2, epoch=0)
    random.random()
    assert shares(make, 2, epoch=0) == first
    assert shares(make, 2, epoch=1) != first
    assert shares(make, 2, epoch=0, seed=5) != first


def test_elements_are_dealt_like_cards_and_the_last_round_is_filled_up_from_the_start() -> None:
    dealt = [list(DistributedSamplerWrapper("abcdefg", num_replicas=3, rank=rank)) for rank in range(3)]
    assert dealt == [["a", "d", "g"], ["b", "e", "a"], ["c", "f", "b"]]
    tiny = [list(DistributedSamplerWrapper("ab", num_replicas=5, rank=rank)) for rank in range(5)]
    assert tiny == [["a"], ["b"], ["a"], ["b"], ["a"]]
    assert [list(DistributedSamplerWrapper("", num_replicas=2, rank=rank)) for rank in range(2)] == [[], []]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 90), ranks=st.integers(1, 9))
def test_dealing_equals_torchs_own_for_every_size(size: int, ranks: int) -> None:
    for rank in range(ranks):
        ours = DistributedSamplerWrapper(range(size), num_replicas=ranks, rank=rank)
        theirs = list(DistributedSampler(range(size), ranks, rank, shuffle=False)) if size else []
        assert list(ours) == theirs
        assert len(ours) == len(theirs)


def test_drawing_more_samples_or_with_replacement_is_kept() -> None:
    def weighted() -> DataLoader:
        return DataLoader(range(4), batch_size=5, sampler=WeightedRandomSampler([0.0, 1.0, 3.0, 0.0], 4000))

    drawn = Counter(index for batches in shares(weighted, 2) for index in flat(batches))
    assert set(drawn) == {1, 2}
    assert sum(drawn.values()) == 4000
    assert 2.5 < drawn[2] / drawn[1] < 3.6
    for options in ({"num_samples": 6}, {"num_samples": 30}, {"replacement": True}):
        per_rank = shares(lambda o=options: DataLoader(range(10), sampler=RandomSampler(range(10), **o)), 2)
        total = sum(len(flat(batches)) for batches in per_rank)
        assert total == options.get("num_samples", 10)
    once = shares(lambda: DataLoader(range(10), sampler=RandomSampler(range(10), num_samples=6)), 2)
    assert len({index for batches in once for index in flat(batches)}) == 6


def test_whole_batches_of_a_custom_batch_sampler_are_dealt() -> None:
    for size, ranks in ((12, 2), (31, 3), (3, 4)):
        per_rank = shares(lambda size=size: DataLoader(range(size), batch_sampler=Buckets("b", size)), ranks)
        assert_split(per_rank, list(range(size)))
        whole = {tuple(range(start, min(start + 3, size))) for start in range(0, size, 3)}
        assert {tuple(batch) for batches in per_rank for batch in batches} == whole
    assert shares(lambda: DataLoader(range(60), batch_sampler=Buckets("b", 60)), 2, epoch=1) != shares(
        lambda: DataLoader(range(60), batch_sampler=Buckets("b", 60)), 2, epoch=2
    )


def test_a_list_of_batches_is_a_batch_sampler_too() -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6]]
    per_rank = shares(lambda: DataLoader(range(7), batch_sampler=batches), 2)
    assert per_rank == [[[0, 1], [3, 4, 5]], [[2], [6]]]


def test_a_plain_batch_sampler_is_rebuilt_over_distributed_indices() -> None:
    for drop_last in (True, False):
        loader = DataLoader(range(11), batch_sampler=BatchSampler(RandomSampler(range(11)), 4, drop_last))
        share = shard_loader(loader, num_replicas=2, rank=1, seed=3)
        assert type(share.batch_sampler) is BatchSampler
        assert (share.batch_sampler.batch_size, share.batch_sampler.drop_last) == (4, drop_last)
        assert isinstance(share.sampler, DistributedSampler)
        assert share.sampler is share.batch_sampler.sampler
        assert share.sampler.shuffle
        assert share.sampler.seed == 3
        assert len(share) == (1 if drop_last else 2)


def test_a_loader_without_automatic_batches_is_split() -> None:
    per_rank = shares(lambda: DataLoader(range(9), batch_size=None, shuffle=True), 2)
    assert_split(per_rank, list(range(9)))
    dataset = torch.arange(12)
    in_batches = shares(
        lambda: DataLoader(
            dataset, batch_size=None, sampler=BatchSampler(SequentialSampler(dataset), 2, False)
        ),
        2,
    )
    assert in_batches == [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9, 11]]]
    dealt = shares(lambda: DataLoader(dataset, batch_size=None, sampler=Buckets("b", 12)), 2)
    assert_split(dealt, list(range(12)))


def test_a_sampler_that_never_ends_is_dealt_as_it_goes() -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            while True:
                yield random.randrange(1000)

    loaders = [
        shard_loader(DataLoader(range(1000), sampler=Endless()), num_replicas=2, rank=rank, seed=4)
        for rank in (0, 1)
    ]
    drawn = []
    for rank, loader in enumerate(loaders):
        with seeded_rng(rank):
            drawn.append(flat(itertools.islice(loader, 300)))
    with seeded_rng(4):
        expected = list(itertools.islice(iter(Endless()), 600))
    assert drawn == [expected[0::2], expected[1::2]]
    with pytest.raises(TypeError):
        len(loaders[0])


def test_drawing_does_not_disturb_the_streams_of_the_training() -> None:
    def make() -> DataLoader:
        return shard_loader(DataLoader(range(99), batch_sampler=Buckets("b", 99)), num_replicas=2, rank=0)

    torch.manual_seed(3)
    expected = [torch.rand(1).item() for _ in range(6)]
    torch.manual_seed(3)
    seen = []
    batches = iter(make().batch_sampler)
    for _ in range(6):
        next(batches)
        seen.append(torch.rand(1).item())
    assert seen == expected


def test_a_generator_that_the_user_gave_is_his_again_afterwards() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    inner = SubsetRandomSampler(range(10), generator=generator)
    list(DistributedSamplerWrapper(inner, num_replicas=2, rank=0))
    assert inner.generator is generator
    assert torch.equal(generator.get_state(), before)

    class Fails(SubsetRandomSampler):
        def __iter__(self) -> Iterator[int]:
            raise OSError("disk")

    failing = Fails(range(3), generator=generator)
    with pytest.raises(OSError, match="disk"):
        list(DistributedSamplerWrapper(failing, num_replicas=2, rank=0))
    assert failing.generator is generator


def test_the_generator_of_a_sampler_behind_a_batch_sampler_is_found() -> None:
    class Pairs(BatchSampler):
        """A subclass, so that it is dealt and not rebuilt."""

    def make() -> DataLoader:
        generator = torch.Generator().manual_seed(random.randrange(10**6))
        return DataLoader(
            range(20), batch_sampler=Pairs(RandomSampler(range(20), generator=generator), 2, False)
        )

    per_rank = shares(make, 2)
    assert sorted(index for batches in per_rank for index in flat(batches)) == list(range(20))


def test_a_subclass_with_any_constructor_keeps_class_attributes_and_methods() -> None:
    loader = OddLoader(9, flavour="mint")
    loader.worker_init_fn = print
    share = shard_loader(loader, num_replicas=2, rank=1)
    assert type(share) is OddLoader
    assert share.tasted() == "mint of 3"
    assert share.worker_init_fn is print
    assert loader.tasted() == "mint of 5"
    assert isinstance(loader.sampler, RandomSampler)
    assert_split(shares(lambda: OddLoader(9, flavour="mint"), 2), list(range(9)))


def test_the_users_batch_sampler_is_seen_and_changed_through_the_wrapper() -> None:
    buckets = Buckets("by length", 9)
    share = shard_loader(DataLoader(range(9), batch_sampler=buckets), num_replicas=2, rank=0)
    wrapper: Any = share.batch_sampler
    assert isinstance(wrapper, DistributedBatchSampler)
    assert wrapper.name == "by length"
    wrapper.name = "other"
    assert buckets.name == "other"
    wrapper.new = 1
    assert not hasattr(buckets, "new")
    wrapper.set_epoch(4)
    assert buckets.epochs == [4]
    assert wrapper.epoch == 4
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapper.nothing


def test_wrapped_samplers_copy_and_pickle() -> None:
    wrapper = DistributedSamplerWrapper(SubsetRandomSampler(range(10)), num_replicas=2, rank=1, seed=3)
    wrapper.set_epoch(2)
    for twin in (copy.copy(wrapper), copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert list(twin) == list(wrapper)


def test_an_iteration_that_has_begun_keeps_its_epoch() -> None:
    wrapper = DistributedSamplerWrapper(ByHand(30), num_replicas=2, rank=0)
    expected = list(wrapper)
    begun = iter(wrapper)
    wrapper.set_epoch(1)
    assert list(begun) == expected
    assert list(wrapper) != expected


def test_one_rank_keeps_its_loader() -> None:
    loader = DataLoader(range(5), shuffle=True)
    assert shard_loader(loader, num_replicas=1, rank=0) is loader


def test_a_loader_that_is_distributed_already_is_left_alone() -> None:
    def distributed(rank: int) -> DistributedSampler:
        return DistributedSampler(range(8), num_replicas=2, rank=rank)

    class Pairs(BatchSampler):
        pass

    for loader in (
        DataLoader(range(8), sampler=distributed(1)),
        DataLoader(range(8), batch_size=None, sampler=distributed(1)),
        DataLoader(range(8), batch_sampler=Pairs(distributed(1), 2, False)),
        shard_loader(DataLoader(range(8), sampler=ByHand(8)), num_replicas=2, rank=1),
        shard_loader(DataLoader(range(8), batch_sampler=Buckets("b", 8)), num_replicas=2, rank=1),
    ):
        assert shard_loader(loader, num_replicas=2, rank=1) is loader


def test_a_distributed_sampler_for_another_rank_is_warned_about() -> None:
    loader = DataLoader(range(8), sampler=DistributedSampler(range(8), num_replicas=1, rank=0))
    with pytest.warns(UserWarning, match="rank 0 of 1, but this is rank 1 of 2.*left as it is"):
        assert shard_loader(loader, num_replicas=2, rank=1) is loader
    elsewhere = type("Elsewhere", (ByHand,), {"world_size": 2, "rank": 1})
    loader = DataLoader(range(8), sampler=elsewhere(8))
    assert shard_loader(loader, num_replicas=2, rank=1) is loader


def test_an_iterable_dataset_is_left_alone_with_one_warning_and_advice() -> None:
    loader = DataLoader(Stream(), batch_size=2)
    with pytest.warns(
        UserWarning, match=r"all the data of the Stream.*use_distributed_sampler=False"
    ) as caught:
        assert shard_loader(loader, num_replicas=2, rank=0) is loader
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shard_loader(loader, num_replicas=1, rank=0) is loader
        knows = Stream()
        knows.num_replicas, knows.rank = 2, 0
        shard_loader(DataLoader(knows), num_replicas=2, rank=0)


@pytest.mark.parametrize(("num_replicas", "rank"), [(2, 2), (2, -1), (0, 0)])
def test_a_rank_out_of_range_is_refused(num_replicas: int, rank: int) -> None:
    with pytest.raises(ConfigurationError, match=f"rank {rank} of {num_replicas}"):
        shard_loader(DataLoader(range(3)), num_replicas=num_replicas, rank=rank)


def test_a_loader_that_would_go_on_with_all_the_data_is_refused() -> None:
    class KeepsIterator(DataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.running = super().__iter__()

        def __iter__(self) -> Iterator[Any]:
            for _ in range(len(self)):
                yield next(self.running)

    class Computes(DataLoader):
        @property
        def batch_sampler(self) -> Any:
            return [[0], [1]]

        @batch_sampler.setter
        def batch_sampler(self, value: Any) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"KeepsIterator.*'running'.*use_distributed_sampler=False"):
        shard_loader(KeepsIterator(range(4)), num_replicas=2, rank=0)
    with pytest.raises(ConfigurationError, match=r"Computes.*'batch_sampler'"):
        shard_loader(Computes(range(2)), num_replicas=2, rank=0)


def test_shuffling_can_be_chosen() -> None:
    for shuffle in (True, False):
        share = shard_loader(
            DataLoader(range(4), shuffle=not shuffle), num_replicas=2, rank=0, shuffle=shuffle
        )
        assert share.sampler.shuffle is shuffle


def test_a_random_sampler_over_fewer_indices_stays_within_them() -> None:
    per_rank = shares(lambda: DataLoader(range(100), sampler=RandomSampler(range(6))), 2)
    assert sorted(index for batches in per_rank for index in flat(batches)) == list(range(6))


def test_a_twin_shares_everything_but_the_running_iterator() -> None:
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    running = iter(loader)
    assert list(running) == [torch.tensor([index]) for index in range(4)]
    twin = twin_of(loader)
    assert twin._iterator is None
    assert twin.dataset is loader.dataset
    assert loader._iterator is running
    del running, loader
    gc.collect()


def test_the_epoch_reaches_the_outermost_listener_of_each_chain_and_the_dataset() -> None:
    class Data(list):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    dataset = Data(range(4))
    loader = DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0))
    assert epoch_listeners(loader) == [loader.sampler, dataset]
    buckets = Buckets("b", 4)
    assert epoch_listeners(DataLoader(range(4), batch_sampler=buckets)) == [buckets]
    assert epoch_listeners(DataLoader(range(4))) == []
