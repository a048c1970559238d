"""Copies that run beside the computation, on streams that pretend: what the device is told, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

from fabric_cuda import CUDAAccelerator
from fabric_cuda.accelerators.copies import overlapped

if TYPE_CHECKING:
    from conftest import Recorder

CPU = torch.device("cpu")


class Fetched:
    """An iterator as PyTorch's over a ``DataLoader``, which notes when it is asked."""

    def __init__(self, batches: list[Any], workers: int, notes: list[Any]) -> None:
        self._num_workers = workers
        self._batches, self._notes = iter(batches), notes

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if isinstance(batch, Exception):
            raise batch
        self._notes.append(("fetched", batch.tolist()))
        return batch


def loop(recorder: Recorder, batches: list[Any], workers: int) -> list[Any]:
    source = Fetched(batches, workers, recorder.notes)
    for batch in overlapped(source, lambda batch: batch, CPU):
        recorder.notes.append(("used", batch.tolist()))
    return recorder.notes


COPIED = [("pinned", "side 1"), ("event", "side 1")]
READY = [("waits for", "event of side 1"), ("kept for", "Current")]


def test_a_batch_is_pinned_copied_on_the_side_waited_for_and_kept(recorder: Recorder) -> None:
    notes = loop(recorder, [torch.tensor([1])], workers=0)
    assert notes == [("fetched", [1]), *COPIED, *READY, ("used", [1])]


def test_where_workers_fetch_the_next_batch_is_on_its_way_while_one_is_used(recorder: Recorder) -> None:
    notes = loop(recorder, [torch.tensor([1]), torch.tensor([2])], workers=2)
    assert notes == [
        *(("fetched", [1]), *COPIED, ("fetched", [2]), *COPIED),
        *(*READY, ("used", [1])),
        *(*READY, ("used", [2])),
    ]


def test_where_the_loop_itself_fetches_nothing_is_fetched_early(recorder: Recorder) -> None:
    order = [
        note
        for note in loop(recorder, [torch.tensor([n]) for n in range(3)], 0)
        if note[0] in ("fetched", "used")
    ]
    assert order == [(what, [n]) for n in range(3) for what in ("fetched", "used")]


def test_where_the_place_in_the_data_can_be_saved_nothing_is_fetched_early(recorder: Recorder) -> None:
    class Saveable(Fetched):
        def state_dict(self) -> dict[str, int]:
            return {"yielded": sum(note[0] == "fetched" for note in recorder.notes)}

    source = Saveable([torch.tensor([n]) for n in range(3)], 2, recorder.notes)
    places = [source.state_dict()["yielded"] for _ in overlapped(source, lambda batch: batch, CPU)]
    assert places == [1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_loader_comes_when_it_is_its_turn(recorder: Recorder, workers: int) -> None:
    batches = [torch.tensor([1]), torch.tensor([2]), ValueError("a broken sample"), torch.tensor([4])]
    with pytest.raises(ValueError, match="a broken sample"):
        loop(recorder, batches, workers)
    assert [note for note in recorder.notes if note[0] == "used"] == [("used", [1]), ("used", [2])]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_complete_and_in_order_however_many_there_are(recorder: Recorder, workers: int) -> None:
    for count in range(5):
        source = Fetched([torch.tensor([n]) for n in range(count)], workers, [])
        assert [batch.item() for batch in overlapped(source, lambda batch: batch, CPU)] == list(range(count))


def test_only_plain_tensors_on_the_host_are_copied_and_the_rest_is_moved_as_ever(recorder: Recorder) -> None:
    class Movable:
        def to(self, *_: Any, **__: Any) -> str:
            return "moved"

    weights = torch.nn.Parameter(torch.ones(1))
    batch = {
        "x": torch.ones(2),
        "many": [torch.zeros(1), "text"],
        "grad": weights,
        "sparse": torch.eye(2).to_sparse(),
    }
    moved: list[Any] = []

    def move(batch: Any) -> Any:
        moved.append(batch)
        return batch

    (there,) = overlapped(iter([batch]), move, CPU)
    assert recorder.notes.count(("pinned", "side 1")) == 2
    assert there["grad"] is weights
    assert there["sparse"] is batch["sparse"]
    assert there["x"] is not batch["x"]
    assert torch.equal(there["x"], batch["x"])
    assert moved == [there]


def test_loops_within_loops_have_streams_of_their_own(recorder: Recorder) -> None:
    outer = overlapped(Fetched([torch.tensor([1]), torch.tensor([2])], 1, []), lambda b: b, CPU)
    seen = []
    for one in outer:
        inner = overlapped(Fetched([torch.tensor([10]), torch.tensor([20])], 1, []), lambda b: b, CPU)
        seen += [(one.item(), other.item()) for other in inner]
    assert seen == [(1, 10), (1, 20), (2, 10), (2, 20)]
    assert recorder.streams == 3


def test_a_loop_that_is_left_early_takes_nothing_more_from_the_loader(recorder: Recorder) -> None:
    source = Fetched([torch.tensor([n]) for n in range(5)], 2, recorder.notes)
    for batch in overlapped(source, lambda batch: batch, CPU):
        if batch.item() == 1:
            break
    assert [note for note in recorder.notes if note[0] == "fetched"] == [("fetched", [n]) for n in range(3)]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_accelerator_copies_so_unless_told_otherwise(recorder: Recorder, overlap: bool) -> None:
    accelerator = CUDAAccelerator(overlap_copies=overlap)
    loader = DataLoader(torch.arange(4), batch_size=2)
    there = accelerator.move_batches(iter(loader), lambda batch: batch + 1, CPU)
    assert [batch.tolist() for batch in there] == [[1, 2], [3, 4]]
    assert recorder.streams == overlap
