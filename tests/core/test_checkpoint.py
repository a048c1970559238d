"""save, load and load_raw: what goes into a checkpoint and what comes back, through a Fabric on one process."""

from __future__ import annotations

import copy
import datetime
import os
from collections import OrderedDict, UserDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import one_process
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from fabric_core import (
    CheckpointError,
    CheckpointKeyError,
    ConfigurationError,
    Fabric,
    Precision,
    Strategy,
    StrategySpec,
    WrongTypeError,
    unwrap,
)

pytestmark = pytest.mark.usefixtures("core_alone")


fabric = one_process.fabric


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.ckpt"


class Counter:
    """Anything with the two methods has a state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.count = state["count"]


def trained(fabric: Fabric, steps: int = 3) -> tuple[Any, Any, Any]:
    model = nn.Linear(4, 2)
    raw = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = StepLR(raw, 1, gamma=0.5)
    model, optimizer = fabric.setup(model, raw)
    for _ in range(steps):
        train_step(fabric, model, optimizer, scheduler)
    return model, optimizer, scheduler


def train_step(fabric: Fabric, model: Any, optimizer: Any, scheduler: Any) -> None:
    fabric.backward(model(torch.ones(1, 4)).square().sum())
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# -- there and back -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(fabric: Fabric, path: Path) -> None:
    model, optimizer, scheduler = trained(fabric)
    fabric.save(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 3})
    train_step(fabric, model, optimizer, scheduler)

    other, its_optimizer, its_scheduler = trained(fabric, steps=0)
    state = {"model": other, "optimizer": its_optimizer, "scheduler": its_scheduler, "step": 0}
    assert fabric.load(path, state) == {}
    assert state["step"] == 3
    assert state["model"] is other
    train_step(fabric, other, its_optimizer, its_scheduler)
    assert same(model, other)
    assert its_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert its_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_set_up_and_plain_objects_are_saved_alike(fabric: Fabric, path: Path) -> None:
    model, optimizer, _ = trained(fabric)
    fabric.save(path, {"model": model, "raw": unwrap(model), "optimizer": optimizer, "ro": unwrap(optimizer)})
    loaded = torch.load(path, weights_only=True)
    assert list(loaded["model"]) == list(loaded["raw"]) == ["weight", "bias"]
    assert loaded["optimizer"].keys() == loaded["ro"].keys()
    assert set(loaded) == {"model", "raw", "optimizer", "ro"}


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize(
    "save",
    [
        lambda f, p, s: f.save(p, s),
        lambda f, p, s: f.save(s, p),
        lambda f, p, s: f.save(path=p, state=s),
        lambda f, p, s: f.save(state=s, path=p),
        lambda f, p, s: f.save(s, path=p) if False else f.save(p, state=s),
    ],
    ids=["path first", "state first", "keywords", "keywords turned", "mixed"],
)
def test_save_takes_path_and_state_in_either_order(
    fabric: Fabric, path: Path, as_path: type, save: Callable[..., None]
) -> None:
    save(fabric, as_path(path), {"a": 1})
    assert fabric.load(as_path(path)) == {"a": 1}


@pytest.mark.parametrize(
    "load",
    [
        lambda f, p, s: f.load(p, s),
        lambda f, p, s: f.load(s, p),
        lambda f, p, s: f.load(path=p, state=s),
        lambda f, p, s: f.load(p, state=s),
    ],
    ids=["path first", "state first", "keywords", "mixed"],
)
def test_load_takes_path_and_state_in_either_order(fabric: Fabric, path: Path, load: Any) -> None:
    fabric.save(path, {"a": 1, "b": 2})
    state = {"a": 0}
    assert load(fabric, path, state) == {"b": 2}
    assert state == {"a": 1}


def test_a_bare_state_dict_can_be_saved_and_loaded_raw(fabric: Fabric, path: Path) -> None:
    model, optimizer, _ = trained(fabric)
    fabric.save(model.state_dict(), str(path))
    other, _, _ = trained(fabric, steps=0)
    fabric.load_raw(path, other)
    assert same(model, other)
    fabric.load_raw(str(path), plain := nn.Linear(4, 2))
    assert same(model, plain)
    fabric.save(path, optimizer.state_dict())
    _, its_optimizer, _ = trained(fabric, steps=0)
    fabric.load_raw(path, its_optimizer)
    assert its_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    torch.save(model.state_dict(), path)
    fabric.load_raw(path, other)
    with pytest.raises(WrongTypeError, match="a model or an optimizer, not a dict"):
        fabric.load_raw(path, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [("a", "b"), ({}, {}), (None, {"a": 1}), ({"a": 1},), (), ("a",), (b"a", {})],
    ids=repr,
)
def test_save_without_a_path_and_a_state_is_refused(fabric: Fabric, arguments: Any) -> None:
    with pytest.raises(WrongTypeError):
        fabric.save(*arguments)


@pytest.mark.parametrize(
    "arguments", [("a", "b"), ({}, {}), (), ({"a": 1},), (None,), (b"a",), (3,)], ids=repr
)
def test_load_without_a_path_is_refused(fabric: Fabric, arguments: Any) -> None:
    with pytest.raises(WrongTypeError, match="path"):
        fabric.load(*arguments)
    with pytest.raises(WrongTypeError, match="path"):
        fabric.load_raw(None, nn.Linear(1, 1))


def test_states_that_are_no_dictionaries_are_refused(fabric: Fabric, path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(WrongTypeError, match="has to be a dictionary, not a Linear"):
        fabric.save(path, model)
    assert not path.exists()
    fabric.save(path, {"a": 1})
    with pytest.raises(WrongTypeError, match="load_raw"):
        fabric.load(path, model)


def test_the_working_directory_and_missing_folders_are_fine(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fabric.save("x.ckpt", {"a": 1})
    fabric.save("one/two/three/x.ckpt", {"a": 2})
    assert fabric.load("x.ckpt") == {"a": 1}
    assert fabric.load(tmp_path / "one/two/three/x.ckpt") == {"a": 2}


# -- what a state may hold ----------------------------------------------------------------------------------------


class AttributeDict(dict[str, Any]):
    """The usual one: keys are attributes, and what is missing is a KeyError."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [dict, OrderedDict, AttributeDict, UserDict], ids=lambda k: k.__name__)
def test_a_state_may_be_any_kind_of_dictionary(fabric: Fabric, path: Path, kind: Any) -> None:
    model, _, _ = trained(fabric)
    fabric.save(path, kind(model=model, counter=Counter(5), step=3))
    other, counter = nn.Linear(4, 2), Counter()
    state = kind(model=other, counter=counter, step=0)
    assert fabric.load(path, state) == {}
    assert same(model, other)
    assert (counter.count, state["step"]) == (5, 3)
    assert state["model"] is other


@pytest.mark.parametrize("kind", [dict, AttributeDict, UserDict, MappingProxyType], ids=lambda k: k.__name__)
def test_models_in_dictionaries_in_a_state_are_restored_in_place(
    fabric: Fabric, path: Path, kind: Any
) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    fabric.save(path, {"models": kind({"a": a, "deep": {"b": b, "counter": Counter(2)}}), "step": 1})
    assert list(torch.load(path, weights_only=True)["models"]["deep"]["b"]) == ["weight", "bias"]
    c, d, counter = nn.Linear(2, 2), nn.Linear(2, 2), Counter()
    inner = kind({"a": c, "deep": {"b": d, "counter": counter}})
    state = {"models": inner}
    assert fabric.load(path, state) == {"step": 1}
    assert same(a, c)
    assert same(b, d)
    assert counter.count == 2
    assert state["models"] is inner


def test_models_and_optimizers_in_lists_are_restored_in_place(fabric: Fabric, path: Path) -> None:
    (a, one, _), (b, two, _) = trained(fabric), trained(fabric)
    fabric.save(path, {"both": [a, b], "optimizers": (one, two), "mixed": [Counter(4), 9]})
    (c, three, _), (d, four, _) = trained(fabric, 0), trained(fabric, 0)
    counter = Counter()
    state: dict[str, Any] = {"both": [c, d], "optimizers": (three, four), "mixed": [counter, 0]}
    assert fabric.load(path, state) == {}
    assert same(a, c)
    assert same(b, d)
    assert three.state_dict()["param_groups"] == one.state_dict()["param_groups"]
    assert state["mixed"] == [counter, 9]
    assert counter.count == 4
    with pytest.raises(CheckpointKeyError, match=r"'both\.2'"):
        fabric.load(path, {"both": [c, d, nn.Linear(4, 2)]})
    with pytest.raises(WrongTypeError, match="Use a dictionary or a list"):
        fabric.load(path, {"mixed": (counter, 0)})


def test_plain_values_of_a_dictionary_are_updated_in_place_when_a_model_is_beside_them(
    fabric: Fabric, path: Path
) -> None:
    fabric.save(path, {"run": {"counter": Counter(3), "epoch": 5, "best": 0.5}})
    run = {"counter": Counter(), "epoch": 0}
    rest = fabric.load(path, {"run": run})
    assert (run["counter"].count, run["epoch"]) == (3, 5)  # type: ignore[union-attr]
    assert rest == {"run": {"best": 0.5}}  # what was not asked for comes back, also from inside


def test_a_dictionary_that_has_a_state_of_its_own_is_asked_for_it(fabric: Fabric, path: Path) -> None:
    class Meter(dict[str, Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"kept": dict(self)}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.update(state["kept"])

    fabric.save(path, {"meter": Meter(loss=0.5)})
    assert fabric.load(path) == {"meter": {"kept": {"loss": 0.5}}}
    meter = Meter()
    fabric.load(path, {"meter": meter})
    assert meter == {"loss": 0.5}


def test_plain_values_come_back_as_they_were(fabric: Fabric, path: Path) -> None:
    values: dict[str, Any] = {
        "int": 2**70,
        "float": 0.1,
        "complex": 1j,
        "text": "é",
        "bytes": b"\x00\xff",
        "none": None,
        "bool": True,
        "list": [1, [2, {"three": (4,)}]],
        "set": {1, 2},
        "ordered": OrderedDict(a=1),
        "tensor": torch.arange(3),
        "path": Path("a/b"),
        "when": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        1: "a key that is no text",
    }
    fabric.save(path, values)
    loaded = fabric.load(path)
    assert torch.equal(loaded.pop("tensor"), values.pop("tensor"))
    assert loaded == values
    assert [type(value) for value in loaded.values()] == [type(value) for value in values.values()]


def test_what_is_loaded_lies_on_the_cpu_and_what_was_given_is_not_touched(fabric: Fabric, path: Path) -> None:
    tensor = torch.ones(3, requires_grad=True)
    state = {"tensor": tensor, "inner": {"step": 1}, "model": nn.Linear(1, 1)}
    before = dict(state)
    fabric.save(path, state)
    assert state == before
    loaded = fabric.load(path)
    assert loaded["tensor"].is_cpu
    assert loaded["tensor"] is not tensor


def test_a_filter_says_which_entries_are_kept(fabric: Fabric, path: Path) -> None:
    model, _, _ = trained(fabric)

    def only_biases(name: str, value: Tensor) -> bool:
        seen.append((name, value.shape))
        return name.endswith("bias")

    seen: list[Any] = []
    fabric.save(path, {"model": model, "step": 1}, filter={"model": only_biases})
    assert seen == [("weight", (2, 4)), ("bias", (2,))]
    assert list(fabric.load(path)["model"]) == ["bias"]
    other = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match="weight"):
        fabric.load(path, {"model": other})
    fabric.load(path, {"model": other}, strict=False)
    assert torch.equal(other.bias, model.bias)


@pytest.mark.parametrize(
    ("keep", "error", "words"),
    [
        ({"modle": lambda k, v: True}, ConfigurationError, "'modle'.*'model', 'step'"),
        ({"model": "bias"}, WrongTypeError, "a function of a name and a value"),
        ({"step": lambda k, v: True}, WrongTypeError, "no dictionary"),
    ],
    ids=["unknown key", "no function", "no dictionary"],
)
def test_a_filter_that_makes_no_sense_is_refused_before_anything_is_written(
    fabric: Fabric, path: Path, keep: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fabric.save(path, {"model": nn.Linear(1, 1), "step": 1}, filter=keep)
    assert not path.exists()


# -- what is missing, and what does not fit -----------------------------------------------------------------------


def test_a_missing_key_is_an_error_that_restores_nothing(fabric: Fabric, path: Path) -> None:
    fabric.save(path, {"model": nn.Linear(2, 2), "run": {"counter": Counter(1)}, "step": 3})
    model, counter = nn.Linear(2, 2), Counter()
    before = copy.deepcopy(model)
    for state, missing in (
        ({"model": model, "step": 0, "epoch": 0}, "'epoch'"),
        ({"model": model, "step": 0, "run": {"counter": counter, "other": Counter()}}, r"'run\.other'"),
    ):
        with pytest.raises(
            CheckpointKeyError, match=rf"no {missing}.*It has: 'model', 'run', 'step'.*strict=False"
        ):
            fabric.load(path, state)
        assert (state["step"], counter.count) == (0, 0)
        assert same(model, before)
    with pytest.raises(KeyError):
        fabric.load(path, {"epoch": 0})


def test_missing_keys_are_skipped_on_demand(fabric: Fabric, path: Path) -> None:
    saved = nn.Linear(2, 2)
    fabric.save(path, {"model": saved, "run": {"counter": Counter(1)}})
    model, counter, untouched = nn.Linear(2, 2), Counter(), nn.Linear(2, 2)
    before = copy.deepcopy(untouched)
    state = {"model": model, "epoch": 7, "run": {"counter": counter, "other": untouched}}
    assert fabric.load(path, state, strict=False) == {}
    assert same(model, saved)
    assert (counter.count, state["epoch"]) == (1, 7)
    assert same(untouched, before)


@pytest.mark.parametrize("raw", [False, True], ids=["load", "load_raw"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 2), "size mismatch for weight"),
        (nn.Linear(4, 2, bias=False), "Unexpected key.*bias"),
        (nn.Sequential(nn.Linear(4, 2)), "Missing key.*0.weight"),
        (torch.optim.SGD(nn.Linear(4, 2).parameters()), "this SGD;.*KeyError: 'param_groups'"),
    ],
    ids=["shapes", "extra", "missing", "optimizer"],
)
def test_a_state_that_does_not_fit_is_named(
    fabric: Fabric, path: Path, model: Any, words: str, raw: bool
) -> None:
    fabric.save(path, nn.Linear(4, 2).state_dict() if raw else {"net": nn.Linear(4, 2)})
    what = "The checkpoint" if raw else "The checkpoint's 'net'"
    with pytest.raises(CheckpointError, match=rf"(?s){what} does not fit .*{words}"):
        fabric.load_raw(path, model) if raw else fabric.load(path, {"net": model})


def test_a_checkpoint_of_another_shape_is_an_error_of_ours(fabric: Fabric, path: Path) -> None:
    torch.save(torch.ones(1), path)
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        fabric.load(path, {"model": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="does not fit"):
        fabric.load_raw(path, nn.Linear(1, 1))
    fabric.save(path, {"models": 3})
    with pytest.raises(CheckpointError, match="a int as 'models', where the state has a collection"):
        fabric.load(path, {"models": {"a": nn.Linear(1, 1)}})
    fabric.save(path, {"model": 3})
    with pytest.raises(CheckpointError, match="does not fit"):
        fabric.load(path, {"model": nn.Linear(1, 1)})


# -- the state of the precision -----------------------------------------------------------------------------------


class Scaled(Precision):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.scale = state_dict["scale"]


def test_the_state_of_the_precision_is_saved_and_restored_along(path: Path) -> None:
    model = nn.Linear(1, 1)
    Fabric(precision=Scaled(8.0)).save(path, {"model": model})
    precision = Scaled()
    fabric = Fabric(precision=precision)
    assert fabric.load(path, {"model": model}) == {}
    assert precision.scale == 8.0
    assert Fabric().load(path, {"model": model}) == {}  # another precision has no use for it
    with Fabric(precision=Scaled()) as nested:
        nested.load(path, {"model": model, "all": {"deeper": [Counter()]}}, strict=False)


def test_the_state_of_the_precision_stays_out_of_bare_weights_and_plain_values(path: Path) -> None:
    fabric = Fabric(precision=Scaled(8.0))
    fabric.save(path, {"step": 1, "inner": {"a": 2}})
    assert fabric.load(path) == {"step": 1, "inner": {"a": 2}}
    fabric.save(nn.Linear(1, 1).state_dict(), path)
    fabric.load_raw(path, nn.Linear(1, 1))
    assert set(torch.load(path, weights_only=True)) == {"weight", "bias"}


def test_a_checkpoint_without_a_state_of_the_precision_leaves_it_alone(path: Path) -> None:
    model = nn.Linear(1, 1)
    Fabric().save(path, {"model": model})
    precision = Scaled(4.0)
    Fabric(precision=precision).load(path, {"model": model})
    assert precision.scale == 4.0


# -- the strategy's part ------------------------------------------------------------------------------------------


def test_the_strategy_is_asked_for_the_states_of_models_and_optimizers(path: Path) -> None:
    class Asked(Strategy):
        spec = StrategySpec("asked", "", supports=("cpu",))

        def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
            asked.append(type(module))
            return super().module_state_dict(module)

        def optimizer_state_dict(self, optimizer: Any) -> dict[str, Any]:
            asked.append(type(optimizer))
            return super().optimizer_state_dict(optimizer)

        def load_module_state_dict(self, module: Any, state: Any, strict: bool = True) -> None:
            asked.append(strict)
            super().load_module_state_dict(module, state, strict)

    asked: list[Any] = []
    fabric = Fabric(strategy=Asked())
    model, optimizer, _ = trained(fabric)
    fabric.save(path, {"model": model, "optimizer": optimizer})
    fabric.load(path, {"model": model, "optimizer": optimizer}, strict=False)
    assert asked == [nn.Linear, torch.optim.SGD, False]


def test_what_was_loaded_does_not_depend_on_its_file_any_more(fabric: Fabric, path: Path) -> None:
    """Who uses memory that is mapped to a file which is cut short is killed by SIGBUS."""
    values = torch.arange(2.0**21)
    fabric.save(path, {"values": values})
    loaded = fabric.load(path)["values"]
    os.truncate(path, 0)
    assert torch.equal(loaded.add_(1), values + 1)
    fabric.save(path, {"values": loaded})
    assert torch.equal(fabric.load(path)["values"], loaded)
