"""setup and its relatives, creating models and moving things: on one process."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import one_process
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from fabric_core import (
    Accelerator,
    AcceleratorSpec,
    Fabric,
    Inventory,
    Precision,
    SetupError,
    Strategy,
    StrategySpec,
    WrongTypeError,
    is_wrapped,
    unwrap,
)

pytestmark = pytest.mark.usefixtures("core_alone")


fabric = one_process.fabric


class Elsewhere(Accelerator):
    """A second kind of device to move things to, which every PyTorch has."""

    spec = AcceleratorSpec(
        "elsewhere", "", probe=lambda: Inventory(indices=(0,)), strategies={"one": "single_device"}
    )

    def device(self, index: int) -> torch.device:
        return torch.device("meta")


@pytest.fixture
def elsewhere() -> Iterator[Fabric]:
    with Fabric(accelerator=Elsewhere()) as fabric:
        yield fabric


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# -- what comes back ----------------------------------------------------------------------------------------------


def test_what_comes_back_has_the_shape_of_what_was_given(fabric: Fabric) -> None:
    def parts() -> tuple[nn.Module, torch.optim.SGD, torch.optim.SGD]:
        model = nn.Linear(2, 2)
        return model, sgd(model), sgd(model)

    model, one, two = parts()
    assert unwrap(fabric.setup(model)) is model
    model, one, two = parts()
    result = fabric.setup(model, one)
    assert [unwrap(part) for part in result] == [model, one]
    assert isinstance(result, tuple)
    model, one, two = parts()
    scheduler = StepLR(one, 1)
    assert [unwrap(part) for part in fabric.setup(model, one, two, scheduler=scheduler)] == [
        model,
        one,
        two,
        scheduler,
    ]
    model, one, two = parts()
    assert unwrap(fabric.setup_module(model)) is model
    assert unwrap(fabric.setup_optimizers(one)) is one
    _, three, four = parts()
    assert [unwrap(part) for part in fabric.setup_optimizers(three, four)] == [three, four]
    loaders = [DataLoader([1]), DataLoader([2])]
    assert list(fabric.setup_dataloaders(loaders[0])) == [torch.tensor([1])]
    assert [is_wrapped(loader) for loader in fabric.setup_dataloaders(*loaders)] == [True, True]


def test_several_models_are_set_up_one_after_the_other(fabric: Fabric) -> None:
    first, second = (fabric.setup(nn.Linear(2, 2)) for _ in range(2))
    assert unwrap(first) is not unwrap(second)
    assert type(first) is type(second)


def test_callbacks_hear_of_each_model_that_was_set_up() -> None:
    heard: list[Any] = []

    class Callback:
        def on_after_setup(self, fabric: Fabric, module: nn.Module) -> None:
            heard.append((fabric, module))

    fabric = Fabric(callbacks=Callback())
    model = fabric.setup(nn.Linear(1, 1))
    module = fabric.setup_module(nn.Linear(1, 1))
    assert heard == [(fabric, model), (fabric, module)]


# -- what cannot be set up ----------------------------------------------------------------------------------------


def test_everything_is_set_up_once(fabric: Fabric) -> None:
    raw = nn.Linear(1, 1)
    model, optimizer = fabric.setup(raw, sgd(raw))
    loader = fabric.setup_dataloaders(DataLoader([1]))
    with pytest.raises(SetupError, match=r"The Linear passed to setup\(\) was set up before"):
        fabric.setup(model)
    with pytest.raises(SetupError, match="The Linear"):
        fabric.setup_module(model)
    with pytest.raises(SetupError, match="The Linear"):
        fabric.setup(torch.compile(model, backend="eager"))
    with pytest.raises(SetupError, match="The SGD"):
        fabric.setup(nn.Linear(1, 1), optimizer)
    with pytest.raises(SetupError, match=r"The SGD passed to setup_optimizers\(\)"):
        fabric.setup_optimizers(optimizer)
    with pytest.raises(SetupError, match="The DataLoader"):
        fabric.setup_dataloaders(loader)
    with pytest.raises(SetupError, match="The Linear"):
        fabric.setup(raw)
    with pytest.raises(SetupError, match="The SGD"):
        fabric.setup_optimizers(*2 * [sgd(raw)])
    with Fabric(accelerator="cpu") as another:
        assert another.setup(raw)(torch.ones(1, 1)).shape == (1, 1)


def test_what_failed_halfway_can_be_set_up_again() -> None:
    class Failing(Strategy):
        spec = StrategySpec("failing", "", supports=("cpu",))
        failures = [ZeroDivisionError()]

        def setup_module(self, module: nn.Module) -> nn.Module:
            if self.failures:
                raise self.failures.pop()
            return module

    fabric = Fabric(strategy=Failing())
    model = nn.Linear(1, 1)
    optimizer = sgd(model)
    with pytest.raises(ZeroDivisionError):
        fabric.setup(model, optimizer)
    fabric.setup(model, optimizer)
    another = nn.Linear(1, 1)
    with pytest.raises(SetupError, match="The SGD"):
        fabric.setup(another, optimizer)
    fabric.setup(another)


@pytest.mark.parametrize(
    "wrong", ["model", None, 3, nn.Linear, [nn.Linear(1, 1)]], ids=lambda w: repr(w)[:12]
)
def test_what_is_no_model_is_refused(fabric: Fabric, wrong: Any) -> None:
    for setup in (fabric.setup, fabric.setup_module):
        with pytest.raises(WrongTypeError, match=r"takes a torch\.nn\.Module, not a"):
            setup(wrong)


def test_what_is_no_optimizer_is_refused_before_anything_is_changed(elsewhere: Fabric) -> None:
    model = nn.Linear(1, 1)
    optimizer = sgd(model)
    with pytest.raises(WrongTypeError, match=r"not a StepLR\. A scheduler is given by name: scheduler="):
        elsewhere.setup(model, optimizer, StepLR(optimizer, 1))
    with pytest.raises(WrongTypeError, match="not a list"):
        elsewhere.setup(model, [optimizer])  # type: ignore[arg-type]
    with pytest.raises(WrongTypeError, match=r"setup_optimizers\(\) takes optimizers"):
        elsewhere.setup_optimizers(model)  # type: ignore[arg-type]
    assert model.weight.device == torch.device("cpu")


@pytest.mark.parametrize(
    "wrong", ["loader", [1, 2], None, TensorDataset(torch.ones(1))], ids=lambda w: repr(w)[:9]
)
def test_what_is_no_loader_is_refused(fabric: Fabric, wrong: Any) -> None:
    with pytest.raises(WrongTypeError, match=r"takes torch\.utils\.data\.DataLoader"):
        fabric.setup_dataloaders(wrong)


def test_an_optimizer_of_parameters_without_memory_is_refused_with_the_right_order(fabric: Fabric) -> None:
    with torch.device("meta"):
        model = nn.Linear(1, 1)
    with pytest.raises(SetupError, match=r"SGD holds parameters on the meta device.*setup_module"):
        fabric.setup(model, sgd(model))
    with pytest.raises(SetupError, match="meta device"):
        fabric.setup_optimizers(sgd(model))


def test_a_strategy_that_wants_model_and_optimizers_together_gets_them_together() -> None:
    class Joint(Strategy):
        spec = StrategySpec("joint", "", supports=("cpu",))
        joint_setup = True

        def setup_module_and_optimizers(self, module: Any, optimizers: Any, scheduler: Any = None) -> Any:
            given.append((module, optimizers, scheduler))
            return module, [sgd(module)], "another scheduler"

    given: list[Any] = []
    fabric = Fabric(strategy=Joint())
    with pytest.raises(
        SetupError,
        match=r"'joint' sets up a model and its optimizers together; setup_optimizers\(\) does it apart",
    ):
        fabric.setup_optimizers(sgd(nn.Linear(1, 1)))
    model = nn.Linear(1, 1)
    optimizer = sgd(model)
    _, ready, scheduler = fabric.setup(model, optimizer, scheduler="scheduler")
    assert given == [(model, [optimizer], "scheduler")]
    assert unwrap(ready) is not optimizer
    assert scheduler == "another scheduler"


# -- moving and converting ----------------------------------------------------------------------------------------


def test_a_model_is_moved_to_the_device_unless_told_otherwise(elsewhere: Fabric) -> None:
    assert elsewhere.setup(nn.Linear(1, 1)).weight.is_meta
    assert elsewhere.setup_module(nn.Linear(1, 1)).device.type == "meta"
    assert elsewhere.setup(nn.Linear(1, 1), move_to_device=False).weight.is_cpu
    assert elsewhere.setup_module(nn.Linear(1, 1), move_to_device=False).device.type == "cpu"


def test_a_precision_converts_the_weights_and_may_replace_the_model() -> None:
    class Replacing(Precision):
        def convert_module(self, module: nn.Module) -> nn.Module:
            replaced.append(nn.Sequential(module.double()))
            return replaced[0]

        def convert_input(self, data: Any) -> Any:
            return tuple(x.double() for x in data) if isinstance(data, tuple) else data

        def convert_output(self, data: Any) -> Any:
            return data.float()

    replaced: list[nn.Module] = []
    fabric = Fabric(precision=Replacing())
    model = fabric.setup(nn.Linear(2, 2))
    assert unwrap(model) is replaced[0]
    assert model.dtype is torch.float64
    assert model(torch.ones(1, 2)).dtype is torch.float32


def test_to_device_moves_models_in_place_and_collections_as_they_are(elsewhere: Fabric) -> None:
    Pair = namedtuple("Pair", "left right")

    @dataclass
    class Batch:
        image: Tensor
        name: str

    model = nn.Linear(1, 1)
    assert elsewhere.to_device(model) is model
    assert model.weight.is_meta
    wrapped = elsewhere.setup(nn.Linear(1, 1), move_to_device=False)
    assert elsewhere.to_device(wrapped) is wrapped
    assert unwrap(wrapped).weight.is_meta
    moved = elsewhere.to_device({"a": [torch.ones(1), 3], "b": Pair(torch.ones(1), "x")})
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 3
    assert isinstance(moved["b"], Pair)
    assert moved["b"].left.is_meta
    batch = elsewhere.to_device(Batch(torch.ones(1), "cat"))
    assert (batch.image.is_meta, batch.name) == (True, "cat")
    assert elsewhere.to_device("text") == "text"


def test_models_and_tensors_can_be_created_on_the_device(elsewhere: Fabric) -> None:
    with elsewhere.init_module():
        model = nn.Linear(2, 2)
    with elsewhere.init_tensor():
        tensor = torch.zeros(2)
    assert model.weight.is_meta
    assert tensor.is_meta
    assert torch.zeros(1).is_cpu


def test_models_can_be_created_in_the_dtype_of_the_precision_and_errors_leave_nothing_changed() -> None:
    @contextmanager
    def default_dtype(dtype: torch.dtype) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    class Double(Precision):
        def init_context(self) -> AbstractContextManager[Any]:
            return default_dtype(torch.float64)

    fabric = Fabric(precision=Double())
    with fabric.init_module():
        assert nn.Linear(1, 1).weight.dtype is torch.float64
    with fabric.init_tensor():
        assert torch.ones(1).dtype is torch.float64
    with pytest.raises(ZeroDivisionError), fabric.init_module(empty_init=True):
        raise ZeroDivisionError
    assert torch.ones(1).dtype is torch.float32
    assert nn.Linear(100, 100).weight.std() > 0


def test_empty_init_draws_no_random_numbers(fabric: Fabric) -> None:
    before = torch.get_rng_state()
    with fabric.init_module(empty_init=True):
        model = nn.Linear(8, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight.shape == (8, 8)
    with fabric.init_module(empty_init=False):
        nn.Linear(8, 8)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_model_created_in_the_context_is_that_of_plain_pytorch(fabric: Fabric) -> None:
    torch.manual_seed(3)
    plain = nn.Linear(8, 8)
    torch.manual_seed(3)
    with fabric.init_module():
        model = nn.Linear(8, 8)
    assert torch.equal(model.weight, plain.weight)


# -- loaders ------------------------------------------------------------------------------------------------------


def test_a_set_up_loader_is_a_loader_that_moves_its_batches(elsewhere: Fabric) -> None:
    raw = DataLoader([{"x": torch.ones(1), "name": "a"}] * 4, batch_size=2)
    loader = elsewhere.setup_dataloaders(raw)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 2
    assert loader.batch_size == 2
    for batch in loader:
        assert batch["x"].is_meta
        assert batch["name"] == ["a", "a"]
    assert next(iter(raw))["x"].is_cpu
    stays = elsewhere.setup_dataloaders(DataLoader([torch.ones(1)]), move_to_device=False)
    assert next(iter(stays)).is_cpu


@pytest.mark.parametrize(
    "options",
    [{}, {"replace_sampler": False}, {"use_distributed_sampler": False}, {"use_distributed_sampler": True}],
    ids=str,
)
def test_on_one_process_a_loader_keeps_its_sampler(fabric: Fabric, options: dict[str, bool]) -> None:
    raw = DataLoader(list(range(4)), shuffle=True)
    loader = fabric.setup_dataloaders(raw, **options)
    assert loader.sampler is raw.sampler
    assert isinstance(loader.sampler, RandomSampler)
    assert sorted(int(batch) for batch in loader) == [0, 1, 2, 3]


def test_a_loader_tells_its_dataset_the_epoch(fabric: Fabric) -> None:
    class Epochs(Dataset[int]):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            return index

    loader = fabric.setup_dataloaders(DataLoader(Epochs()))
    for _ in range(3):
        list(loader)
    assert Epochs.epochs == [0, 1, 2]
    loader.set_epoch(7)
    list(loader)
    assert Epochs.epochs[-1] == 7


def test_a_seeded_run_repeats_itself_from_the_first_weight_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fabric_core.data import seed

    def run() -> list[Tensor]:
        monkeypatch.setattr(seed, "_state", type(seed._state)())
        with Fabric() as fabric:
            fabric.seed_everything(5)
            model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(), nn.Linear(4, 1))
            model, optimizer = fabric.setup(model, sgd(model))
            loader = fabric.setup_dataloaders(DataLoader(torch.randn(16, 2), batch_size=4, shuffle=True))
            for _ in range(2):
                for batch in loader:
                    fabric.backward(model(batch).sum())
                    optimizer.step()
                    optimizer.zero_grad()
            return [parameter.detach() for parameter in model.parameters()]

    state = torch.get_rng_state()
    assert all(torch.equal(one, two) for one, two in zip(run(), run(), strict=True))
    torch.set_rng_state(state)
