"""backward, clip_gradients, accumulate, no_backward_sync and autocast, on one process, against plain PyTorch loops."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import one_process
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fabric_core import (
    ConfigurationError,
    Fabric,
    Precision,
    SetupError,
    Strategy,
    StrategySpec,
    WrongTypeError,
    unwrap,
)

pytestmark = pytest.mark.usefixtures("core_alone")
STEPS = 20


fabric = one_process.fabric


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(number: int, size: int = 3, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator))
        for _ in range(number)
    ]


def loader_of(data: list[tuple[Tensor, Tensor]]) -> DataLoader[Any]:
    """A loader whose batches are ``data``."""
    inputs, targets = (torch.stack(parts) for parts in zip(*data, strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=None)


def momentum(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: list[list[tuple[Tensor, Tensor]]],
    clip: Callable[[nn.Module], Any] = lambda _: None,
) -> None:
    """What every test compares with: gradients of the mean over each window, in plain PyTorch."""
    for window in windows:
        for inputs, targets in window:
            (mse_loss(model(inputs), targets) / len(window)).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


def cut(data: list[Any], *lengths: int) -> list[list[Any]]:
    """``data`` cut into windows."""
    rest = iter(data)
    return [list(itertools.islice(rest, length)) for length in lengths]


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# -- backward and step --------------------------------------------------------------------------------------------


def test_a_training_equals_a_plain_loop_bit_for_bit(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(STEPS), *[1] * STEPS))
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in batches(STEPS):
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_models(model, plain)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_fused_and_foreach_optimizers_do_the_same(fabric: Fabric, options: dict[str, bool]) -> None:
    plain, model = net(), net()
    plain_loop(plain, torch.optim.AdamW(plain.parameters(), **options), cut(batches(5), *[1] * 5))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), **options))
    for inputs, targets in batches(5):
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert_equal_models(model, plain)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_two_optimizers_of_one_model_do_the_same_as_in_a_plain_loop(fabric: Fabric) -> None:
    def two(model: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return momentum(model[0]), torch.optim.Adam(model[2].parameters(), lr=0.01)

    plain, model = net(), net()
    first, second = two(plain)
    for inputs, targets in batches(STEPS):
        mse_loss(plain(inputs), targets).backward()
        for each in (first, second):
            each.step()
            each.zero_grad()
    model, *optimizers = fabric.setup(model, *two(model))
    for inputs, targets in batches(STEPS):
        fabric.backward(mse_loss(model(inputs), targets))
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert_equal_models(model, plain)


def test_backward_hands_its_arguments_to_pytorch(fabric: Fabric) -> None:
    model = fabric.setup(net())
    output = model(torch.ones(3, 4))
    fabric.backward(output, gradient=torch.ones_like(output), retain_graph=True, model=model)
    once = model[2].bias.grad.clone()
    fabric.backward(output, torch.ones_like(output), inputs=[model[2].bias])
    assert torch.equal(model[2].bias.grad, 2 * once)


def test_a_bare_loss_backward_is_fine_where_nothing_is_scaled(fabric: Fabric) -> None:
    model = fabric.setup(net())
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("zero_in_closure", [True, False])
def test_an_optimizer_with_a_closure_does_the_same_as_in_a_plain_loop(
    fabric: Fabric, zero_in_closure: bool
) -> None:
    def run(
        model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], None]
    ) -> list[float]:
        losses = []
        for inputs, targets in batches(5):

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                if zero_in_closure:
                    optimizer.zero_grad()
                loss = mse_loss(model(inputs), targets)
                backward(loss)
                return loss

            if not zero_in_closure:
                optimizer.zero_grad()
            losses.append(optimizer.step(closure).item())
        return losses

    plain, model = net(), net()
    expected = run(plain, torch.optim.LBFGS(plain.parameters(), max_iter=4), Tensor.backward)
    model, optimizer = fabric.setup(model, torch.optim.LBFGS(model.parameters(), max_iter=4))
    assert run(model, optimizer, fabric.backward) == expected
    assert_equal_models(model, plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: StepLR(o, 3, gamma=0.5),
        lambda o: LinearLR(o, total_iters=10),
        lambda o: OneCycleLR(o, max_lr=0.3, total_steps=STEPS),
        lambda o: LambdaLR(o, lambda step: 0.9**step),
    ],
    ids=["StepLR", "LinearLR", "OneCycleLR", "LambdaLR"],
)
@pytest.mark.parametrize("made", ["before setup", "after setup"])
def test_a_scheduler_sets_the_rate_without_warnings_whenever_it_was_made(
    fabric: Fabric, make: Callable[[Any], Any], made: str
) -> None:
    plain = net()
    plain_optimizer = momentum(plain)
    plain_scheduler = make(plain_optimizer)
    model = net()
    optimizer: Any = momentum(model)
    scheduler = make(optimizer) if made == "before setup" else None
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = scheduler or make(optimizer)
    for inputs, targets in batches(STEPS - 1):
        for m, o, s, backward in (
            (plain, plain_optimizer, plain_scheduler, Tensor.backward),
            (model, optimizer, scheduler, fabric.backward),
        ):
            backward(mse_loss(m(inputs), targets))
            o.step()
            o.zero_grad()
            s.step()
        assert optimizer.param_groups[0]["lr"] == plain_optimizer.param_groups[0]["lr"]
        assert scheduler.get_last_lr() == plain_scheduler.get_last_lr()
    assert_equal_models(model, plain)


def test_a_scheduler_that_is_stepped_too_early_is_warned_about_as_in_plain_pytorch(fabric: Fabric) -> None:
    model = net()
    _, optimizer = fabric.setup(model, momentum(model))
    scheduler = StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_schedulers_made_before_and_after_setup_live_together(fabric: Fabric) -> None:
    model = net()
    raw = momentum(model)
    early = StepLR(raw, 1, gamma=0.5)
    model, optimizer = fabric.setup(model, raw)
    late = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(2):
        fabric.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        early.step()
        late.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 * 0.5 * 0.1)
    assert raw.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models_follow_a_set_up_model(fabric: Fabric, kind: str) -> None:
    options: dict[str, Any] = {} if kind == "swa" else {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    plain, model = net(), net()
    plain_average = AveragedModel(plain, **options)
    optimizer, plain_optimizer = momentum(model), momentum(plain)
    model, optimizer = fabric.setup(model, optimizer)
    average = AveragedModel(model, **options)
    assert type(average.module) is nn.Sequential
    for inputs, targets in batches(5):
        plain_loop(plain, plain_optimizer, [[(inputs, targets)]])
        plain_average.update_parameters(plain)
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert_equal_models(average, plain_average)
    assert not torch.equal(next(average.parameters()), next(model.parameters()))


def test_callbacks_are_told_of_each_step_that_was_taken(fabric: Fabric) -> None:
    told = []

    class Callback:
        def on_after_optimizer_step(self, optimizer: Any) -> None:
            told.append(optimizer)

    fabric.callbacks.append(Callback())
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    for _ in range(4):
        with fabric.accumulate(model, every=2):
            fabric.backward(model(torch.ones(1, 4)).sum())
            optimizer.step()
    assert len(told) == 2
    assert told[0] is optimizer


# -- clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clipping_by_norm_equals_pytorch_and_returns_the_norm(fabric: Fabric, norm_type: float) -> None:
    def clip(model: nn.Module) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type)

    plain, model = net(), net()
    norms: list[Tensor] = []
    plain_loop(plain, momentum(plain), cut(batches(STEPS), *[1] * STEPS), lambda m: norms.append(clip(m)))
    model, optimizer = fabric.setup(model, momentum(model))
    for (inputs, targets), expected in zip(batches(STEPS), norms, strict=True):
        fabric.backward(mse_loss(model(inputs), targets))
        norm = fabric.clip_gradients(model, optimizer, max_norm=0.05, norm_type=norm_type)
        assert norm is not None
        assert norm.ndim == 0
        assert torch.equal(norm, expected)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_clipping_by_value_equals_pytorch(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(
        plain,
        momentum(plain),
        cut(batches(STEPS), *[1] * STEPS),
        lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
    )
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in batches(STEPS):
        fabric.backward(mse_loss(model(inputs), targets))
        assert fabric.clip_gradients(model, optimizer, clip_val=0.01) is None
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_only_the_parameters_of_the_optimizer_are_clipped(fabric: Fabric) -> None:
    model: Any = net()
    model, optimizer = fabric.setup(model, momentum(model[0]))
    fabric.backward(model(torch.ones(3, 4)).sum() * 100)
    others = model[2].weight.grad.clone()
    fabric.clip_gradients(model, optimizer, clip_val=0.0)
    assert not model[0].weight.grad.any()
    assert torch.equal(model[2].weight.grad, others)


@pytest.mark.parametrize("limits", [{}, {"clip_val": 1.0, "max_norm": 1.0}], ids=["neither", "both"])
def test_clipping_wants_exactly_one_of_value_and_norm(fabric: Fabric, limits: dict[str, float]) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    with pytest.raises(ConfigurationError, match="either clip_val or max_norm"):
        fabric.clip_gradients(model, optimizer, **limits)


def test_clipping_raises_for_a_norm_that_is_not_finite_unless_told_otherwise(fabric: Fabric) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    fabric.backward(model(torch.full((1, 4), math.inf)).sum())
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm is not None
    assert not norm.isfinite()


def test_a_raw_model_and_a_raw_optimizer_can_be_clipped_too(fabric: Fabric) -> None:
    model = net()
    optimizer = momentum(model)
    model(torch.ones(3, 4)).sum().backward()
    fabric.clip_gradients(model, optimizer, clip_val=0.0)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# -- accumulate ---------------------------------------------------------------------------------------------------


def accumulated(fabric: Fabric, data: list[Any], every: int, order: str = "zero last") -> nn.Module:
    """Train over ``data`` in windows, in one loop over a loader; where zero_grad stands is up to ``order``."""
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in fabric.setup_dataloaders(loader_of(data)):
        with fabric.accumulate(model, every=every):
            if order == "zero first":
                optimizer.zero_grad()
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            if order == "zero last":
                optimizer.zero_grad()
    return model


@pytest.mark.parametrize("order", ["zero last", "zero first"])
@pytest.mark.parametrize(
    ("number", "every", "lengths"),
    [
        (20, 1, [1] * 20),
        (20, 4, [4] * 5),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 4, 1]),
        (3, 8, [3]),
        (1, 8, [1]),
    ],
    ids=lambda value: str(value),
)
def test_a_window_equals_one_step_on_the_mean_of_its_micro_batches(
    fabric: Fabric, number: int, every: int, lengths: list[int], order: str
) -> None:
    plain = net()
    plain_loop(plain, momentum(plain), cut(batches(number), *lengths))
    assert_equal_models(accumulated(fabric, batches(number), every, order), plain)


def test_windows_go_on_over_epochs(fabric: Fabric) -> None:
    plain = net()
    plain_loop(plain, momentum(plain), 3 * cut(batches(7), 3, 3, 1))
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    loader = fabric.setup_dataloaders(loader_of(batches(7)))
    for _ in range(3):
        for inputs, targets in loader:
            with fabric.accumulate(model, every=3) as window:
                fabric.backward(mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        assert window.is_full
    assert_equal_models(model, plain)


def test_a_stream_without_a_length_ends_its_last_window_early(fabric: Fabric) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(batches(10))

    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(10), 4, 4, 2))
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in fabric.setup_dataloaders(DataLoader(Stream(), batch_size=None)):
        with fabric.accumulate(model, every=4):
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_without_a_set_up_loader_windows_are_counted(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(8), 4, 4))
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in batches(10):
        with fabric.accumulate(model, every=4) as window:
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert (window.index, window.length, window.is_full) == (1, 4, False)
    assert_equal_models(model, plain)


def test_a_loop_that_is_left_in_mid_window_is_finished_by_the_next_one(fabric: Fabric) -> None:
    data = batches(9)
    plain, model = net(), net()
    windows = [data[0:4], [*data[4:6], *data[0:2]], [*data[2:4], data[8]]]
    plain_loop(plain, momentum(plain), windows)
    model, optimizer = fabric.setup(model, momentum(model))
    loaders = [fabric.setup_dataloaders(loader_of(part)) for part in (data, data, data[8:])]
    for loader, stop in zip(loaders, (6, 4, 1), strict=True):
        for position, (inputs, targets) in enumerate(loader):
            if position == stop:
                break
            with fabric.accumulate(model, every=4) as window:
                fabric.backward(mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
    assert (window.length, window.correction) == (3, 4 / 3)  # the last loader ends it early
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("left_early", [False, True], ids=["to its end", "left early"])
def test_an_evaluation_in_the_middle_of_a_window_does_not_change_it(fabric: Fabric, left_early: bool) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(10), 4, 4, 2))
    model, optimizer = fabric.setup(model, momentum(model))
    training, evaluation = fabric.setup_dataloaders(loader_of(batches(10)), loader_of(batches(3, seed=2)))
    for inputs, targets in training:
        for number, (others, _) in enumerate(evaluation):
            with torch.no_grad():
                model(others)
            if left_early and number == 1:
                break
        with fabric.accumulate(model, every=4):
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_loaders_that_are_looped_over_in_step_end_a_window_together(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(10), 4, 4, 2))
    model, optimizer = fabric.setup(model, momentum(model))
    loaders = fabric.setup_dataloaders(loader_of(batches(10)), loader_of(batches(10)))
    for (inputs, targets), _ in zip(*loaders, strict=True):
        with fabric.accumulate(model, every=4):
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_a_micro_batch_that_is_left_out_does_not_count(fabric: Fabric) -> None:
    data = batches(9)
    left_out = {1, 5}
    plain, model = net(), net()
    kept = [batch for index, batch in enumerate(data) if index not in left_out]
    plain_loop(plain, momentum(plain), cut(kept, 3, 3, 1))
    model, optimizer = fabric.setup(model, momentum(model))
    for index, (inputs, targets) in enumerate(fabric.setup_dataloaders(loader_of(data))):
        with fabric.accumulate(model, every=3):
            if index in left_out:
                continue
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_a_micro_batch_that_fails_does_not_count(fabric: Fabric) -> None:
    data = batches(8)
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(data, 4, 4))
    model, optimizer = fabric.setup(model, momentum(model))
    for index, (inputs, targets) in enumerate(data):
        if index in (1, 3, 4):
            with pytest.raises(RuntimeError, match="out of memory"), fabric.accumulate(model, every=4):
                raise RuntimeError("out of memory")
        with fabric.accumulate(model, every=4):
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_clipping_waits_for_the_end_of_the_window(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(
        plain,
        momentum(plain),
        cut(batches(10), 4, 4, 2),
        lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05),
    )
    model, optimizer = fabric.setup(model, momentum(model))
    norms = []
    for inputs, targets in fabric.setup_dataloaders(loader_of(batches(10))):
        with fabric.accumulate(model, every=4):
            fabric.backward(mse_loss(model(inputs), targets))
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.05))
            optimizer.step()
            optimizer.zero_grad()
    assert [norm is not None for norm in norms] == [False] * 3 + [True] + [False] * 3 + [True, False, True]
    assert_equal_models(model, plain)


def gan_losses(critic: nn.Module, generator: nn.Module, batch: Any) -> tuple[Any, Any]:
    inputs, targets = batch
    return (
        lambda: mse_loss(critic(inputs), targets) - mse_loss(critic(generator(inputs).tanh()), targets),
        lambda: mse_loss(critic(generator(inputs).tanh()), targets),
    )


def gan() -> tuple[nn.Module, nn.Module]:
    return net(1), nn.Sequential(net(2), nn.Linear(2, 4))


def plain_gan(windows: list[list[Any]]) -> tuple[nn.Module, nn.Module]:
    """Both models step once per window; each one's gradients are dropped when its window begins."""
    torch.manual_seed(0)
    critic, generator = gan()
    one, two = momentum(critic, 0.01), momentum(generator, 0.01)
    for window in windows:
        for index, batch in enumerate(window):
            critic_loss, generator_loss = gan_losses(critic, generator, batch)
            if index == 0:
                one.zero_grad()
            (critic_loss() / len(window)).backward()
            if index == len(window) - 1:
                one.step()
            if index == 0:
                two.zero_grad()
            (generator_loss() / len(window)).backward()
            if index == len(window) - 1:
                two.step()
    return critic, generator


@pytest.mark.parametrize("blocks", ["one for both", "one for each", "nested"])
def test_two_models_that_are_trained_in_turn_keep_what_waits_for_the_window(
    fabric: Fabric, blocks: str
) -> None:
    expected = plain_gan(cut(batches(10), 4, 4, 2))
    torch.manual_seed(0)
    critic, generator = gan()
    critic, one = fabric.setup(critic, momentum(critic, 0.01))
    generator, two = fabric.setup(generator, momentum(generator, 0.01))
    around_both = (critic, generator) if blocks == "one for both" else generator
    for batch in fabric.setup_dataloaders(loader_of(batches(10))):
        critic_loss, generator_loss = gan_losses(critic, generator, batch)
        outer: AbstractContextManager[Any] = (
            nullcontext() if blocks == "one for each" else fabric.accumulate(around_both, every=4)
        )
        inner_1 = nullcontext() if blocks == "one for both" else fabric.accumulate(critic, every=4)
        with outer:
            with inner_1:
                one.zero_grad()
                fabric.backward(critic_loss())
                one.step()
            inner_2 = fabric.accumulate(generator, every=4) if blocks == "one for each" else nullcontext()
            with inner_2:
                two.zero_grad()
                fabric.backward(generator_loss())
                two.step()
    assert_equal_models(critic, expected[0])
    assert_equal_models(generator, expected[1])


def test_windows_of_different_lengths_do_not_disturb_each_other(fabric: Fabric) -> None:
    pairs = [net(seed) for seed in (1, 2)]
    plains = copy.deepcopy(pairs)
    data = batches(12)
    for plain, every in zip(plains, (2, 3), strict=True):
        plain_loop(plain, momentum(plain), cut(data, *[every] * (12 // every)))
    ready = [fabric.setup(model, momentum(model)) for model in pairs]
    for inputs, targets in fabric.setup_dataloaders(loader_of(data)):
        for (model, optimizer), every in zip(ready, (2, 3), strict=True):
            with fabric.accumulate(model, every=every):
                fabric.backward(mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
    for (model, _), plain in zip(ready, plains, strict=True):
        assert_equal_models(model, plain)


def test_two_losses_of_one_micro_batch_are_divided_alike(fabric: Fabric) -> None:
    plain, model = net(), net()
    for window in cut(batches(4), 2, 2):
        for inputs, targets in window:
            ((mse_loss(plain(inputs), targets) + plain(inputs).square().mean()) / 2).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for inputs, targets in fabric.setup_dataloaders(loader_of(batches(4))):
        with fabric.accumulate(model, every=2):
            fabric.backward(mse_loss(model(inputs), targets))
            fabric.backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_a_step_that_the_user_decides_on_by_is_full_works_too(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(10), 4, 4, 2))
    model, optimizer = fabric.setup(model, momentum(model))
    for inputs, targets in fabric.setup_dataloaders(loader_of(batches(10))):
        with fabric.accumulate(model, every=4) as window:
            fabric.backward(mse_loss(model(inputs), targets))
            if window.is_full:
                optimizer.step()
            optimizer.zero_grad()
    assert_equal_models(model, plain)


def test_a_step_that_was_not_taken_can_be_dropped_at_the_end_of_the_window(fabric: Fabric) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    for index in range(4):
        with fabric.accumulate(model, every=2):
            fabric.backward(model(torch.ones(1, 4)).sum() * (math.nan if index < 2 else 1.0))
            if model[2].bias.grad.isfinite().all():
                optimizer.step()
            optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[2].bias, net()[2].bias)


def test_gradients_from_before_a_window_are_dropped_when_it_begins(fabric: Fabric) -> None:
    plain, model = net(), net()
    plain_loop(plain, momentum(plain), cut(batches(2), 2))
    model, optimizer = fabric.setup(model, momentum(model))
    fabric.backward(model(torch.ones(1, 4)).sum())
    for inputs, targets in fabric.setup_dataloaders(loader_of(batches(2))):
        with fabric.accumulate(model, every=2):
            optimizer.zero_grad()
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
    assert_equal_models(model, plain)


@pytest.mark.parametrize("made", ["before setup", "after setup"])
def test_a_scheduler_that_is_stepped_once_per_window_sees_every_step(fabric: Fabric, made: str) -> None:
    model = net()
    optimizer: Any = momentum(model)
    scheduler = StepLR(optimizer, 1, gamma=0.5) if made == "before setup" else None
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = scheduler or StepLR(optimizer, 1, gamma=0.5)
    for inputs, targets in fabric.setup_dataloaders(loader_of(batches(10))):
        with fabric.accumulate(model, every=4) as window:
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
            if window.is_full:
                scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("every", [0, -1, 1.5, "4", True, None])
def test_a_window_has_a_whole_number_of_batches(fabric: Fabric, every: Any) -> None:
    model = fabric.setup(net())
    with pytest.raises(ConfigurationError, match="whole number"), fabric.accumulate(model, every=every):
        pass


def test_accumulate_needs_a_model_that_was_set_up(fabric: Fabric) -> None:
    with pytest.raises(WrongTypeError, match="setup"), fabric.accumulate(net(), every=2):
        pass


def test_a_bare_backward_in_a_window_is_refused_when_the_optimizer_steps(fabric: Fabric) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    with pytest.raises(SetupError, match=r"fabric\.backward"), fabric.accumulate(model, every=2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def test_a_closure_in_a_window_is_refused_because_micro_batches_would_be_lost(fabric: Fabric) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    with pytest.raises(SetupError, match="closure"), fabric.accumulate(model, every=2):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    with fabric.accumulate(model, every=1):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())


def test_a_window_inside_of_itself_is_refused(fabric: Fabric) -> None:
    model = fabric.setup(net())
    with (
        fabric.accumulate(model, every=2),
        pytest.raises(SetupError, match="inside"),
        fabric.accumulate(model, every=2),
    ):
        pass


def test_a_model_that_is_gone_leaves_its_window_to_no_other(fabric: Fabric) -> None:
    for _ in range(10):  # the next model often gets the address of the one before
        model = net()
        model, optimizer = fabric.setup(model, momentum(model))
        with fabric.accumulate(model, every=4) as window:
            assert window.index == 0
            fabric.backward(model(torch.ones(1, 4)).sum())
        del model, optimizer
    assert len(fabric._accumulation._windows) <= 2


def test_nothing_waits_outside_of_the_block(fabric: Fabric) -> None:
    model = net()
    model, optimizer = fabric.setup(model, momentum(model))
    before = copy.deepcopy(model)
    with fabric.accumulate(model, every=4):
        fabric.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
    assert_equal_models(model, before)
    optimizer.step()
    assert not torch.equal(model[2].bias, before[2].bias)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# -- gradient synchronisation -------------------------------------------------------------------------------------


class Holding(Strategy):
    """Notes when it holds back the synchronisation, and for which module."""

    def __init__(self) -> None:
        self.held: list[nn.Module] = []

    @contextmanager
    def hold_gradient_sync(self, module: nn.Module) -> Iterator[None]:
        self.held.append(module)
        yield
        self.held.append(module)


class Syncing(Strategy):
    spec = StrategySpec("syncing", "", supports=("cpu",))

    def hold_gradient_sync(self, module: nn.Module) -> None:
        return None


def test_gradients_are_held_back_until_the_window_is_full() -> None:
    strategy = Holding()
    with pytest.warns(UserWarning, match="Neither"):
        fabric = Fabric(accelerator="cpu", strategy=strategy)
    model = fabric.setup(net())
    held = []
    for index in range(5):
        with fabric.accumulate(model, every=3):
            fabric.backward(model(torch.ones(1, 4)).sum())
            held.append(len(strategy.held))
        assert len(strategy.held) == 2 * min(index + 1, 2 if index < 3 else index)
    assert held == [1, 3, 4, 5, 7]
    assert strategy.held[0] is unwrap(model)


def test_no_backward_sync_holds_back_only_when_enabled() -> None:
    strategy = Holding()
    with pytest.warns(UserWarning, match="Neither"):
        fabric = Fabric(accelerator="cpu", strategy=strategy)
    model = fabric.setup(net())
    with fabric.no_backward_sync(model, enabled=False):
        assert not strategy.held
    with fabric.no_backward_sync(model):
        assert len(strategy.held) == 1
    assert len(strategy.held) == 2


def test_a_strategy_that_cannot_hold_back_is_warned_about_once_at_the_line_of_the_user() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Syncing())
    model = fabric.setup(net())
    with pytest.warns(UserWarning, match="cannot hold back") as caught, fabric.no_backward_sync(model):
        pass
    assert [warning.filename for warning in caught] == [__file__]
    with fabric.no_backward_sync(model), fabric.accumulate(model, every=2):
        fabric.backward(model(torch.ones(1, 4)).sum())


def test_no_backward_sync_needs_a_model_that_was_set_up(fabric: Fabric) -> None:
    with pytest.raises(WrongTypeError, match="Sequential"), fabric.no_backward_sync(net()):
        pass


def test_no_backward_sync_does_nothing_on_one_device(fabric: Fabric) -> None:
    model = fabric.setup(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fabric.no_backward_sync(model):
            fabric.backward(model(torch.ones(1, 4)).sum())
    assert model[0].weight.grad is not None


# -- precision ----------------------------------------------------------------------------------------------------


class Scaling(Precision):
    """A loss scale of 8, as a precision with a scaler has one."""

    scales_loss = True

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * 8

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not hasattr(parameter.grad, "unscaled"):
                    parameter.grad /= 8
                    parameter.grad.unscaled = True

    def optimizer_step(self, optimizer: Any, step: Callable[..., Any], closure: Any) -> Any:
        self.unscale_gradients(optimizer)
        return super().optimizer_step(optimizer, step, closure)

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def scaled() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu", precision=Scaling()) as fabric:
        yield fabric


def test_a_bare_loss_backward_is_refused_where_losses_are_scaled(scaled: Fabric) -> None:
    model = scaled.setup(net())
    with pytest.raises(SetupError, match=r"fabric\.backward\(loss\).*zero_grad"):
        model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    scaled.backward(model(torch.ones(1, 4)).sum())


def test_gradients_that_are_not_collected_stay_free_to_use_where_losses_are_scaled(scaled: Fabric) -> None:
    model = scaled.setup(net())
    inputs = torch.ones(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    assert gradient.shape == inputs.shape
    (gradient,) = torch.autograd.grad(model(inputs).sum(), [model[0].weight])
    assert gradient.shape == model[0].weight.shape
    model(inputs).sum().backward(inputs=[inputs])
    assert inputs.grad is not None


def test_after_a_refusal_and_after_an_error_the_watch_goes_on(scaled: Fabric) -> None:
    model = scaled.setup(net())
    with pytest.raises(RuntimeError, match="scalar"):
        scaled.backward(model(torch.ones(1, 4)))
    with pytest.raises(SetupError):
        model(torch.ones(1, 4)).sum().backward()


def test_parameters_are_watched_once_however_many_models_they_belong_to(scaled: Fabric) -> None:
    model = net()
    for part in (model, model[0], nn.Sequential(model)):
        scaled.setup(part)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())


def test_the_last_fabric_that_sets_a_model_up_decides_whether_it_is_watched(scaled: Fabric) -> None:
    model = net()
    scaled.setup(model)
    with Fabric(accelerator="cpu") as other:
        wrapped = other.setup(model)
        wrapped(torch.ones(1, 4)).sum().backward()
        other.backward(wrapped(torch.ones(1, 4)).sum())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_closed_fabric_watches_nothing() -> None:
    model = net()
    with Fabric(accelerator="cpu", precision=Scaling()) as fabric:
        fabric.setup(model)
    model(torch.ones(1, 4)).sum().backward()


def test_gradients_are_brought_to_their_true_size_before_they_are_clipped(scaled: Fabric) -> None:
    model, plain = net(), net()
    with torch.autocast("cpu", torch.bfloat16):
        output = plain(torch.ones(3, 4))
    output.sum().backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    model, optimizer = scaled.setup(model, momentum(model))
    scaled.backward(model(torch.ones(3, 4)).sum())
    assert torch.allclose(scaled.clip_gradients(model, optimizer, max_norm=0.5), expected)


def test_a_norm_that_is_not_finite_is_no_error_where_losses_are_scaled(scaled: Fabric) -> None:
    model = net()
    model, optimizer = scaled.setup(model, momentum(model))
    scaled.backward(model(torch.full((1, 4), math.inf)).sum())
    assert not scaled.clip_gradients(model, optimizer, max_norm=1.0).isfinite()
    with pytest.raises(RuntimeError, match="non-finite"):
        scaled.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)


def test_autocast_is_the_context_of_the_precision(scaled: Fabric, fabric: Fabric) -> None:
    left, right = torch.ones(2, 2), torch.ones(2, 2)
    with scaled.autocast():
        assert (left @ right).dtype is torch.bfloat16
    with fabric.autocast():
        assert (left @ right).dtype is torch.float32
    assert (left @ right).dtype is torch.float32


def test_a_strategy_with_a_backward_pass_of_its_own_is_watched_too() -> None:
    class Engine(Strategy):
        spec = StrategySpec("engine", "", supports=("cpu",))
        owns_backward = True

        def backward(self, loss: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
            asked.append(module)
            super().backward(loss, module, *args, **kwargs)

    asked: list[Any] = []
    fabric = Fabric(accelerator="cpu", strategy=Engine())
    model = fabric.setup(net())
    with pytest.raises(SetupError, match="'engine' has a backward pass of its own"):
        model(torch.ones(1, 4)).sum().backward()
    fabric.backward(model(torch.ones(1, 4)).sum(), model=model)
    fabric.backward(model(torch.ones(1, 4)).sum())
    assert asked == [unwrap(model), None]


# -- which loop a window follows -----------------------------------------------------------------------------------


def filled(fabric: Fabric, every: int, batches: Iterable[Any], **options: Any) -> str:
    """For each micro-batch, whether it filled its window: as told inside the block, and after it."""
    model = fabric.setup(nn.Linear(1, 1))
    told = ""
    for _ in batches:
        with fabric.accumulate(model, every=every, **options) as window:
            fabric.backward(model(torch.ones(1, 1)).sum())
            inside = window.is_full
        assert window.is_full == inside
        told += str(int(inside))
    return told


def loaders_of(fabric: Fabric, *lengths: int) -> list[Any]:
    return [fabric.setup_dataloaders(DataLoader(list(range(length)))) for length in lengths]


def test_a_window_says_the_same_of_a_batch_inside_of_its_block_and_after_it(fabric: Fabric) -> None:
    (loader,) = loaders_of(fabric, 9)
    assert filled(fabric, 4, loader) == "000100011"


def test_a_second_loader_that_is_read_from_within_the_loop_ends_in_its_own_time(fabric: Fabric) -> None:
    train, other = loaders_of(fabric, 10, 3)

    def both() -> Iterator[Any]:
        others = iter(other)
        for batch in train:
            try:
                yield batch, next(others)
            except StopIteration:
                others = iter(other)
                yield batch, next(others)

    assert filled(fabric, 4, both()) == "0001000101"


def test_of_two_loaders_read_at_a_time_the_one_that_ends_can_be_named(fabric: Fabric) -> None:
    assert filled(fabric, 2, zip(*loaders_of(fabric, 3, 10), strict=False)) == "011"
    long, short = loaders_of(fabric, 10, 3)
    assert filled(fabric, 2, zip(long, short, strict=False), loader=short) == "011"
