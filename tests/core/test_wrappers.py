"""The second face: what setup returns is the user's own model, optimizer or loader in every way that they can see."""

from __future__ import annotations

import abc
import copy
import gc
import inspect
import io
import pickle
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import one_process
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import (
    Fabric,
    Precision,
    SetupError,
    Strategy,
    StrategySpec,
    WrongTypeError,
    is_wrapped,
    unwrap,
)
from fabric_core.wrappers.module import FabricModule

pytestmark = pytest.mark.usefixtures("core_alone")


fabric = one_process.fabric


class Around(nn.Module):
    """What a strategy puts around a model; it notes each pass through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.passes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return self.module(*args, **kwargs)


class Wrapping(Strategy):
    spec = StrategySpec("wrapping", "", supports=("cpu",))

    def setup_module(self, module: nn.Module) -> nn.Module:
        return Around(module)


@pytest.fixture
def wrapping() -> Iterator[Fabric]:
    """A fabric whose strategy puts something around each model."""
    with Fabric(accelerator="cpu", strategy=Wrapping()) as fabric:
        yield fabric


def passes(model: Any) -> int:
    """How many passes went through the strategy."""
    return int(model._fabric_forward_module.passes)


class Net(nn.Module):
    """A model with all that models have."""

    made: ClassVar[int] = 0

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.layer = nn.Linear(width, width)
        self.register_buffer("scale", torch.ones(1))
        self.criterion = nn.MSELoss()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self._doubled = 1

    @property
    def doubled(self) -> int:
        return self._doubled * 2

    @doubled.setter
    def doubled(self, value: int) -> None:
        self._doubled = value // 2

    @property
    def read_only(self) -> str:
        return "read only"

    def forward(self, inputs: Tensor, times: int = 1) -> Tensor:
        """Its documentation."""
        return self.layer(inputs) * self.scale * times

    def through_call(self, inputs: Tensor) -> Tensor:
        return self(inputs)

    def through_forward(self, inputs: Tensor) -> Tensor:
        return self.forward(inputs)

    def past_it(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def past_it_deeper(self, inputs: Tensor) -> Tensor:
        return self.past_it(inputs)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self(inputs), targets)

    def encode(self, inputs: Tensor) -> Tensor:
        return self.frozen(inputs)

    def rename(self, name: str) -> None:
        self.name = name

    def like_me(self) -> Net:
        return type(self)(self.width)

    def steps(self, inputs: Tensor, number: int) -> Iterator[Tensor]:
        for _ in range(number):
            inputs = self(inputs)
            yield inputs

    @classmethod
    def make(cls) -> Net:
        cls.made += 1
        return cls()

    @staticmethod
    def helper(one: int, two: int = 2) -> int:
        return one + two

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).sum()


ONES = torch.ones(2, 4)


# -- the same object in every way that can be seen ----------------------------------------------------------------


def test_what_comes_back_is_an_instance_of_the_users_class(fabric: Fabric) -> None:
    model = Net()
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(ONES)))
    assert isinstance(wrapped, Net)
    assert isinstance(wrapped, FabricModule)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(loader, DataLoader)
    assert all(map(is_wrapped, (wrapped, optimizer, loader)))
    assert unwrap(wrapped) is model
    assert wrapped.module is model
    assert not is_wrapped(model)
    assert not isinstance(model, FabricModule)


def test_state_dicts_have_the_keys_of_the_users_model(wrapping: Fabric) -> None:
    model = Net()
    keys = list(model.state_dict())
    wrapped = wrapping.setup(model)
    assert list(wrapped.state_dict()) == keys
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert len(list(wrapped.modules())) == len(list(model.modules()))
    wrapped.load_state_dict(Net().state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped.load_state_dict({})


def test_attributes_are_read_and_written_through(wrapping: Fabric) -> None:
    model = Net()
    wrapped = wrapping.setup(model)
    assert wrapped.width == 4
    wrapped.width = 5
    wrapped.fresh = "new"
    wrapped.doubled = 8
    wrapped.layer = nn.Linear(4, 3)
    assert (model.width, model.fresh, model._doubled, model.doubled) == (5, "new", 4, 8)
    assert model.layer.out_features == 3
    assert wrapped.layer is model.layer
    model.from_outside = 1
    assert wrapped.from_outside == 1
    del wrapped.fresh
    assert not hasattr(model, "fresh")
    wrapped.rename("named")
    assert model.name == "named"
    with pytest.raises(AttributeError):
        wrapped.read_only = 1
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018
    wrapped.register_buffer("more", torch.zeros(1))
    assert "more" in model.state_dict()


def test_names_that_begin_with_an_underscore_are_the_users(wrapping: Fabric) -> None:
    class Private(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._call = self._depth = self._original = self._wraps = self._forward_module = "mine"

        def look(self) -> set[Any]:
            return {self._call, self._depth, self._original, self._wraps, self._forward_module}

    assert wrapping.setup(Private()).look() == {"mine"}


def test_static_and_class_methods_work(fabric: Fabric) -> None:
    wrapped = fabric.setup(Net())
    assert wrapped.helper(1) == 3
    assert wrapped.helper(1, two=5) == 6
    assert type(wrapped.make()) is Net


def test_a_method_that_makes_another_one_of_its_class_makes_a_plain_one(fabric: Fabric) -> None:
    wrapped = fabric.setup(Net(3))
    twin = wrapped.like_me()
    assert type(twin) is Net
    assert twin.width == 3
    assert type(wrapped.__class__(2)) is Net


def test_signatures_and_docstrings_are_those_of_the_user(fabric: Fabric) -> None:
    wrapped = fabric.setup(Net())
    assert list(inspect.signature(wrapped.forward).parameters) == ["inputs", "times"]
    assert list(inspect.signature(type(wrapped).forward).parameters) == ["self", "inputs", "times"]
    assert list(inspect.signature(wrapped.loss).parameters) == ["inputs", "targets"]
    assert wrapped.__doc__ == Net.__doc__
    assert wrapped.forward.__doc__ == "Its documentation."
    assert repr(wrapped).splitlines()[1:] == repr(unwrap(wrapped)).splitlines()[1:]


def test_device_dtype_and_module_are_offered_where_the_user_has_none_of_that_name(fabric: Fabric) -> None:
    wrapped = fabric.setup(Net())
    assert (wrapped.device, wrapped.dtype) == (torch.device("cpu"), torch.float32)
    wrapped.double()
    assert wrapped.dtype is torch.float64
    assert fabric.setup(nn.Embedding(2, 2).to(torch.bfloat16)).dtype is torch.bfloat16
    empty = fabric.setup(nn.ReLU())
    assert (empty.device, empty.dtype) == (torch.device("cpu"), torch.get_default_dtype())

    class Own(nn.Module):
        dtype = "mine"

        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)
            self.register_buffer("device", torch.zeros(1))

    own = Own()
    wrapped = fabric.setup(own)
    assert wrapped.dtype == "mine"
    assert wrapped.module is own.module
    assert wrapped.device is own.device


def test_modes_moves_and_conversions_reach_the_model(wrapping: Fabric) -> None:
    model = Net()
    wrapped = wrapping.setup(model)
    assert wrapped.eval() is wrapped
    assert not model.training
    assert not model.layer.training
    wrapped.train()
    assert model.training
    assert wrapped.to(torch.float64) is wrapped
    assert model.layer.weight.dtype is torch.float64
    wrapped.half()
    assert model.scale.dtype is torch.float16
    wrapped.float().requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    seen: list[nn.Module] = []
    wrapped.apply(seen.append)
    assert seen[-1] is wrapped
    wrapped.layer.weight.grad = torch.ones(4, 4)
    wrapped.zero_grad()
    assert model.layer.weight.grad is None


def test_weights_that_are_tied_stay_tied(wrapping: Fabric) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    model = Tied()
    wrapped, optimizer = wrapping.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert len(list(wrapped.parameters())) == 1
    wrapping.backward(wrapped(torch.tensor([1])).sum())
    optimizer.step()
    assert wrapped.head.weight is wrapped.embed.weight
    assert wrapped.head.weight is model.embed.weight


# -- classes of every kind ----------------------------------------------------------------------------------------


def test_sequences_of_layers_stay_sequences(wrapping: Fabric) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    wrapped = wrapping.setup(model)
    assert len(wrapped) == 3
    assert list(wrapped) == list(model)
    assert wrapped[-1] is model[2]
    assert type(wrapped[:2]) is nn.Sequential
    wrapped.append(nn.Tanh())
    assert len(model) == 4
    assert wrapped(ONES).shape == (2, 2)
    assert passes(wrapped) == 1

    parts = wrapping.setup(nn.ModuleDict({"one": nn.Linear(1, 1)}))
    assert list(parts) == ["one"]
    assert "one" in parts
    assert parts["one"] is unwrap(parts)["one"]
    assert len(wrapping.setup(nn.ModuleList([nn.ReLU()]))) == 1


def test_what_the_users_class_overrides_stays_overridden(wrapping: Fabric) -> None:
    class Overriding(Net):
        def train(self, mode: bool = True) -> Overriding:
            super().train(mode)
            self.frozen.eval()
            return self

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"wrapped by me": super().state_dict(*args, **kwargs)}

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state["wrapped by me"], *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return 42 if name == "invented" else super().__getattr__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value + 1 if name == "raised" else value)

        def __call__(self, *args: Any) -> Any:
            return "called", super().__call__(*args)

        def __len__(self) -> int:
            return 0

    wrapped = wrapping.setup(Overriding())
    assert wrapped.train().training
    assert not wrapped.frozen.training
    assert list(wrapped.state_dict()) == ["wrapped by me"]
    wrapped.load_state_dict(wrapped.state_dict())
    assert wrapped.invented == 42
    wrapped.raised = 1
    assert unwrap(wrapped).raised == wrapped.raised == 2
    assert wrapped(ONES)[0] == "called"
    assert len(wrapped) == 0
    with wrapping.accumulate(wrapped, every=2):
        pass


def test_a_getattr_that_reaches_into_a_part_wins_over_what_is_offered(fabric: Fabric) -> None:
    class Delegating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"dtype": "from the config"}

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return self.__dict__["config"][name] if name in self.__dict__["config"] else self._miss(name)

        def _miss(self, name: str) -> Any:
            raise AttributeError(name)

    wrapped = fabric.setup(Delegating())
    assert wrapped.dtype == "from the config"
    assert wrapped.device == torch.device("cpu")


def test_arguments_and_hooks_of_class_creation_are_not_run_again(fabric: Fabric) -> None:
    made = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key: str) -> None:
            made.append(key)

    class Model(Registered, key="model"):
        pass

    fabric.setup(Model())
    assert made == ["model"]


def test_abstract_generic_and_metaclass_models_work(fabric: Fabric) -> None:
    class Meta(abc.ABCMeta):
        def hello(cls) -> str:
            return f"I am {cls.__name__}"

    class Base(nn.Module, metaclass=Meta):
        @abc.abstractmethod
        def size(self) -> int: ...

    class Concrete(Base):
        def size(self) -> int:
            return 3

    T = TypeVar("T")

    class Box(nn.Module, Generic[T]):
        def forward(self, value: T) -> T:
            return value

    assert fabric.setup(Concrete()).size() == 3
    assert type(fabric.setup(Concrete())).hello() == "I am FabricConcrete"
    assert fabric.setup(Box[int]())(1) == 1


def test_a_class_with_a_memory_layout_of_its_own_is_refused_with_advice(fabric: Fabric) -> None:
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    class EmptySlots(nn.Linear):
        __slots__ = ()

    with pytest.raises(WrongTypeError, match="Slotted cannot be set up.*Wrap it in a plain class"):
        fabric.setup(Slotted(1, 1))
    assert isinstance(fabric.setup(EmptySlots(1, 1)), EmptySlots)


def test_scripted_models_can_be_set_up(wrapping: Fabric) -> None:
    scripted = torch.jit.script(nn.Linear(4, 2))
    wrapped = wrapping.setup(scripted)
    assert isinstance(wrapped, torch.jit.ScriptModule)
    assert torch.equal(wrapped(ONES), scripted(ONES))
    assert list(wrapped.state_dict()) == ["weight", "bias"]


def test_lazy_models_become_what_they_become(fabric: Fabric) -> None:
    wrapped = fabric.setup(nn.LazyLinear(2))
    assert wrapped(ONES).shape == (2, 2)
    assert wrapped.weight.shape == (2, 4)
    assert isinstance(wrapped, nn.Linear)


def test_parametrised_models_can_be_set_up(fabric: Fabric) -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    expected = model(ONES)
    wrapped = fabric.setup(model)
    assert torch.equal(wrapped(ONES), expected)
    assert torch.equal(wrapped.weight, model.weight)


def test_a_functional_call_of_a_set_up_model_works(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(nn.Linear(4, 2))
    zeros = {name: torch.zeros_like(p) for name, p in wrapped.named_parameters()}
    assert not torch.func.functional_call(wrapped, zeros, (ONES,)).any()
    assert wrapped(ONES).any()


# -- forward passes and what passes them by -----------------------------------------------------------------------


def test_calls_and_forward_both_go_through_the_strategy(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(Net())
    assert torch.equal(wrapped(ONES, times=2), wrapped.forward(ONES, 2))
    assert torch.equal(wrapped.through_call(ONES), wrapped.through_forward(ONES))
    assert passes(wrapped) == 4


def test_a_forward_that_was_replaced_on_the_instance_does_not_pass_the_strategy_by(wrapping: Fabric) -> None:
    model = Net()
    model.forward = lambda inputs: inputs * 3  # type: ignore[method-assign]
    wrapped = wrapping.setup(model)
    assert torch.equal(wrapped.forward(ONES), ONES * 3)
    assert torch.equal(wrapped(ONES), ONES * 3)
    assert passes(wrapped) == 2
    wrapped.forward = lambda inputs: inputs * 5
    assert torch.equal(wrapped.forward(ONES), ONES * 5)
    assert torch.equal(model(ONES), ONES * 5)


@pytest.mark.parametrize("method", ["past_it", "past_it_deeper"])
def test_a_method_that_passes_the_strategy_by_is_caught_with_advice(wrapping: Fabric, method: str) -> None:
    wrapped = wrapping.setup(Net())
    advice = rf"Net\.{method}\(\) calls Linear\(\).*model\.mark_forward_method\('{method}'\)"
    if method == "past_it_deeper":
        advice = r"mark_forward_method\('past_it"
    with pytest.raises(SetupError, match=advice):
        getattr(wrapped, method)(ONES)
    with torch.no_grad():
        assert getattr(wrapped, method)(ONES).shape == (2, 4)
    assert passes(wrapped) == 0


def test_methods_that_lose_no_gradients_are_let_through(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(Net())
    assert wrapped.loss(ONES, ONES).requires_grad
    assert wrapped.encode(ONES).shape == (2, 4)
    assert passes(wrapped) == 1


def test_on_one_device_nothing_can_be_passed_by(fabric: Fabric) -> None:
    wrapped = fabric.setup(Net())
    assert wrapped.past_it(ONES).requires_grad
    compiled = fabric.setup(torch.compile(Net(), backend="eager"))
    assert compiled.past_it(ONES).requires_grad


def test_other_models_are_free_inside_of_a_watched_method(wrapping: Fabric) -> None:
    other = nn.Linear(4, 4)

    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.own(inputs)

        def both(self, inputs: Tensor) -> Tensor:
            return other(self(inputs))

    assert wrapping.setup(Borrowing()).both(ONES).requires_grad


def test_the_watch_over_a_method_leaves_no_hook_behind(wrapping: Fabric) -> None:
    from torch.nn.modules import module as globally

    wrapped = wrapping.setup(Net())
    hooks = len(globally._global_forward_pre_hooks)
    for method in (wrapped.past_it, wrapped.through_call):
        with pytest.raises((SetupError, RuntimeError)):
            method(torch.ones(1, 7) if method.__name__ == "through_call" else ONES)
    assert len(globally._global_forward_pre_hooks) == hooks
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in wrapped.modules())
    assert wrapped(ONES).requires_grad


def test_a_generator_method_runs_step_by_step_through_the_strategy(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(Net())
    steps = wrapped.steps(ONES, 3)
    next(steps)
    assert passes(wrapped) == 1
    assert len(list(steps)) == 2
    assert passes(wrapped) == 3


@pytest.mark.parametrize("form", ["name", "bound method", "bound method of the original"])
def test_a_marked_method_goes_through_the_strategy(wrapping: Fabric, form: str) -> None:
    model = Net()
    wrapped = wrapping.setup(model)
    method: Any = {"name": "past_it", "bound method": wrapped.past_it}.get(form, model.past_it)
    wrapped.mark_forward_method(method)
    assert torch.equal(wrapped.past_it(ONES), model.layer(ONES))
    assert passes(wrapped) == 1
    assert torch.equal(wrapped(ONES), model(ONES))
    assert "forward" not in vars(model)


def test_step_methods_are_marked_by_their_names(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(Net())
    assert wrapped.training_step(ONES).requires_grad
    assert passes(wrapped) == 1


def test_a_marked_method_that_fails_leaves_forward_as_it_was(wrapping: Fabric) -> None:
    model = Net()

    def replaced(inputs: Tensor) -> Tensor:
        return inputs + 1

    wrapped = wrapping.setup(model)
    wrapped.mark_forward_method("past_it")
    for forward in (None, replaced):
        if forward is not None:
            model.forward = forward  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            wrapped.past_it(torch.ones(1, 7))
        assert vars(model).get("forward") is forward
    assert torch.equal(wrapped(ONES), ONES + 1)


def test_a_strategy_that_fails_before_a_marked_method_runs_leaves_forward_as_it_was(wrapping: Fabric) -> None:
    def failing(inputs: Tensor) -> Tensor:
        raise ZeroDivisionError

    model = Net()
    wrapped = wrapping.setup(model)
    wrapped.mark_forward_method("past_it")
    wrapped._fabric_forward_module.forward = failing
    with pytest.raises(ZeroDivisionError):
        wrapped.past_it(ONES)
    assert "forward" not in vars(model)
    assert torch.equal(model(ONES), model.layer(ONES))


def test_a_marked_method_may_call_forward_itself(wrapping: Fabric) -> None:
    wrapped = wrapping.setup(Net())
    wrapped.mark_forward_method("through_call")
    wrapped.mark_forward_method("through_forward")
    assert torch.equal(wrapped.through_call(ONES), wrapped.through_forward(ONES))
    assert passes(wrapped) == 2


def test_a_marked_method_is_converted_by_the_precision() -> None:
    class Doubling(Precision):
        def convert_input(self, data: Any) -> Any:
            return tuple(x * 2 for x in data) if isinstance(data, tuple) else data

        def convert_output(self, data: Any) -> Any:
            return data + 1

    fabric = Fabric(accelerator="cpu", precision=Doubling())
    model = Net()
    wrapped = fabric.setup(model)
    assert torch.equal(wrapped.past_it(ONES), model.layer(ONES))
    wrapped.mark_forward_method("past_it")
    assert torch.equal(wrapped.past_it(ONES), model.layer(ONES * 2) + 1)
    assert torch.equal(wrapped(ONES), model(ONES * 2) + 1)


@pytest.mark.parametrize("name", ["no_such", "forward", "train", "helper", "make", "doubled", "width"])
def test_what_cannot_be_marked_is_refused(fabric: Fabric, name: str) -> None:
    wrapped = fabric.setup(Net())
    with pytest.raises(SetupError, match=rf"Net has no method '{name}'.*It has: .*past_it"):
        wrapped.mark_forward_method(name)


def test_a_generator_method_cannot_be_marked(fabric: Fabric) -> None:
    with pytest.raises(SetupError, match="returns at once"):
        fabric.setup(Net()).mark_forward_method("steps")


def test_hooks_run_once_whichever_face_they_are_registered_on(wrapping: Fabric) -> None:
    model = Net()
    wrapped = wrapping.setup(model)
    calls: list[str] = []
    wrapped.register_forward_hook(lambda *_: calls.append("on the wrapper"))
    wrapped.register_forward_pre_hook(lambda *_: calls.append("before, on the wrapper"))
    handle = model.register_forward_hook(lambda *_: calls.append("on the original"))
    wrapped.register_full_backward_hook(lambda *_: calls.append("backward"))
    wrapping.backward(wrapped(ONES.clone().requires_grad_()).sum())
    assert calls == ["before, on the wrapper", "on the wrapper", "on the original", "backward"]
    handle.remove()
    calls.clear()
    model(ONES)
    assert calls == ["before, on the wrapper", "on the wrapper"]


# -- compiled models ----------------------------------------------------------------------------------------------


class Compiler:
    """A backend of torch.compile; it notes the layers of each graph and compiles by another one."""

    def __init__(self, name: str = "eager") -> None:
        self.name = name
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_compiled_again_around_the_strategy(wrapping: Fabric, backend: str) -> None:
    model, compiler = Net(), Compiler(backend)
    expected = model(ONES)
    wrapped, optimizer = wrapping.setup(
        torch.compile(model, backend=compiler, fullgraph=True), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert type(wrapped._fabric_forward_module) is Around
    assert unwrap(wrapped) is model
    assert list(wrapped.state_dict()) == list(model.state_dict())
    assert torch.allclose(wrapped(ONES), expected)
    assert passes(wrapped) == len(compiler.graphs) == 1
    wrapping.backward(wrapped(ONES).sum())
    optimizer.step()
    assert not torch.allclose(wrapped(ONES), expected)


def test_a_compiled_model_is_left_uncompiled_on_demand(wrapping: Fabric) -> None:
    compiler = Compiler()
    for setup in (wrapping.setup, wrapping.setup_module):
        wrapped = setup(torch.compile(Net(), backend=compiler), _reapply_compile=False)
        wrapped(ONES)
        assert passes(wrapped) == 1
    assert compiler.graphs == []


def test_the_synchronisation_of_a_compiled_model_is_held_back_on_what_the_strategy_made(
    fabric: Fabric,
) -> None:
    held: list[nn.Module] = []

    class Holding(Wrapping):
        spec = Wrapping.spec

        @contextmanager
        def hold_gradient_sync(self, module: nn.Module) -> Iterator[None]:
            held.append(module)
            yield

    holding = Fabric(accelerator="cpu", strategy=Holding())
    wrapped = holding.setup(torch.compile(Net(), backend="eager"))
    with holding.no_backward_sync(wrapped):
        wrapped(ONES)
    assert [type(module) for module in held] == [Around]


@pytest.mark.parametrize("strategy", ["none", "wrapping"])
def test_a_set_up_model_can_be_compiled_without_graph_breaks(
    fabric: Fabric, wrapping: Fabric, strategy: str
) -> None:
    chosen = wrapping if strategy == "wrapping" else fabric
    wrapped = chosen.setup(Net())
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    for size in (2, 3):
        assert torch.allclose(compiled(torch.ones(size, 4)), wrapped(torch.ones(size, 4)))
    chosen.backward(compiled(ONES).sum())
    assert wrapped.layer.weight.grad is not None


def test_a_model_that_compiles_itself_in_place_keeps_the_strategy_around_it(wrapping: Fabric) -> None:
    before, after = Net(), Net()
    before.compile(backend="eager")
    for model in (before, after):
        wrapped = wrapping.setup(model)
        wrapped.compile(backend="eager")
        assert model._compiled_call_impl is not None
        calls: list[Any] = []
        wrapped.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        wrapped(ONES)
        with torch.compiler.set_stance("force_eager"):
            wrapped(ONES)
        assert len(calls) == passes(wrapped) == 2


# -- models in models, copies and pickles -------------------------------------------------------------------------


def test_a_set_up_model_can_be_part_of_another_one(wrapping: Fabric) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.head = nn.Linear(4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.inner(inputs))

    inner = wrapping.setup(Net())
    outer = Outer(inner)
    assert set(outer.state_dict()) == {"head.weight", "head.bias"} | {
        f"inner.{key}" for key in inner.state_dict()
    }
    assert len(list(outer.parameters())) == len(list(inner.parameters())) + 2
    outer(ONES).sum().backward()
    assert passes(inner) == 1
    assert inner.layer.weight.grad is not None
    outer.eval()
    assert not unwrap(inner).training
    assert type(copy.deepcopy(outer).inner) is Net
    assert wrapping.setup(outer)(ONES).shape == (2, 1)


def test_copies_and_pickles_are_plain_objects(wrapping: Fabric) -> None:
    model = nn.Linear(2, 2)
    wrapped, optimizer = wrapping.setup(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    loader = wrapping.setup_dataloaders(DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
    wrapping.backward(wrapped(torch.ones(1, 2)).sum())
    optimizer.step()
    for again in (copy.copy, copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))):
        twin, other, batches = again(wrapped), again(optimizer), again(loader)
        assert type(twin) is nn.Linear
        assert torch.equal(twin.weight, model.weight)
        assert type(other) is torch.optim.SGD
        assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        other.step()
        assert [len(batch[0]) for batch in batches] == [2, 2]
        assert not any(map(is_wrapped, (twin, other, batches)))
    both = copy.deepcopy({"model": wrapped, "optimizer": optimizer})
    assert both["optimizer"].param_groups[0]["params"][0] is both["model"].weight
    buffer = io.BytesIO()
    torch.save(wrapped, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is nn.Linear


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_script_of_a_set_up_model_is_one_of_the_users_model(fabric: Fabric) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    wrapped = fabric.setup(model)
    scripted = torch.jit.script(wrapped)
    x = torch.ones(1, 2)
    assert torch.equal(scripted(x), model(x))
    assert list(scripted.state_dict()) == list(model.state_dict())


def test_a_set_up_model_cannot_change_its_class_and_says_when_it_could(fabric: Fabric) -> None:
    with pytest.raises(SetupError, match=r"class of this Linear cannot be changed.* before fabric\.setup"):
        nn.utils.parametrizations.weight_norm(fabric.setup(nn.Linear(2, 2)))
    again = fabric.setup(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert again(torch.ones(1, 2)).shape == (1, 2)


def test_a_model_that_refers_to_itself_can_be_pickled(fabric: Fabric) -> None:
    wrapped = fabric.setup(nn.Linear(1, 1))
    vars(wrapped)["me"] = wrapped
    twin = pickle.loads(pickle.dumps(wrapped))
    assert vars(twin)["me"] is twin


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "wrapping"])
def test_a_model_is_freed_at_once_when_nobody_holds_it(
    fabric: Fabric, wrapping: Fabric, strategy: str
) -> None:
    chosen = wrapping if strategy == "wrapping" else fabric
    gc.collect()
    gc.disable()
    try:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dead = [weakref.ref(obj) for obj in (model, model.layer, optimizer)]
        wrapped, ready = chosen.setup(model, optimizer)
        with chosen.accumulate(wrapped, every=2):
            chosen.backward(wrapped.through_call(ONES).sum())
            ready.step()
        dead += [weakref.ref(obj) for obj in (wrapped, ready)]
        del model, optimizer, wrapped, ready
        assert [ref() for ref in dead] == [None] * 5
    finally:
        gc.enable()


def test_the_classes_of_the_user_are_freed_too(fabric: Fabric) -> None:
    class Local(nn.Module):
        def method(self) -> None: ...

    dead = weakref.ref(Local)
    wrapped = fabric.setup(Local())
    assert type(fabric.setup(Local())) is type(wrapped)
    del Local, wrapped
    gc.collect()
    assert dead() is None


def test_what_the_users_class_does_at_the_end_is_done_once(fabric: Fabric) -> None:
    ends = []

    class Ending(nn.Module):
        def __del__(self) -> None:
            ends.append(1)

    model = Ending()
    wrapped = fabric.setup(model)
    del wrapped
    assert ends == []
    del model
    assert ends == [1]


# -- optimizers ---------------------------------------------------------------------------------------------------


def trained(fabric: Fabric, **options: Any) -> tuple[Any, Any, Any]:
    model = nn.Linear(4, 2)
    raw = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    wrapped, optimizer = fabric.setup(model, raw)
    fabric.backward(wrapped(ONES).sum())
    optimizer.step()
    return wrapped, optimizer, raw


def test_parameter_groups_are_one_and_the_same_on_both_faces(fabric: Fabric) -> None:
    model, optimizer, raw = trained(fabric)
    optimizer.param_groups[0]["lr"] = 0.5
    assert raw.param_groups[0]["lr"] == 0.5
    optimizer.param_groups = [{**raw.param_groups[0], "lr": 0.25}]
    assert raw.param_groups[0]["lr"] == 0.25
    more = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [more], "lr": 1.0})
    assert len(raw.param_groups) == 2
    more.grad = torch.ones(1)
    optimizer.step()
    assert more.item() == 0.0
    assert optimizer.state is raw.state
    assert optimizer.state[model.weight]["momentum_buffer"] is raw.state[model.weight]["momentum_buffer"]
    assert optimizer.defaults["momentum"] == 0.9


def test_what_pytorch_does_when_a_state_is_set_goes_to_the_users_optimizer(fabric: Fabric) -> None:
    _, optimizer, raw = trained(fabric)
    told: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda which, _: told.append(which))
    optimizer.load_state_dict(optimizer.state_dict())
    assert told == [raw]
    step = type(optimizer).step
    optimizer.__setstate__({"mine": 1})
    assert type(optimizer).step is step
    assert raw.mine == 1
    optimizer.step()


def test_the_state_of_an_optimizer_goes_there_and_back(fabric: Fabric) -> None:
    model, optimizer, raw = trained(fabric)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(state)
    assert torch.equal(raw.state[model.weight]["momentum_buffer"], state["state"][0]["momentum_buffer"])
    optimizer.step()
    optimizer.zero_grad()
    assert model.weight.grad is None
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.load_state_dict(optimizer.state_dict())


def test_hooks_of_steps_run_once_and_get_the_users_optimizer(fabric: Fabric) -> None:
    _, optimizer, raw = trained(fabric)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda which, *_: seen.append(("before", which)))
    raw.register_step_post_hook(lambda which, *_: seen.append(("after", which)))
    optimizer.step()
    assert seen == [("before", raw), ("after", raw)]
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    assert raw.state_dict()["mine"] == optimizer.state_dict()["mine"] == 1


def test_profiles_name_the_users_optimizer(fabric: Fabric) -> None:
    _, optimizer, _ = trained(fabric)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profiled.key_averages()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names
    assert not any("Fabric" in name for name in names)


def test_optimizers_with_ways_of_their_own_keep_them(fabric: Fabric) -> None:
    class Odd(torch.optim.SGD):
        def zero_grad(self) -> None:  # type: ignore[override]
            super().zero_grad(set_to_none=False)

        def _step(self) -> str:
            return "mine"

        def first_step(self) -> None:
            self.param_groups[0]["lr"] *= 2
            self.zero_grad()

        def step(self, closure: Any = None) -> str:  # type: ignore[override]
            super().step(closure)
            return "stepped"

    model = nn.Linear(4, 2)
    raw = Odd(model.parameters(), lr=0.1)
    model, optimizer = fabric.setup(model, raw)
    fabric.backward(model(ONES).sum())
    assert optimizer.step() == "stepped"
    assert optimizer._step() == "mine"
    optimizer.first_step()
    assert raw.param_groups[0]["lr"] == 0.2
    assert model.weight.grad is not None
    assert not model.weight.grad.any()


def test_a_step_that_is_replaced_on_the_wrapper_leaves_the_users_optimizer_alone(fabric: Fabric) -> None:
    _, optimizer, raw = trained(fabric)
    calls: list[str] = []
    own = optimizer.step
    optimizer.step = lambda *args: (calls.append("mine"), own(*args))
    optimizer.step()
    assert calls == ["mine"]
    assert "step" not in vars(raw)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert calls == ["mine", "mine"]


def test_steps_go_through_strategy_and_precision() -> None:
    @contextmanager
    def noted(name: str) -> Iterator[None]:
        order.append(name)
        yield

    class NotedStrategy(Wrapping):
        def optimizer_step(self, *args: Any) -> Any:
            with noted("strategy"):
                return super().optimizer_step(*args)

    class NotedPrecision(Precision):
        def optimizer_step(self, *args: Any) -> Any:
            with noted("precision"):
                return super().optimizer_step(*args)

    order: list[str] = []
    fabric = Fabric(accelerator="cpu", strategy=NotedStrategy(), precision=NotedPrecision())
    _, optimizer, _ = trained(fabric)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert order == ["strategy", "precision"] * 2


def test_the_wrappers_are_found_without_importing_the_compiler() -> None:
    import subprocess

    code = (
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "from fabric_core import Fabric\n"
        "Fabric(accelerator='cpu').setup(torch.nn.Linear(1, 1))(torch.ones(1, 1))\n"
        "print(before, 'torch._dynamo' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert out.stdout.split() == ["False", "False"], out.stderr
