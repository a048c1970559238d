"""Steps without PyTorch's part around them: nothing that a user can see is different, with them and without."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torchs
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

from fabric_core import Fabric, unwrap
from fabric_core.wrappers import direct

pytestmark = pytest.mark.usefixtures("core_alone")

INPUTS = torch.linspace(-1, 1, 32).reshape(4, 8)


@pytest.fixture(params=["direct", "ordinary"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which way optimizers go that are set up in this test."""
    if request.param == "ordinary":
        monkeypatch.setattr(direct, "LOOKED_AT", ())
    return str(request.param)


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu") as fabric:
        yield fabric


def plain(cls: Any = torch.optim.SGD, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    return model, cls(model.parameters(), **({"lr": 0.1} | options))


def set_up(fabric: Fabric, cls: Any = torch.optim.SGD, **options: Any) -> tuple[Any, Any]:
    model, optimizer = fabric.setup(*plain(cls, **options))
    return model, optimizer


def train(model: nn.Module, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        model(INPUTS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that PyTorch's costly ranges are opened with; the ordinary way opens them."""
    opened: list[str] = []

    class Noted(torch.autograd.profiler.record_function):
        def __init__(self, name: str, args: Any = None) -> None:
            opened.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Noted)
    return opened


# -- which way is gone --------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.__version__.startswith(direct.LOOKED_AT), reason="this PyTorch was not looked at"
)
def test_nobody_pays_for_what_nobody_looks_at(fabric: Fabric, ranges: list[str]) -> None:
    train(*set_up(fabric), steps=2)
    assert ranges == []
    train(*plain())
    assert ranges == ["Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"]


def test_an_unknown_version_of_pytorch_is_left_to_itself(
    fabric: Fabric, ranges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    train(*set_up(fabric))
    assert ranges == ["Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"]


def test_a_private_part_that_looks_different_is_left_alone(
    fabric: Fabric, ranges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hooking(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.profiler.record_function("another layout"):
                return step(*args, **kwargs)

        return wrapper

    class Fresh(torch.optim.SGD):
        step = torch.optim.SGD.step

    monkeypatch.setattr(Fresh, "step", hooking(Fresh.step))
    train(*set_up(fabric, Fresh))
    assert "another layout" in ranges


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {"differentiable": False, "maximize": True}),
    ],
)
def test_a_training_is_the_same_to_the_last_bit(
    way: str, fabric: Fabric, cls: Any, options: dict[str, Any]
) -> None:
    one, other = plain(cls, **options), set_up(fabric, cls, **options)
    train(*one, steps=5)
    train(*other, steps=5)
    assert torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(one[0].bias, other[0].bias)
    assert other[0].weight.grad is None


def test_closures_are_called_as_often_and_their_loss_comes_back(way: str, fabric: Fabric) -> None:
    def losses(model: nn.Module, optimizer: Any) -> list[float]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(INPUTS).square().mean()
            loss.backward()
            seen.append(loss.item())
            return loss

        seen: list[float] = []
        assert optimizer.step(closure).item() == seen[0]
        return seen

    expected = losses(*plain(torch.optim.LBFGS))
    assert losses(*set_up(fabric, torch.optim.LBFGS)) == expected
    assert len(expected) > 1


def test_gradients_that_are_set_to_zero_instead_are_zero(way: str, fabric: Fabric) -> None:
    for foreach in (False, True):
        model, optimizer = set_up(fabric, foreach=foreach)
        fabric.backward(model(INPUTS).square().mean())
        gradient = model.weight.grad
        optimizer.zero_grad(set_to_none=False)
        assert model.weight.grad is gradient
        assert not gradient.any()
        gradient.fill_(1)
        optimizer.zero_grad(False)
        assert model.weight.grad is gradient
        assert not gradient.any()
        optimizer.zero_grad(True)
        assert model.weight.grad is None


def test_parameters_that_come_later_are_stepped_and_dropped_too(way: str, fabric: Fabric) -> None:
    _, optimizer = set_up(fabric)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 1.0})
    late.grad = torch.ones(2)
    optimizer.step()
    assert late.tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert late.grad is None


# -- profilers ----------------------------------------------------------------------------------------------------


def seen_by_profile(step: Callable[[], None]) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return Counter(event.name for event in profiled.events())


def seen_by_c_profiler(step: Callable[[], None]) -> Counter[str]:
    """A profiler that was started past Python's, so that no flag of Python's says so."""
    from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _ExperimentalConfig

    config = ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, _ExperimentalConfig())
    torch._C._autograd._prepare_profiler(config, {ProfilerActivity.CPU})
    torch._C._autograd._enable_profiler(config, {ProfilerActivity.CPU})
    step()
    return Counter(event.name() for event in torch._C._autograd._disable_profiler().events())


def seen_by_trace(step: Callable[[], None]) -> Counter[str]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        observer = ExecutionTraceObserver().register_callback(str(path))
        with profile(activities=[ProfilerActivity.CPU], execution_trace_observer=observer):
            step()
        return Counter(node["name"] for node in json.loads(path.read_text())["nodes"])


@pytest.mark.parametrize("profiler", [seen_by_profile, seen_by_c_profiler, seen_by_trace])
def test_every_profiler_sees_what_it_sees_of_a_plain_loop(
    way: str, fabric: Fabric, profiler: Callable[..., Counter[str]]
) -> None:
    (model, optimizer), (wrapped, set_up_one) = plain(), set_up(fabric)
    train(model, optimizer)
    train(wrapped, set_up_one)
    expected = profiler(lambda: train(model, optimizer))
    assert expected["Optimizer.step#SGD.step"] == expected["Optimizer.zero_grad#SGD.zero_grad"] == 1
    assert profiler(lambda: train(wrapped, set_up_one)) == expected


def test_ranges_are_those_of_a_user(way: str, fabric: Fabric) -> None:
    _, optimizer = set_up(fabric)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    (event,) = (event for event in profiled.events() if event.name == "Optimizer.step#SGD.step")
    assert event.is_user_annotation


def test_a_monitor_that_sees_costly_ranges_only_gets_them(
    fabric: Fabric, ranges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = SimpleNamespace(_monitor_singleton=object(), push_user_annotation=lambda name: None)
    monkeypatch.setattr(torch.profiler, "_cupti_monitor", monitor, raising=False)
    _, optimizer = set_up(fabric)
    optimizer.step()
    assert ranges == ["Optimizer.step#SGD.step"]


# -- hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("face", ["set up", "raw"])
def test_hooks_of_one_optimizer_are_called_while_they_are_registered(
    way: str, fabric: Fabric, kind: str, face: str
) -> None:
    _, optimizer = set_up(fabric)
    raw, seen = unwrap(optimizer), []
    register = getattr(optimizer if face == "set up" else raw, f"register_step_{kind}_hook")
    optimizer.step()
    handle = register(lambda one, args, kwargs: seen.append((one, args)))
    optimizer.step()
    assert seen == [(raw, (raw,))]
    handle.remove()
    optimizer.step()
    assert len(seen) == 1


def test_a_hook_may_replace_the_arguments(way: str, fabric: Fabric) -> None:
    _, optimizer = set_up(fabric)
    optimizer.register_step_pre_hook(lambda one, args, kwargs: ((one, lambda: torch.tensor(3.0)), {}))
    assert optimizer.step() == 3.0


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_of_all_optimizers_are_called_while_they_are_registered(
    way: str, fabric: Fabric, kind: str
) -> None:
    _, optimizer = set_up(fabric)
    seen: list[Any] = []
    handle = getattr(torchs, f"register_optimizer_step_{kind}_hook")(lambda one, *_: seen.append(one))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert seen == [unwrap(optimizer)]


def test_forward_hooks_of_one_module_and_of_all_are_called(way: str, fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    seen: list[str] = []
    handles = [
        model.register_forward_pre_hook(lambda *_: seen.append("before")),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all")),
        model.register_forward_hook(lambda *_: seen.append("after")),
    ]
    try:
        train(model, optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "all", "after"]


# -- methods that are replaced or overridden ----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_is_replaced_on_the_users_optimizer_is_called(
    way: str, fabric: Fabric, when: str
) -> None:
    model, raw = plain()
    calls: list[str] = []

    def replace() -> None:
        own, own_zero_grad = raw.step, raw.zero_grad
        raw.step = lambda *args: (calls.append("step"), own(*args))[1]
        raw.zero_grad = lambda *args: (calls.append("zero_grad"), own_zero_grad(*args))[1]

    if when == "before":
        replace()
    wrapped, optimizer = fabric.setup(model, raw)
    train(wrapped, optimizer)
    if when == "after":
        replace()
    train(wrapped, optimizer)
    assert calls == ["step", "zero_grad"] * (2 if when == "before" else 1)


def test_a_step_that_is_replaced_on_the_class_is_called(
    way: str, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, method: Any) -> Any:
        @functools.wraps(method)  # as libraries do it: the copy says of itself what PyTorch's says
        def noting(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        return noting

    before = set_up(fabric)
    monkeypatch.setattr(torch.optim.SGD, "step", noted("step", torch.optim.SGD.step))
    monkeypatch.setattr(torchs.Optimizer, "zero_grad", noted("zero_grad", torchs.Optimizer.zero_grad))
    after = set_up(fabric)
    for pair in (before, after):
        train(*pair)
    assert calls == ["step", "zero_grad"] * 2


@pytest.mark.parametrize("made", ["before", "after"])
def test_schedulers_see_every_step(way: str, fabric: Fabric, made: str) -> None:
    model, raw = plain()
    scheduler = torch.optim.lr_scheduler.StepLR(raw, 1, gamma=0.5) if made == "before" else None
    wrapped, optimizer = fabric.setup(model, raw)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        train(wrapped, optimizer)
        scheduler.step()  # warns, and a warning is an error, unless it saw a step
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_scaler_of_the_users_own_steps(way: str, fabric: Fabric) -> None:
    weights = []
    for model, optimizer in (plain(), set_up(fabric)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(INPUTS).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(model.weight)
    assert torch.equal(*weights)


def test_what_a_class_overrides_is_called(way: str, fabric: Fabric) -> None:
    calls: list[str] = []

    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> str:  # type: ignore[override]
            calls.append("step")
            super().step(closure)
            return "mine"

        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append("zero_grad")
            super().zero_grad(set_to_none)

    model, optimizer = set_up(fabric, Mine)
    fabric.backward(model(INPUTS).square().mean())
    assert optimizer.step() == "mine"
    optimizer.zero_grad()
    assert calls == ["step", "zero_grad"]
    assert model.weight.grad is None


def test_an_override_that_keeps_the_compiler_out_is_called(way: str, fabric: Fabric) -> None:
    class Mine(torch.optim.SGD):
        @torch._disable_dynamo
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append("zero_grad")

    calls: list[str] = []
    model, optimizer = set_up(fabric, Mine)
    fabric.backward(model(INPUTS).square().mean())
    optimizer.zero_grad()
    assert calls == ["zero_grad"]
    assert model.weight.grad is not None


def test_an_optimizer_that_never_ran_pytorchs_constructor_steps(way: str, fabric: Fabric) -> None:
    class Foreign(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": list(parameters), "lr": 0.1}]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(0.1 * parameter.grad)

        def zero_grad(self, set_to_none: bool = True) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad = None

    optimizer = fabric.setup_optimizers(Foreign(nn.Linear(8, 2).parameters()))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.param_groups[0]["params"][0].grad is None


# -- compilers, copies, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_is_compiled_into_as_many_graphs_as_a_plain_one(way: str, fabric: Fabric, cls: Any) -> None:
    found = []
    for model, optimizer in (plain(cls), set_up(fabric, cls)):
        graphs: list[Any] = []

        def backend(graph: Any, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return graph.forward

        def step(optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend)
        for _ in range(2):
            model(INPUTS).square().mean().backward()
            compiled()
        found.append((graphs, model.weight))
    assert found[0][0] == found[1][0] != []
    assert torch.equal(found[0][1], found[1][1])


def test_copies_and_pickles_are_plain_optimizers(way: str, fabric: Fabric) -> None:
    model, optimizer = set_up(fabric, momentum=0.9)
    train(model, optimizer)
    for copied in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is torch.optim.SGD
        copied.step()
        copied.zero_grad()
    train(model, optimizer)


def test_functional_transforms_see_a_set_up_model(way: str, fabric: Fabric) -> None:
    model, optimizer = set_up(fabric)
    train(model, optimizer)

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row,)).square().mean()

    parameters = dict(model.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, INPUTS)
    model(INPUTS).square().mean().backward()
    assert torch.allclose(each["weight"].mean(0), model.weight.grad)


def test_optimizers_step_in_several_threads(way: str, fabric: Fabric) -> None:
    expected = plain()
    train(*expected, steps=20)
    pairs = [set_up(fabric) for _ in range(3)]
    threads = [threading.Thread(target=train, args=(*pair, 20)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(expected[0].weight, model.weight) for model, _ in pairs)


def test_an_optimizer_is_forgotten_as_soon_as_nobody_has_it(way: str, fabric: Fabric) -> None:
    import gc
    import weakref

    model, optimizer = set_up(fabric)
    train(model, optimizer)
    raw = weakref.ref(unwrap(optimizer))
    gc.disable()
    try:
        del optimizer
        assert raw() is None
    finally:
        gc.enable()
