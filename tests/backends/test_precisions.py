"""The precisions, each beside PyTorch's own way of doing the same, bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F

from fabric_backends.precisions.mixed import MixedPrecision
from fabric_backends.precisions.true import TruePrecision
from fabric_core import (
    CheckpointKeyError,
    Fabric,
    OptionsError,
    Precision,
    Registry,
    Request,
    SetupError,
    UnsupportedError,
)
from fabric_core.build import make
from fabric_core.resolve import resolve

CPU = torch.device("cpu")
STEPS = 10
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Linear, convolution and batch normalisation: operations that autocast narrows, widens and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(self.conv(x))).flatten(1))


def batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 1, 8, 8, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def new_model(cls: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Loop:
    """What a Fabric does with a precision, and nothing else."""

    def __init__(self, precision: Precision) -> None:
        precision.attach(CPU)
        self.precision = precision

    def setup(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Callable[..., Any]:
        self.precision.convert_module(model)
        for optimizer in optimizers:
            self.precision.setup_optimizer(optimizer)
        return self.precision.wrap_forward(model)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.precision.scale_loss(loss).backward(**kwargs)

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        return self.precision.optimizer_step(optimizer, optimizer.step, None)

    def clip(self, optimizer: torch.optim.Optimizer, norm: float) -> Tensor:
        self.precision.unscale_gradients(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, norm)


def train(
    precision: Precision,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    data: list[Batch] | None = None,
    clip: float | None = None,
) -> torch.optim.Optimizer:
    loop = Loop(precision)
    optimizer = make_optimizer(model)
    forward = loop.setup(model, optimizer)
    for x, y in data or batches():
        loss = F.cross_entropy(forward(x), y)
        loop.backward(loss)
        if clip is not None:
            loop.clip(optimizer, clip)
        loop.step(optimizer)
        optimizer.zero_grad()
    return optimizer


def identical(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype is theirs[name].dtype for name in ours
    )


@pytest.fixture(autouse=True)
def _default_dtype_is_left_alone() -> Iterator[None]:
    yield
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cpu")


# -- ten steps beside plain PyTorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convert"),
    [("float64", nn.Module.double), ("float16", nn.Module.half), ("bfloat16", nn.Module.bfloat16)],
)
def test_true_precision_trains_like_a_model_and_inputs_converted_by_hand(
    name: str, convert: Callable[[nn.Module], nn.Module]
) -> None:
    dtype = getattr(torch, name)
    ours, plain = new_model(), convert(new_model())
    train(TruePrecision(name), ours)

    optimizer = sgd(plain)
    for x, y in batches():
        out = plain(x.to(dtype))
        loss = F.cross_entropy(out if dtype is torch.float64 else out.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert identical(ours, plain)
    assert not identical(ours, convert(new_model()))


@pytest.mark.parametrize("loss_inside", [True, False])
def test_bfloat16_mixed_trains_like_plain_autocast(loss_inside: bool) -> None:
    ours, plain = new_model(), new_model()
    train(MixedPrecision("bfloat16"), ours)

    optimizer = sgd(plain)
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = plain(x)
            loss = F.cross_entropy(out, y)
        if not loss_inside:
            loss = F.cross_entropy(out.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert identical(ours, plain)
    assert ours.linear.weight.dtype is torch.float32


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "fused adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
    "fused sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", [{}, {"growth_interval": 1}, {"init_scale": 2.0**40}], ids=str)
def test_float16_mixed_trains_like_plain_autocast_with_a_grad_scaler(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], clip: float | None, options: dict[str, Any]
) -> None:
    ours, plain = new_model(), new_model()
    precision = MixedPrecision("float16", scaler=options)
    train(precision, ours, make_optimizer, clip=clip)

    optimizer = make_optimizer(plain)
    scaler = GradScaler("cpu", **options)
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(plain(x), y)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert identical(ours, plain)
    assert precision.state_dict() == scaler.state_dict()


def test_a_state_that_is_restored_goes_on_bit_for_bit() -> None:
    """The scale has just been halved, and grows again soon: a lost state would show in both."""
    options = {"init_scale": 2.0**26, "growth_interval": 4}
    whole = new_model()
    reference = MixedPrecision("float16", scaler=options)
    train(reference, whole, data=batches(16))

    model = new_model()
    first = MixedPrecision("float16", scaler=options)
    optimizer = train(first, model, data=batches(16)[:7])
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict(), first.state_dict())))
    assert saved[2]["scale"] < 2.0**26

    resumed, second = Net(), MixedPrecision("float16")
    resumed.load_state_dict(saved[0])
    second.attach(CPU)
    second.load_state_dict(saved[2])

    def restored(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = sgd(model)
        optimizer.load_state_dict(saved[1])
        return optimizer

    train(second, resumed, restored, data=batches(16)[7:])
    assert identical(resumed, whole)
    assert second.state_dict() == reference.state_dict()


# -- dtypes ------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


class Witness(nn.Module):
    """Notes which dtypes a forward pass sees, and answers with a collection of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("floating", torch.ones(4))
        self.register_buffer("counter", torch.ones(4, dtype=torch.int64))
        self.register_buffer("imaginary", torch.ones(4, dtype=torch.complex64))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, batch: dict[str, Any], *, scale: Tensor) -> Any:
        hidden = self.linear(batch["x"])
        self.seen = {
            "input": batch["x"].dtype,
            "keyword": scale.dtype,
            "labels": batch["labels"][0].dtype,
            "computed": hidden.dtype,
            "created": torch.zeros(1).dtype,
        }
        return {"nested": [Pair(hidden, batch["labels"][0])], "text": "as it is", "imaginary": self.imaginary}


f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TABLE = {
    # precision:                                input, computed, created, weights, output
    "64-true": (TruePrecision(f64), (f64, f64, f64, f64, f64)),
    "16-true": (TruePrecision(f16), (f16, f16, f16, f16, f32)),
    "bf16-true": (TruePrecision(bf16), (bf16, bf16, bf16, bf16, f32)),
    "16-mixed": (MixedPrecision(f16), (f32, f16, f32, f32, f32)),
    "bf16-mixed": (MixedPrecision(bf16), (f32, bf16, f32, f32, f32)),
}


@pytest.mark.parametrize(("precision", "dtypes"), TABLE.values(), ids=TABLE)
def test_the_dtypes_of_everything_are_as_in_the_table(precision: Precision, dtypes: Any) -> None:
    received, computed, created, weights, output = dtypes
    model = Witness()
    weight = model.linear.weight
    forward = Loop(precision).setup(model)
    answer = forward({"x": torch.randn(2, 4), "labels": (torch.arange(2),)}, scale=torch.ones(()))

    assert model.seen == {
        "input": received,
        "keyword": received,
        "labels": torch.int64,
        "computed": computed,
        "created": created,
    }
    assert model.linear.weight is weight
    assert (weight.dtype, model.floating.dtype) == (weights, weights)
    assert (model.counter.dtype, model.imaginary.dtype) == (torch.int64, torch.complex64)
    (pair,) = answer["nested"]
    assert type(pair) is Pair
    assert (pair.first.dtype, pair.second.dtype) == (output, torch.int64)
    assert (answer["text"], answer["imaginary"].dtype) == ("as it is", torch.complex64)


@pytest.mark.parametrize(("precision", "dtypes"), TABLE.values(), ids=TABLE)
def test_a_model_inside_a_model_sees_the_same_dtypes(precision: Precision, dtypes: Any) -> None:
    """The inner forward pass ends first, and must not end the outer one's context."""
    loop = Loop(precision)
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    run_inner = loop.setup(inner)
    seen: list[torch.dtype] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = outer

        def forward(self, x: Tensor) -> Tensor:
            inside = self.outer(run_inner(self.outer(x)))
            seen.extend([inside.dtype, torch.zeros(1).dtype])
            return inside

    out = loop.setup(Outer())(torch.randn(2, 4))
    assert (*seen, out.dtype) == (dtypes[1], dtypes[2], dtypes[4])


@pytest.mark.parametrize("precision", [row[0] for row in TABLE.values()], ids=TABLE)
def test_a_forward_pass_that_raises_leaves_nothing_behind(precision: Precision) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        Loop(precision).setup(Raises())(torch.ones(1))
    assert torch.get_default_dtype() is f32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("precision", "dtypes"), TABLE.values(), ids=TABLE)
def test_models_and_tensors_are_created_in_the_dtype_of_the_weights(
    precision: Precision, dtypes: Any
) -> None:
    precision.attach(CPU)
    with precision.init_context():
        assert nn.Linear(2, 2).weight.dtype is dtypes[3]
        with precision.init_context():
            pass
        assert torch.zeros(1).dtype is dtypes[3]
    assert torch.zeros(1).dtype is f32


def test_an_output_with_more_digits_than_the_default_keeps_them() -> None:
    third = torch.tensor([1 / 3], dtype=f64)
    for precision in (MixedPrecision(bf16), TruePrecision(f16), TruePrecision(f64)):
        out = Loop(precision).setup(nn.Identity())({"x": third})["x"]
        expected = third.half().float() if precision.dtype is f16 else third
        assert torch.equal(out, expected)


def test_the_names_of_the_flag_lead_to_the_right_dtypes() -> None:
    wanted = {"64": f64, "64-true": f64, "16-true": f16, "bf16-true": bf16}
    wanted |= {"16": f16, "16-mixed": f16, "bf16": bf16, "bf16-mixed": bf16}
    for name, dtype in wanted.items():
        choice = resolve(Request(accelerator="cpu", precision=name), Registry()).precision
        precision = make(choice)
        assert precision.dtype is dtype
        assert isinstance(precision, TruePrecision if choice.name.endswith("true") else MixedPrecision)
        assert precision.scales_loss == (choice.name == "16-mixed")


@pytest.mark.parametrize("dtype", ["float32", "half", "int8", torch.float32, 16, None])
def test_another_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(OptionsError, match=r"dtype=.*It takes bfloat16, float16, float64"):
        TruePrecision(dtype)
    with pytest.raises(OptionsError, match=r"dtype=.*It takes bfloat16, float16\."):
        MixedPrecision(dtype)


# -- the scale of the losses -------------------------------------------------------------------------------------------


class Scaled(Loop):
    """A loop with a scale that is easy to follow, and gradients that are easy to choose."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            MixedPrecision("float16", scaler={"init_scale": 8.0, "growth_interval": 1, **options})
        )

    def backward_to(self, *pairs: tuple[Tensor, float]) -> None:
        """A loss whose gradients are exactly the given ones."""
        self.backward(torch.stack([(parameter * value).sum() for parameter, value in pairs]).sum())

    def descent(self, *parameters: nn.Parameter) -> torch.optim.Optimizer:
        """An optimizer that is set up."""
        optimizer = descent(*parameters)
        self.precision.setup_optimizer(optimizer)
        return optimizer

    @property
    def scale(self) -> float:
        assert self.precision.scaler is not None
        return self.precision.scaler.get_scale()


def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(3))


def descent(*parameters: nn.Parameter) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1.0)


def moved(parameter: Tensor) -> float:
    """How far plain gradient descent with a rate of 1 has gone: the sum of the gradients it was given."""
    assert bool((parameter == parameter[0]).all())
    return -parameter[0].item()


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    calls = []
    loop.backward_to((one, float("inf")))
    assert loop.precision.optimizer_step(optimizer, lambda: calls.append(1), None) is None
    assert (calls, moved(one)) == ([], 0.0)
    assert loop.precision.state_dict()["scale"] == 4.0
    optimizer.zero_grad()
    loop.backward_to((one, 2.0))
    loop.precision.optimizer_step(optimizer, lambda: calls.append(optimizer.step()), None)
    assert (calls, moved(one)) == ([None], 2.0)
    assert loop.precision.state_dict()["scale"] == 8.0


def test_a_fused_optimizer_skips_an_overflow_and_is_left_as_it_was() -> None:
    loop, one = Scaled(), weight()
    optimizer = torch.optim.SGD([one], lr=1.0, fused=True)
    before = set(vars(optimizer))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        optimizer.step()

    for gradient in (float("nan"), 2.0, float("inf"), 4.0):
        loop.backward_to((one, gradient))
        loop.precision.optimizer_step(optimizer, step, None)
        optimizer.zero_grad()
    assert moved(one) == 6.0
    assert steps == 4, "it judges on the device, so the host need not wait for the answer"
    assert set(vars(optimizer)) == before
    assert loop.precision.state_dict()["scale"] == 8.0


def test_several_optimizers_of_one_loss_share_one_scale_and_one_update() -> None:
    """Updating after each step would divide the second optimizer's gradients by the next scale."""
    loop, one, two = Scaled(), weight(), weight()
    optimizers = [loop.descent(one), loop.descent(two)]
    for iteration in range(4):
        loop.backward_to((one, 1.0), (two, 3.0))
        for optimizer in optimizers:
            loop.step(optimizer)
            optimizer.zero_grad()
        assert loop.scale == 8.0 * 2**iteration
    assert (moved(one), moved(two)) == (4.0, 12.0)
    assert loop.precision.state_dict()["scale"] == 8.0 * 2**4


def test_an_overflow_of_one_optimizer_skips_its_own_step_only() -> None:
    loop, one, two = Scaled(), weight(), weight()
    first, second = loop.descent(one), loop.descent(two)
    loop.backward_to((one, float("inf")), (two, 3.0))
    loop.step(first)
    loop.step(second)
    assert (moved(one), moved(two)) == (0.0, 3.0)
    assert loop.precision.state_dict()["scale"] == 4.0


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "detached"])
@pytest.mark.parametrize("options", [{"growth_interval": 1}, {}, {"init_scale": 2.0**30}], ids=str)
def test_two_networks_in_turns_train_like_plain_pytorch(attached: bool, options: dict[str, Any]) -> None:
    """A discriminator steps between the generator's loss and step; when it is attached, its loss also leaves gradients
    in the generator. Plain PyTorch: one scaler, updated after each step, when no scaled gradient waits for one.
    """

    def networks() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        judge = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        return generator, judge, sgd(generator), sgd(judge)

    noise = torch.randn(STEPS, 6, 4, generator=torch.Generator().manual_seed(2))

    def judged(judge: Any, fake: Tensor, real: Tensor) -> Tensor:
        fake = fake if attached else fake.detach()
        return F.softplus(-judge(real).float()).mean() + F.softplus(judge(fake).float()).mean()

    ours = networks()
    loop = Loop(MixedPrecision("float16", scaler=options))
    generate, assess = loop.setup(ours[0], ours[2]), loop.setup(ours[1], ours[3])
    for z in noise:
        ours[3].zero_grad()
        loop.backward(judged(assess, generate(z), z.sin()))
        loop.step(ours[3])
        ours[2].zero_grad()
        loop.backward(F.softplus(-assess(generate(z))).mean())
        loop.step(ours[2])

    plain = networks()
    scaler = GradScaler("cpu", **options)

    def autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                return module(x).float()

        return run

    generate, assess = autocast(plain[0]), autocast(plain[1])
    for z in noise:
        plain[3].zero_grad()
        scaler.scale(judged(assess, generate(z), z.sin())).backward()
        scaler.step(plain[3])
        scaler.update()
        plain[2].zero_grad()
        scaler.scale(F.softplus(-assess(generate(z))).mean()).backward()
        scaler.step(plain[2])
        scaler.update()

    assert identical(ours[0], plain[0])
    assert identical(ours[1], plain[1])
    assert loop.precision.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("first_gradient", [1.0, float("inf")], ids=["growing", "shrinking"])
@pytest.mark.parametrize("clipped", [False, True], ids=["unseen", "unscaled"])
def test_gradients_that_wait_for_their_step_survive_a_change_of_the_scale(
    first_gradient: float, clipped: bool
) -> None:
    """backward(l1); step(o1); backward(l2); step(o2), where o2 needs the gradients of both losses."""
    loop, one, two = Scaled(), weight(), weight()
    first, second = loop.descent(one), loop.descent(two)
    for _ in range(3):
        loop.backward_to((one, first_gradient), (two, 3.0))
        if clipped:
            loop.precision.unscale_gradients(second)
        loop.step(first)
        first.zero_grad()
        before = loop.scale
        loop.backward_to((one, 2.0), (two, 5.0))
        assert loop.scale != before
        loop.step(second)
        loop.step(first)
        first.zero_grad()
        second.zero_grad()
    assert moved(two) == 3 * 8.0
    assert moved(one) == 3 * 2.0 + (0.0 if first_gradient == float("inf") else 3.0)


def test_the_first_change_of_the_scale_finds_an_optimizer_that_has_not_stepped_yet() -> None:
    """Through a Fabric, because it is `setup` that tells the precision of an optimizer before its first step."""
    one, two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with Fabric(
        accelerator="cpu",
        devices=1,
        precision="16-mixed",
        precision_options={"scaler": {"init_scale": 8.0, "growth_interval": 1}},
    ) as fabric:
        fabric.launch()
        first = fabric.setup(one, torch.optim.SGD(one.parameters(), lr=1.0))[1]
        second = fabric.setup(two, torch.optim.SGD(two.parameters(), lr=1.0))[1]
        start = one.weight.item(), two.weight.item()
        fabric.backward((one.weight + 3 * two.weight).sum())
        first.step()
        fabric.backward(5 * two.weight.sum())
        second.step()
    assert one.weight.item() == pytest.approx(start[0] - 1.0, abs=1e-6)
    assert two.weight.item() == pytest.approx(start[1] - 8.0, abs=1e-6)


def test_gradients_that_are_kept_after_a_step_are_added_to_as_in_plain_pytorch() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    for _ in range(3):
        loop.backward_to((one, 1.0))
        loop.step(optimizer)  # and no zero_grad: 1, 2, 3
    assert moved(one) == 6.0


def test_accumulated_gradients_may_be_clipped_before_the_last_one_is_there() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    for _ in range(2):
        for gradient in (4.0, 1.0, 2.0):
            loop.backward_to((one, gradient))
            loop.precision.unscale_gradients(optimizer)
            nn.utils.clip_grad_value_([one], 3.0)
        loop.step(optimizer)
        optimizer.zero_grad()
    assert moved(one) == 2 * 3.0


def test_clipping_twice_and_stepping_twice_are_no_errors() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    loop.backward_to((one, 1.0))
    for _ in range(2):
        loop.precision.unscale_gradients(optimizer)
        assert one.grad is not None
        assert one.grad.tolist() == [1.0] * 3
    loop.step(optimizer)
    loop.precision.unscale_gradients(optimizer)
    assert one.grad.tolist() == [1.0] * 3
    loop.step(optimizer)
    assert moved(one) == 2.0
    assert loop.precision.state_dict()["scale"] == 8.0 * 2**2


def test_two_optimizers_of_one_parameter_both_see_its_true_gradient() -> None:
    """A plain GradScaler divides the shared gradient by the scale twice, and says nothing."""
    loop, shared, own = Scaled(), weight(), weight()
    first, second = loop.descent(shared), loop.descent(shared, own)
    for _ in range(2):
        loop.backward_to((shared, 1.0), (own, 2.0))
        loop.step(first)
        loop.step(second)
        first.zero_grad()
        second.zero_grad()
    assert (moved(shared), moved(own)) == (2 * 2.0, 2 * 2.0)


def test_an_optimizer_without_gradients_steps_as_in_plain_pytorch() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    calls = []
    loop.precision.unscale_gradients(optimizer)
    loop.precision.optimizer_step(optimizer, lambda: calls.append("before any loss"), None)
    loop.backward_to((weight(), 1.0))
    loop.precision.optimizer_step(optimizer, lambda: calls.append("after a loss of others"), None)
    assert calls == ["before any loss", "after a loss of others"]
    assert loop.precision.state_dict()["scale"] == 8.0


def test_a_state_taken_between_two_steps_spoils_neither() -> None:
    loop, one, two = Scaled(), weight(), weight()
    first, second = loop.descent(one), loop.descent(two)
    loop.backward_to((one, 1.0), (two, 3.0))
    loop.step(first)
    assert loop.precision.state_dict()["scale"] == 16.0
    loop.step(second)
    assert (moved(one), moved(two)) == (1.0, 3.0)


def test_a_state_restored_between_loss_and_step_spoils_nothing() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    loop.backward_to((one, 1.0))
    loop.precision.load_state_dict({**loop.precision.state_dict(), "scale": 1024.0})
    loop.step(optimizer)
    assert moved(one) == 1.0
    assert loop.precision.state_dict()["scale"] == 2048.0


def test_saving_does_not_touch_gradients() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    loop.backward_to((one, 1.0))
    loop.step(optimizer)
    loop.precision.state_dict()
    assert one.grad is not None
    assert one.grad.tolist() == [1.0] * 3


def test_sparse_gradients_are_scaled_too() -> None:
    loop = Scaled()
    table = nn.Embedding(4, 2, sparse=True)
    nn.init.zeros_(table.weight)
    other = weight()
    optimizer, quick = loop.descent(table.weight), loop.descent(other)
    for _ in range(2):
        loop.backward(table(torch.tensor([1, 1])).sum() + other.sum())
        loop.step(quick)
        quick.zero_grad()
    loop.step(optimizer)
    assert table.weight.tolist() == [[0.0, 0.0], [-4.0, -4.0], [0.0, 0.0], [0.0, 0.0]]


def test_gradients_of_a_loss_that_was_not_scaled_are_an_error_with_advice() -> None:
    loop, one = Scaled(), weight()
    optimizer = loop.descent(one)
    one.sum().backward()
    for act in (loop.step, loop.precision.unscale_gradients):
        with pytest.raises(SetupError, match=r"Call fabric\.backward\(loss\) instead"):
            act(optimizer)
    assert moved(one) == 0.0


def test_a_closure_cannot_be_used_while_losses_are_scaled() -> None:
    loop, one = Scaled(), weight()
    optimizer = torch.optim.LBFGS([one])
    with pytest.raises(UnsupportedError, match=r"LBFGS\.step\(closure\).*precision='bf16-mixed'"):
        loop.precision.optimizer_step(optimizer, optimizer.step, lambda: 1.0)


@pytest.mark.parametrize("precision", [MixedPrecision("bfloat16"), TruePrecision("float64")])
def test_a_closure_works_where_losses_are_not_scaled(precision: Precision) -> None:
    loop = Loop(precision)
    model = new_model(lambda: nn.Linear(4, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    forward = loop.setup(model, optimizer)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (forward(x).float() - 1).pow(2).mean()
        loop.backward(loss)
        losses.append(loss.item())
        return loss

    assert loop.precision.optimizer_step(optimizer, optimizer.step, closure) == losses[0]
    assert min(losses) < 0.5 * losses[0]


def test_the_return_value_of_a_step_comes_back() -> None:
    for precision in (MixedPrecision("float16"), MixedPrecision("bfloat16"), TruePrecision("float16")):
        loop, one = Loop(precision), weight()
        loop.backward(one.sum())
        assert loop.precision.optimizer_step(descent(one), lambda: "returned", None) == "returned"


def test_an_optimizer_is_not_kept_alive() -> None:
    loop, one = Scaled(init_scale=1.0), weight()
    for iteration in range(20):  # most will be given the id of one that is gone
        optimizer = loop.descent(one)
        loop.backward_to((one, 1.0))
        loop.precision.unscale_gradients(optimizer)
        if iteration % 3:
            loop.step(optimizer)
        one.grad = None
        gone = weakref.ref(optimizer)
        del optimizer
        if gone() is not None:
            gc.collect()
        assert gone() is None
    assert moved(one) == 13.0


def test_a_precision_pickles_and_copies_before_and_after_use() -> None:
    loop, one = Scaled(), weight()
    for precision in (copy.deepcopy(loop.precision), pickle.loads(pickle.dumps(loop.precision))):
        assert precision.state_dict()["scale"] == 8.0
    loop.backward_to((one, 1.0))
    loop.step(descent(one))
    loop.precision.state_dict()
    assert pickle.loads(pickle.dumps(loop.precision)).state_dict()["scale"] == 16.0


# -- a scaler of one's own ---------------------------------------------------------------------------------------------


def test_a_scaler_may_be_passed_ready_made() -> None:
    scaler = GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("float16", scaler)
    loop, one = Loop(precision), weight()
    assert precision.scaler is scaler
    loop.backward(one.sum())
    assert one.grad is not None
    assert one.grad.tolist() == [4.0] * 3


def test_scaling_can_be_turned_off() -> None:
    precision = MixedPrecision("float16", {"enabled": False})
    loop, one = Loop(precision), weight()
    assert (precision.scales_loss, precision.scaler, precision.state_dict()) == (False, None, {})
    loop.backward(one.sum())
    assert loop.precision.optimizer_step(descent(one), lambda: "stepped", None) == "stepped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bfloat16", {"init_scale": 4}), "with float16 only.*precision='16-mixed'"),
        (("float16", {"int_scale": 4}), "no option 'int_scale'. Did you mean 'init_scale'"),
        (("float16", {"device": "cuda"}), "no option 'device'.*It has: backoff_factor"),
        (("float16", {"growth_factor": 0.5}), "refuses .*growth factor must be > 1"),
        (("float16", 1024), "scaler=1024 cannot be used.*a dictionary of its options"),
        (("float16", GradScaler("cpu", enabled=False)), "is disabled"),
    ],
)
def test_a_scaler_that_cannot_be_used_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        MixedPrecision(*arguments)


def test_the_state_of_another_precision_is_told_apart() -> None:
    loop = Scaled()
    loop.precision.load_state_dict({})
    assert loop.scale == 8.0
    with pytest.raises(CheckpointKeyError, match="not the state of a loss scaler: it lacks .*growth_factor"):
        loop.precision.load_state_dict({"scale": 4.0})
    for other in (MixedPrecision("bfloat16"), TruePrecision("float16")):
        other.load_state_dict(loop.precision.state_dict())
        assert other.state_dict() == {}


def test_a_device_without_autocast_is_an_error_and_not_float32() -> None:
    precision = MixedPrecision("bfloat16")
    precision.attach(torch.device("vulkan"))
    with pytest.raises(UnsupportedError, match=r"'vulkan' cannot compute in mixed precision with bfloat16"):
        precision.convert_module(nn.Linear(1, 1))


def test_a_dtype_that_autocast_would_silently_ignore_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = MixedPrecision("bfloat16")
    precision.attach(CPU)
    precision.dtype = torch.float64  # what torch.autocast only warns about
    with pytest.raises(UnsupportedError, match="only supports dtypes of"):
        precision.convert_module(nn.Linear(1, 1))


def test_half_precision_weights_cannot_be_scaled() -> None:
    precision = MixedPrecision("float16")
    precision.attach(CPU)
    with pytest.raises(UnsupportedError, match=r"has weights in float16.*precision='16-true'"):
        precision.convert_module(nn.Linear(1, 1).half())


def test_compiled_forward_passes_give_the_same_numbers() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    for precision in (MixedPrecision("bfloat16"), TruePrecision("bfloat16")):
        forward = Loop(precision).setup(new_model(lambda: nn.Linear(4, 2)))
        compiled = torch.compile(forward, backend="eager")
        assert torch.equal(compiled(x), forward(x))
