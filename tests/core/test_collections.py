"""Moving and converting whatever a batch may be."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fabric_core.data.collections import convert_floats, map_tensors, move_to_device, mover, to_scalars
from fabric_core.errors import ConfigurationError, FabricError, WrongTypeError

META = torch.device("meta")


class Point(NamedTuple):
    x: torch.Tensor
    label: str


class StrictPoint(Point):
    def __new__(cls, only: int) -> StrictPoint:
        raise AssertionError("the constructor must not run again")


@dataclasses.dataclass
class Batch:
    image: torch.Tensor
    name: str
    hidden: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.calls = getattr(self, "calls", 0) + 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    inner: list[torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    image: torch.Tensor


class Tagged(dict):
    """A dict whose constructor cannot be called like dict's, with attributes."""

    def __init__(self, tag: str, **items: Any) -> None:
        super().__init__(**items)
        self.tag = tag


class Rows(list):
    note = "class"


class ReadOnly(Mapping):
    def __init__(self, items: dict[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Unbuildable(ReadOnly):
    def __init__(self, one: Any, two: Any) -> None:
        super().__init__({"one": one, "two": two})


class Movable:
    def __init__(self) -> None:
        self.where: Any = "cpu"

    def to(self, device: torch.device) -> Movable:
        moved = Movable()
        moved.where = device
        return moved


class MovesInPlace:
    where: Any = "cpu"

    def to(self, device: torch.device) -> None:
        self.where = device


def tensor() -> torch.Tensor:
    return torch.ones(2)


def test_a_tensor_a_dict_a_list_and_a_tuple_move() -> None:
    moved = move_to_device({"a": tensor(), "b": [tensor(), (tensor(), "text")], "n": 3}, META)
    assert moved["a"].device == moved["b"][0].device == moved["b"][1][0].device == META
    assert moved["b"][1][1] == "text"
    assert moved["n"] == 3
    assert list(moved) == ["a", "b", "n"]
    assert move_to_device(tensor(), "meta").device == META


@pytest.mark.parametrize(
    "data",
    [
        collections.OrderedDict(b=tensor(), a=1),
        collections.defaultdict(list, a=tensor()),
        collections.UserDict(a=tensor()),
        types.MappingProxyType({"a": tensor()}),
        ReadOnly({"a": tensor()}),
        Tagged("t", a=tensor()),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_mapping_keeps_its_type_and_the_original_is_untouched(data: Any) -> None:
    moved = move_to_device(data, META)
    assert type(moved) is type(data)
    assert moved["a" if "b" not in data else "b"].device == META
    assert list(moved) == list(data)
    assert all(value.is_cpu for value in data.values() if isinstance(value, torch.Tensor))
    assert getattr(moved, "default_factory", None) is getattr(data, "default_factory", None)
    assert getattr(moved, "tag", None) == getattr(data, "tag", None)


def test_a_mapping_that_cannot_be_rebuilt_is_an_error_that_names_it_unless_nothing_changes() -> None:
    data = Unbuildable(tensor(), 2)
    assert move_to_device(data, "cpu") is data
    with pytest.raises(WrongTypeError, match=r"Unbuildable.*to\(device\)") as caught:
        move_to_device(data, META)
    assert isinstance(caught.value, FabricError)


def test_named_tuples_keep_their_class_and_their_constructor_is_not_called() -> None:
    moved = move_to_device(Point(tensor(), "one"), META)
    assert type(moved) is Point
    assert moved.x.device == META
    assert moved.label == "one"
    strict = StrictPoint._make([tensor(), "two"])
    assert type(move_to_device(strict, META)) is StrictPoint


def test_what_torch_returns_as_a_structure_keeps_its_class() -> None:
    data = torch.ones(2, 2).max(dim=0)
    moved = move_to_device(data, META)
    assert type(moved) is type(data)
    assert moved.indices.device == META


def test_dataclasses_move_without_running_their_constructor() -> None:
    data = Batch(tensor(), "cat")
    data.hidden = {"deep": tensor()}
    data.extra = "attribute"
    moved = move_to_device(data, META)
    assert type(moved) is Batch
    assert moved.image.device == moved.hidden["deep"].device == META
    assert (moved.name, moved.extra, moved.calls) == ("cat", "attribute", 1)
    assert data.image.is_cpu
    assert data.hidden["deep"].is_cpu


def test_frozen_dataclasses_move_with_and_without_slots() -> None:
    frozen = move_to_device(Frozen(tensor(), [tensor()]), META)
    assert frozen.image.device == frozen.inner[0].device == META
    assert move_to_device(FrozenSlots(tensor()), META).image.device == META


def test_a_class_is_no_batch_even_if_its_instances_are() -> None:
    @dataclasses.dataclass
    class Default:
        image: Any = tensor()  # noqa: RUF009 - a tensor as an attribute of the class

    classes = [Default, Batch, Movable, int]
    assert move_to_device(classes, META) is classes


def test_list_subclasses_keep_their_class_and_attributes() -> None:
    rows = Rows([tensor(), "x"])
    rows.note = "instance"
    moved = move_to_device(rows, META)
    assert type(moved) is Rows
    assert moved.note == "instance"
    assert moved[0].device == META
    assert rows[0].is_cpu


def test_whatever_has_a_method_to_is_moved_by_it() -> None:
    in_place = MovesInPlace()
    moved = move_to_device([Movable(), in_place], META)
    assert moved[0].where == META
    assert moved[1] is in_place
    assert in_place.where == META
    packed = pack_sequence([torch.ones(3, 1), torch.ones(1, 1)])
    assert move_to_device({"p": packed}, META)["p"].data.device == META


def test_what_has_a_method_to_is_looked_into_or_left_alone() -> None:
    packed = pack_sequence([torch.ones(3, 1), torch.ones(1, 1)])
    data = {"plain": torch.ones(2), "packed": packed}
    left = map_tensors(lambda tensor: tensor + 1, data, into_movable=False)
    assert torch.equal(left["plain"], torch.full((2,), 2.0))
    assert left["packed"] is packed
    looked_into = map_tensors(lambda tensor: tensor + 1, data)["packed"]
    assert torch.equal(looked_into.data, packed.data + 1)


def test_tensor_subclasses_and_parameters_move() -> None:
    class Mine(torch.Tensor):
        pass

    moved = move_to_device([torch.ones(2).as_subclass(Mine), torch.nn.Parameter(tensor())], META)
    assert type(moved[0]) is Mine
    assert moved[1].requires_grad
    assert moved[0].device == moved[1].device == META


def test_data_that_is_in_place_comes_back_as_the_same_object() -> None:
    for data in (
        tensor(),
        {"a": tensor(), "b": tensor()},
        [tensor(), {"c": (tensor(), "s")}],
        (tensor(), 1),
        Point(tensor(), ""),
        Batch(tensor(), ""),
        Frozen(tensor(), [tensor()]),
        collections.UserDict(a=tensor()),
        ["no", "tensor"],
        {},
        None,
        "text",
    ):
        assert move_to_device(data, "cpu") is data
        assert mover("cpu")(data) is data
        assert map_tensors(lambda t: t, data) is data
    deep = {"a": ["no", {"tensor": 1}]}
    assert move_to_device(deep, META) is deep


def test_only_what_changes_is_rebuilt() -> None:
    labels = ["cat", "dog"]
    data = {"image": tensor(), "labels": labels, "there": torch.ones(1, device=META)}
    moved = move_to_device(data, META)
    assert moved is not data
    assert moved["labels"] is labels
    assert moved["there"] is data["there"]


def test_a_tensor_from_another_device_moves_to_the_host_too() -> None:
    class Recording(torch.Tensor):
        is_cpu = False

        def to(self, device: Any, **kwargs: Any) -> Any:
            return ("moved", torch.device(device).type)

    assert mover("cpu")([torch.ones(1).as_subclass(Recording), tensor()])[0] == ("moved", "cpu")
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        mover("cpu")([tensor(), torch.ones(1, device=META)])


def test_copies_block_unless_the_device_has_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake_streams = types.SimpleNamespace(Stream=object)
    fake_plain = types.SimpleNamespace()

    class Spy(torch.Tensor):
        def to(self, device: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return self

    spy = torch.ones(1).as_subclass(Spy)
    for module, expected in ((fake_streams, True), (fake_plain, False)):
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        mover("meta")(spy)
        assert seen.pop() == {"non_blocking": expected}
    monkeypatch.undo()
    mover("meta")(spy)  # a device type without a module
    mover("meta", non_blocking=True)(spy)
    assert seen == [{"non_blocking": False}, {"non_blocking": True}]


def test_floats_are_converted_and_nothing_else() -> None:
    data = {
        "f": torch.ones(2),
        "h": torch.ones(2, dtype=torch.bfloat16),
        "i": torch.ones(2, dtype=torch.int64),
        "b": torch.ones(2, dtype=torch.bool),
        "c": torch.ones(2, dtype=torch.complex64),
        "n": 1.5,
    }
    out = convert_floats(data, torch.float64)
    assert [value.dtype for value in out.values() if isinstance(value, torch.Tensor)] == [
        torch.float64,
        torch.float64,
        torch.int64,
        torch.bool,
        torch.complex64,
    ]
    assert type(out["n"]) is float
    assert convert_floats(out, torch.float64) is out
    packed = convert_floats(pack_sequence([torch.ones(3), torch.ones(1)]), torch.float64)
    assert isinstance(packed, PackedSequence)
    assert packed.data.dtype == torch.float64
    assert packed.batch_sizes.dtype == torch.int64


def test_gradients_flow_through_a_conversion() -> None:
    weight = torch.ones(2, requires_grad=True)
    convert_floats([weight], torch.float64)[0].sum().backward()
    assert torch.equal(weight.grad, torch.ones(2))


def test_tensors_become_numbers_for_loggers() -> None:
    numpy = pytest.importorskip("numpy")
    scalars = to_scalars(
        {"a": torch.tensor(1.5), "b": torch.tensor([3]), "c": numpy.float32(2), "d": "x", "e": 7}
    )
    assert scalars == {"a": 1.5, "b": 3, "c": 2.0, "d": "x", "e": 7}
    assert [type(value) for value in scalars.values()] == [float, int, float, str, int]
    for bad in (torch.ones(2), numpy.ones(3), torch.ones(0)):
        with pytest.raises(ConfigurationError, match=r"'loss'.*shape is \(\d,\).*loss\.mean\(\)"):
            to_scalars({"loss": bad})


leaves = st.one_of(st.integers(), st.text(max_size=2), st.none(), st.integers(0, 99).map(torch.tensor))
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        inner.map(lambda value: collections.OrderedDict(k=value)),
        inner.map(lambda value: Frozen(value, [value])),
    ),
    max_leaves=8,
)


def described(data: Any, factor: int = 1) -> Any:
    """Types and values of a nest, with the tensors multiplied."""
    if isinstance(data, torch.Tensor):
        return ("tensor", int(data) * factor)
    if isinstance(data, dict):
        return (type(data), [(key, described(value, factor)) for key, value in data.items()])
    if isinstance(data, (list, tuple)):
        return (type(data), [described(value, factor) for value in data])
    if isinstance(data, Frozen):
        return (Frozen, described(data.image, factor), described(data.inner, factor))
    return data


@settings(max_examples=150, deadline=None)
@given(nests)
def test_any_nesting_keeps_its_shape(data: Any) -> None:
    before = described(data)
    assert described(map_tensors(lambda t: t * 3, data)) == described(data, 3)
    assert described(data) == before
