"""Precisions of fewer than 16 bits: torchao and bitsandbytes for real, on the CPU; Transformer Engine is pretended.

Transformer Engine cannot be imported without a GPU's libraries. What pretends to be it stands in this file.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import (
    Inventory,
    MissingRequirementError,
    OptionsError,
    Registry,
    Request,
    SetupError,
    UnsupportedError,
)
from fabric_core.resolve import resolve
from fabric_cuda import BitsandbytesPrecision, Float8Precision, TransformerEnginePrecision
from fabric_cuda.accelerators import probes

CPU = torch.device("cpu")
NAMES = [
    "transformer-engine",
    "transformer-engine-float16",
    "float8",
    *(f"bitsandbytes-{mode}" for mode in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")),
]

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="not run: torchao is not installed")
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="not run: bitsandbytes is not installed"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of these packages


def net(inputs: int = 32, hidden: int = 64, outputs: int = 16) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


# -- which device each is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_on_a_cpu_each_is_one_clear_error(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"'{name}' exists only for cuda.* here .* the accelerator 'cpu'"
    ):
        resolve(Request(accelerator="cpu", precision=name), Registry(environ={}))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("transformer-engine", "transformer-engine"),
        ("float8", "torchao"),
        ("bitsandbytes-nf4", "bitsandbytes"),
    ],
)
def test_what_is_not_installed_is_named_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setattr(probes, "cuda", lambda: Inventory((0,)))
    monkeypatch.setattr("fabric_core.requirements.installed_version", lambda _: None)
    with pytest.raises(MissingRequirementError, match=f"pip install '{package}"):
        resolve(Request(accelerator="cuda", precision=name), Registry(environ={}))


def test_a_package_that_fails_at_import_is_named_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(
        MissingRequirementError, match="'float8' needs 'torchao.float8', which cannot be imported"
    ):
        Float8Precision()


# -- torchao ---------------------------------------------------------------------------------------------------------


def float8(**options: Any) -> Float8Precision:
    precision = Float8Precision(**{"emulate": True, **options})
    precision.attach(CPU)
    return precision


def trained(model: nn.Module, forward: Any) -> list[float]:
    """The losses of ten steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        loss = (forward(inputs) - inputs[:, :16]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_trains_as_torchao_under_autocast_bit_for_bit(recipe: str) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", True)
    plain = convert_to_float8_training(net(), config=config)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(inputs).float()

    precision = float8(recipe=recipe)
    model = precision.convert_module(net())
    losses = trained(model, precision.wrap_forward(model))
    assert losses == trained(plain, forward)
    assert losses[-1] < losses[0]
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


@needs_torchao
def test_float8_is_coarser_than_bfloat16_and_not_by_much() -> None:
    precision = float8()
    model = precision.convert_module(net())
    inputs = torch.randn(64, 32)
    with torch.no_grad():
        exact, coarse = net()(inputs), precision.wrap_forward(model)(inputs)
    error = float((coarse - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.1, "8 bits leave 3 of them for the digits"


@needs_torchao
def test_float8_converts_what_fits_keeps_names_and_says_what_is_left() -> None:
    model = nn.ModuleDict({"fits": nn.Linear(32, 16), "odd": nn.Linear(30, 16), "head": nn.Linear(16, 16)})
    weight, names = model["fits"].weight, list(model.state_dict())
    with pytest.warns(UserWarning, match=r"1 linear layer\(s\) stay in 16 bits.*multiples of 16: 'odd'"):
        converted: Any = float8(ignore_modules=("head",)).convert_module(model)
    assert type(converted["fits"]).__name__ == "Float8Linear"
    assert type(converted["odd"]) is type(converted["head"]) is nn.Linear
    assert converted["fits"].weight is weight, "an optimizer that has it keeps it"
    assert list(converted.state_dict()) == names


@needs_torchao
def test_float8_asks_a_filter_of_the_user() -> None:
    model: Any = float8(module_filter=lambda layer, name: name == "2").convert_module(net())
    assert [type(part).__name__ for part in model] == ["Linear", "ReLU", "Float8Linear"]


@needs_torchao
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "rowwize"}, OptionsError, r"no recipe 'rowwize'. Did you mean 'rowwise'"),
        ({"emulate": False}, UnsupportedError, "'cpu' cannot multiply in 8 bits"),
    ],
)
def test_float8_refuses_what_cannot_be_had(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        float8(**options).convert_module(net())


@needs_torchao
def test_float8_refuses_a_model_without_a_layer_that_fits() -> None:
    with pytest.raises(UnsupportedError, match="has none"):
        float8().convert_module(net(30, 31, 7))


# -- bitsandbytes ----------------------------------------------------------------------------------------------------

FOUR_BITS = ["nf4", "nf4-dq", "fp4", "fp4-dq"]


def quantised(mode: str, model: nn.Module | None = None, **options: Any) -> tuple[BitsandbytesPrecision, Any]:
    precision = BitsandbytesPrecision(mode, **options)
    precision.attach(CPU)
    return precision, precision.convert_module(model or net()).to(CPU)


def distance(mode: str, model: Any, precision: BitsandbytesPrecision) -> float:
    inputs = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, coarse = net()(inputs), precision.wrap_forward(model)(inputs)
    assert coarse.dtype is torch.float32
    return float((coarse - exact).norm() / exact.norm())


@needs_bitsandbytes
@pytest.mark.parametrize("mode", FOUR_BITS)
def test_four_bits_compute_what_they_should_within_their_coarseness(mode: str) -> None:
    precision, model = quantised(mode)
    assert 0.01 < distance(mode, model, precision) < 0.3, "16 different numbers are left for each weight"
    layer = model[0]
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.dtype is torch.uint8
    assert layer.weight.numel() == 32 * 64 // 2
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


@needs_bitsandbytes
def test_eight_bits_compute_what_they_should_within_their_coarseness() -> None:
    precision, model = quantised("int8")
    assert 1e-4 < distance("int8", model, precision) < 0.05
    assert model[0].weight.dtype is torch.int8


@needs_bitsandbytes
@pytest.mark.parametrize("mode", [*FOUR_BITS, "int8"])
def test_a_quantised_model_is_saved_and_restored_bit_for_bit(mode: str) -> None:
    precision, model = quantised(mode)
    inputs = torch.randn(8, 32)
    with torch.no_grad():
        before = precision.wrap_forward(model)(inputs)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    fresh, restored = quantised(mode, other)
    restored.load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(fresh.wrap_forward(restored)(inputs), before)


@needs_bitsandbytes
@pytest.mark.parametrize("mode", [*FOUR_BITS, "int8"])
def test_plain_weights_are_quantised_when_they_are_loaded(mode: str) -> None:
    precision, model = quantised(mode)
    inputs = torch.randn(8, 32)
    with torch.no_grad():
        expected = precision.wrap_forward(model)(inputs)
    torch.manual_seed(99)
    other = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    fresh, restored = quantised(mode, other)
    half = net().to(fresh.dtype)
    restored.load_state_dict(half.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.wrap_forward(restored)(inputs), expected)


@needs_bitsandbytes
def test_an_adapter_is_trained_on_top_of_frozen_weights() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = net(), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.adapter(x)

    precision, model = quantised("nf4", Adapted(), ignore_modules=("adapter",))
    frozen = model.base[0].weight.clone()
    assert type(model.adapter) is nn.Linear
    losses = trained(model.adapter, precision.wrap_forward(model))
    assert losses[-1] < losses[0]
    assert torch.equal(model.base[0].weight, frozen)


@needs_bitsandbytes
def test_an_optimizer_of_weights_that_are_quantised_is_refused_with_the_right_order() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision, _ = quantised("nf4", model)
    with pytest.raises(SetupError, match=r"2 of 4 parameters of the SGD are weights.*setup_module"):
        precision.setup_optimizer(optimizer)


@needs_bitsandbytes
def test_training_in_eight_bits_keeps_the_parameters_that_an_optimizer_has() -> None:
    model = net()
    weights = list(model.parameters())
    _, converted = quantised("int8-training", model)
    assert all(one is other for one, other in zip(converted.parameters(), weights, strict=True))
    assert all(parameter.requires_grad and parameter.dtype is torch.float16 for parameter in weights)


@needs_bitsandbytes
def test_training_in_eight_bits_follows_training_in_float16_though_gradients_are_there_in_forward() -> None:
    model, plain = net(), net()
    precision, converted = quantised("int8-training", model)
    losses = trained(converted, precision.wrap_forward(converted))
    exact = trained(plain, plain)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(exact, rel=0.02)
    assert losses != exact


@needs_torchao
@needs_bitsandbytes
def test_a_model_that_is_converted_already_is_left_as_it_is() -> None:
    converted: Any = float8().convert_module(net())
    layers = list(converted)
    assert list(float8().convert_module(converted)) == layers
    _, model = quantised("nf4")
    layers, weight = list(model), model[0].weight
    _, again = quantised("nf4", model)
    assert list(again) == layers
    assert torch.equal(again[0].weight, weight)


@needs_bitsandbytes
def test_hooks_of_a_layer_that_is_replaced_go_on_and_can_be_removed() -> None:
    model: Any = net()
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda layer, *_: seen.append(type(layer).__name__))
    _, converted = quantised("int8-training", model)
    converted(torch.ones(1, 32, dtype=torch.float16))
    assert seen == ["Linear8bitLt"]
    handle.remove()
    converted(torch.ones(1, 32, dtype=torch.float16))
    assert len(seen) == 1


@needs_bitsandbytes
def test_layers_whose_weight_is_shared_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 32)
            self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 16, bias=False)
            self.head.weight = self.embedding.weight

    with pytest.warns(UserWarning, match="other modules use their weights too: 'head'"):
        _, model = quantised("nf4", Tied())
    assert model.head.weight is model.embedding.weight


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("mode", "options", "error", "message"),
    [
        ("nf5", {}, OptionsError, "no mode 'nf5' here. Did you mean 'nf4'"),
        ("int8", {"dtype": "bfloat16"}, OptionsError, "bfloat16"),
        ("nf4", {"ignore_modules": ("0", "2")}, UnsupportedError, "has none that can be"),
    ],
)
def test_bitsandbytes_refuses_what_cannot_be_had(
    mode: str, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        quantised(mode, **options)


# -- Transformer Engine, pretended -----------------------------------------------------------------------------------


class Engine:
    """What is used of Transformer Engine, as its documentation describes it."""

    def __init__(self) -> None:
        self.entered: list[Any] = []

    @contextmanager
    def autocast(self, enabled: bool, recipe: Any) -> Iterator[None]:
        self.entered.append((enabled, recipe, torch.get_autocast_dtype("cpu"), torch.get_default_dtype()))
        yield

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool, device: str) -> None:
            super().__init__(inputs, outputs, bias=bias, device=device)

    class LayerNorm(nn.LayerNorm):
        def __init__(self, shape: Any, eps: float, device: str) -> None:
            super().__init__(shape, eps=eps, device=device)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine()
    for cls in (Engine.Linear, Engine.LayerNorm):
        monkeypatch.setattr(cls, "__module__", "transformer_engine.pytorch")
    recipes = ModuleType("recipe")

    class DelayedScaling:
        def __init__(self, fp8_format: Any = None, amax_history_len: int = 16) -> None:
            self.fp8_format, self.amax_history_len = fp8_format, amax_history_len

    import enum

    recipes.DelayedScaling = DelayedScaling  # type: ignore[attr-defined]
    recipes.Format = enum.Enum("Format", ["E4M3", "HYBRID"])  # type: ignore[attr-defined]
    names = {
        "transformer_engine": ModuleType("transformer_engine"),
        "transformer_engine.common": ModuleType("common"),
        "transformer_engine.common.recipe": recipes,
        "transformer_engine.pytorch": found,
    }
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_layers_are_replaced_around_the_same_parameters(engine: Engine) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 16, bias=False))
    parameters = list(model.parameters())
    precision = TransformerEnginePrecision()
    precision.attach(CPU)
    converted: Any = precision.convert_module(model)
    assert [type(part) for part in converted] == [Engine.Linear, Engine.LayerNorm, Engine.Linear]
    assert all(one is other for one, other in zip(converted.parameters(), parameters, strict=True))
    assert all(parameter.dtype is torch.bfloat16 for parameter in parameters)
    output = precision.wrap_forward(converted)(torch.randn(8, 32))
    assert output.dtype is torch.float32
    assert engine.entered == [(True, None, torch.bfloat16, torch.bfloat16)]


def test_a_recipe_is_chosen_by_name_and_takes_options(engine: Engine) -> None:
    recipe = {"name": "delayed", "fp8_format": "hybrid", "amax_history_len": 8}
    precision = TransformerEnginePrecision("float16", recipe, fallback_compute_dtype="bfloat16")
    assert precision.recipe.amax_history_len == 8
    assert precision.recipe.fp8_format.name == "HYBRID"
    ready = object()
    assert TransformerEnginePrecision(recipe=ready).recipe is ready


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "delayd"}, "no recipe 'delayd'. Did you mean 'delayed'. There are: delayed"),
        ({"recipe": {"fp8_format": "E9"}}, "no number format 'E9'"),
        ({"recipe": {"history": 3}}, "refuses"),
        ({"weights_dtype": "float64"}, "float64"),
    ],
)
def test_transformer_engine_refuses_options_that_there_are_not(
    engine: Engine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionsError, match=message.replace("'. There", r"'\? There")):
        TransformerEnginePrecision(**options)


def test_layers_that_do_not_fit_stay_and_none_at_all_is_an_error(engine: Engine) -> None:
    precision = TransformerEnginePrecision()
    with pytest.warns(UserWarning, match="no multiples of 16: '1'"):
        model: Any = precision.convert_module(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 10)))
    assert [type(part) for part in model] == [Engine.Linear, nn.Linear]
    with pytest.raises(UnsupportedError, match="has none to replace"):
        precision.convert_module(nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept: Any = TransformerEnginePrecision(replace_layers=False).convert_module(nn.Linear(3, 3))
    assert type(kept) is nn.Linear
