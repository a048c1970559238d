"""Trains under DeepSpeed in many ways, each beside a plain PyTorch loop, and writes down how far apart they ended.

``deepspeed_checks.py answer.pt shared-folder``: every check runs on each rank, one after the other in the same
processes, because importing DeepSpeed is what takes time. The tests read what each of them found.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from fabric_core import Fabric
from fabric_core.sharded.manifest import as_text
from fabric_core.sharded.writing import sum_of

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
FOLDER = Path()
BATCH = 8  # over all ranks
CHECKS: dict[str, Callable[[], Any]] = {}
NUMBERS = itertools.count()
STAGES = {
    "stage 0": {"strategy_options": {"stage": 0}, "strategy": "deepspeed"},
    "stage 1": {"strategy": "deepspeed_stage_1"},
    "stage 2": {"strategy": "deepspeed_stage_2"},
    "stage 3": {"strategy": "deepspeed_stage_3"},
}
OFFLOADED = {
    "stage 1 offload": {"strategy": "deepspeed_stage_1_offload"},
    "stage 2 offload": {"strategy": "deepspeed_stage_2_offload"},
    "stage 3 offload": {"strategy": "deepspeed_stage_3_offload"},
}
ALL = {**STAGES, **OFFLOADED}

Parameters = dict[str, torch.Tensor]


def on(ways: dict[str, dict[str, Any]]) -> Callable[[Any], Any]:
    """Register a check once for each of some ways to train; it gets a function that opens a ``Fabric``."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, flags in ways.items():

            def run(flags: dict[str, Any] = flags) -> Any:
                def opened(**more: Any) -> Fabric:
                    options = {**flags.get("strategy_options", {}), **more.pop("strategy_options", {})}
                    return Fabric(
                        **{
                            "accelerator": "cpu",
                            "precision": "32-true",
                            **flags,
                            **more,
                            "strategy_options": options,
                        }
                    )

                return function(opened)

            CHECKS[f"{function.__name__}: {name}"] = run
        return function

    return register


class Net(nn.Module):
    def __init__(self, inputs: int = 5, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 7)
        self.last = nn.Linear(7, outputs)
        self.register_buffer("offset", torch.full((outputs,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x))) + self.offset


def net(seed: int = 1, *sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(*sizes)


def batches(count: int, seed: int = 0, width: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, width, generator=made), torch.randn(BATCH, 3, generator=made))
        for _ in range(count)
    ]


def mine(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[RANK::WORLD]


def parameters_of(fabric: Fabric, model: nn.Module) -> Parameters:
    """All of them, wherever they are kept: what a checkpoint of the model holds."""
    path = FOLDER / f"parameters-{WORLD}-{next(NUMBERS)}"
    fabric.save(path, {"model": model})
    return {key: value.clone() for key, value in fabric.load(path)["model"].items()}


def distance(one: Parameters, other: Any) -> float:
    other = other.state_dict() if isinstance(other, nn.Module) else other
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str] | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# -- gradients --------------------------------------------------------------------------------------------------------


@on(ALL)
def nothing_is_clipped_unasked(opened: Any) -> float:
    plain = net()
    optimizer = sgd(plain, 0.001)
    for inputs, targets in batches(4):
        (100 * mse_loss(plain(inputs), targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw, 0.001))
        for inputs, targets in batches(4):
            fabric.backward(100 * mse_loss(model(mine(inputs)), mine(targets)))
            optimizer.step()
            optimizer.zero_grad()
        return distance(parameters_of(fabric, model), plain)


@on(ALL)
def several_losses_before_a_step(opened: Any) -> float:
    """One after the other, and both forward passes first; with gradients that are dropped in between."""
    plain = net()
    optimizer = sgd(plain)
    pairs = batches(12)
    for number in range(0, 12, 3):
        losses = [mse_loss(plain(inputs), targets) for inputs, targets in pairs[number + 1 : number + 3]]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))

        def loss_of(number: int) -> torch.Tensor:
            inputs, targets = pairs[number]
            return mse_loss(model(mine(inputs)), mine(targets))

        for number in range(0, 12, 3):
            fabric.backward(loss_of(number))
            optimizer.zero_grad()  # the first is thrown away
            if number % 2:
                fabric.backward(loss_of(number + 1))
                fabric.backward(loss_of(number + 2))
            else:
                first, second = loss_of(number + 1), loss_of(number + 2)
                fabric.backward(first)
                fabric.backward(second)
            optimizer.step()
            optimizer.zero_grad()
        return distance(parameters_of(fabric, model), plain)


@on(ALL)
def a_short_last_window(opened: Any) -> float:
    plain = net()
    optimizer = sgd(plain)
    pairs = batches(5)
    for window in (pairs[:3], pairs[3:]):
        for inputs, targets in window:
            (mse_loss(plain(inputs), targets) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))
        data = [(mine(inputs), mine(targets)) for inputs, targets in pairs]
        loader = fabric.setup_dataloaders(
            torch.utils.data.DataLoader(data, batch_size=None), use_distributed_sampler=False
        )
        for inputs, targets in loader:
            with fabric.accumulate(model, every=3):
                fabric.backward(mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        return distance(parameters_of(fabric, model), plain)


@on(ALL)
def norms_and_clipping(opened: Any) -> dict[str, float]:
    """The norm that is returned, over all ranks, for several orders; and what a step with it makes of the weights."""
    found: dict[str, float] = {}
    for order in (2.0, 1.0, float("inf")):
        plain = net()
        optimizer = sgd(plain)
        norms = []
        for inputs, targets in batches(3):
            mse_loss(plain(inputs), targets).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05, order))
            optimizer.step()
            optimizer.zero_grad()
        with opened() as fabric:
            raw = net()
            model, optimizer = fabric.setup(raw, sgd(raw))
            for (inputs, targets), norm in zip(batches(3), norms, strict=True):
                fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
                got = fabric.clip_gradients(model, optimizer, max_norm=0.05, norm_type=order)
                assert got.shape == ()
                assert type(got) is torch.Tensor
                found[f"norm {order}"] = max(found.get(f"norm {order}", 0.0), float((got - norm).abs()))
                optimizer.step()
                optimizer.zero_grad()
            found[f"clipped {order}"] = distance(parameters_of(fabric, model), plain)
    return found


@on(ALL)
def a_norm_that_is_not_finite(opened: Any) -> Any:
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))
        inputs, targets = batches(1)[0]
        fabric.backward(mse_loss(model(mine(inputs)), mine(targets)) * float("inf"))
        raised = error_of(fabric.clip_gradients, model, optimizer, max_norm=1.0)
        norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.zero_grad()
        fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
        return raised, norm.item(), fabric.clip_gradients(model, optimizer, max_norm=1.0).item()


@on(STAGES)
def some_parameters_are_frozen(opened: Any) -> float:
    def frozen() -> Net:
        made = net()
        made.first.weight.requires_grad_(False)
        return made

    plain = frozen()
    optimizer = sgd(plain)
    for inputs, targets in batches(3):
        mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with opened() as fabric:
        raw = frozen()
        model, optimizer = fabric.setup(raw, sgd(raw))
        for inputs, targets in batches(3):
            fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
            optimizer.step()
            optimizer.zero_grad()
        return distance(parameters_of(fabric, model), plain)


# -- several models, several optimizers -------------------------------------------------------------------------------


@on(ALL)
def two_models_that_play_against_each_other(opened: Any) -> float:
    """A GAN. The generator's loss runs through the discriminator, and adds to its gradients, as it does in PyTorch."""

    def play(generator: Any, discriminator: Any, opt_g: Any, opt_d: Any, backward: Any, share: Any) -> None:
        for drops, (noise, real) in enumerate(batches(4)):
            noise, real = share(noise), share(real)
            backward(-discriminator(real).mean(), discriminator)  # before the generator's: it has to survive
            fake = generator(noise)
            backward(-discriminator(fake).mean(), generator)
            opt_g.step()
            opt_g.zero_grad()
            if drops % 2:
                opt_d.zero_grad()
            backward(discriminator(fake.detach()).pow(2).mean(), discriminator)
            opt_d.step()
            opt_d.zero_grad()

    plain_g, plain_d = net(1), net(2, 3, 3)
    play(plain_g, plain_d, sgd(plain_g), sgd(plain_d), lambda loss, _: loss.backward(), lambda x: x)
    with opened() as fabric:
        raw_g, raw_d = net(1), net(2, 3, 3)
        generator, opt_g = fabric.setup(raw_g, sgd(raw_g))
        discriminator, opt_d = fabric.setup(raw_d, sgd(raw_d))
        play(
            generator,
            discriminator,
            opt_g,
            opt_d,
            lambda loss, model: fabric.backward(loss, model=model),
            mine,
        )
        return max(
            distance(parameters_of(fabric, generator), plain_g),
            distance(parameters_of(fabric, discriminator), plain_d),
        )


@on(STAGES)
def a_loss_through_two_models_needs_to_be_told_whose(opened: Any) -> Any:
    with opened() as fabric:
        raw_g, raw_d = net(1), net(2, 3, 3)
        generator, opt_g = fabric.setup(raw_g, sgd(raw_g))
        discriminator, _ = fabric.setup(raw_d, sgd(raw_d))
        noise, _ = batches(1)[0]
        told = error_of(fabric.backward, discriminator(generator(mine(noise))).mean())
        untold = error_of(fabric.backward, generator(mine(noise)).mean())
        opt_g.step()
        return told, untold


@on(STAGES)
def optimizers_of_one_model_step_together(opened: Any) -> Any:
    with opened() as fabric:
        raw = net()
        model, one, other = fabric.setup(
            raw,
            torch.optim.SGD(raw.first.parameters(), lr=0.1),
            torch.optim.Adam(raw.last.parameters(), lr=0.1),
        )
        inputs, targets = batches(1)[0]
        fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
        one.step()
        half = error_of(lambda: fabric.backward(mse_loss(model(mine(inputs)), mine(targets))))
        return half, isinstance(one, torch.optim.SGD), isinstance(other, torch.optim.Adam)


@on(STAGES)
def learning_rates_take_effect(opened: Any) -> float:
    """Schedulers made before and after setup, and a rate that the loop writes, with two optimizers and groups."""

    def optimizers_of(model: Net) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        groups = [{"params": [model.first.weight]}, {"params": [model.first.bias], "lr": 0.3}]
        return torch.optim.SGD(groups, lr=0.1), torch.optim.Adam(model.last.parameters(), lr=0.01)

    def train(model: Any, one: Any, other: Any, backward: Any, share: Any, scheduler: Any) -> None:
        late = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
        for number, (inputs, targets) in enumerate(batches(6)):
            backward(mse_loss(model(share(inputs)), share(targets)))
            for optimizer in (one, other):
                optimizer.step()
            for optimizer in (one, other):
                optimizer.zero_grad()
            scheduler.step()
            late.step()
            if number == 3:
                one.param_groups[1]["lr"] = 0.02

    plain = net()
    one, other = optimizers_of(plain)
    early = torch.optim.lr_scheduler.ExponentialLR(one, 0.7)
    train(plain, one, other, lambda loss: loss.backward(), lambda x: x, early)
    with opened() as fabric:
        raw = net()
        one, other = optimizers_of(raw)
        early = torch.optim.lr_scheduler.ExponentialLR(one, 0.7)
        model, one, other = fabric.setup(raw, one, other)
        train(model, one, other, fabric.backward, mine, early)
        return distance(parameters_of(fabric, model), plain)


@on(STAGES)
def optimizer_and_scheduler_from_the_config(opened: Any) -> Any:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 4},
        },
    }
    with opened(strategy_options={"config": config}) as fabric:
        raw = net()
        model, optimizer, scheduler = fabric.setup(raw)
        rates = []
        for inputs, targets in batches(6):
            fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        moved = distance(parameters_of(fabric, model), net())
        return isinstance(optimizer, torch.optim.Optimizer), rates, moved


# -- number formats ---------------------------------------------------------------------------------------------------


@on({name: {**flags, "precision": "bf16-mixed"} for name, flags in ALL.items()})
def bfloat16_keeps_float32_weights(opened: Any) -> tuple[float, float]:
    """Compared with a loop that computes with a bfloat16 copy, per rank, and updates float32 weights."""
    master, working = net(), net().to(torch.bfloat16)
    working.offset = net().offset
    optimizer = sgd(master)
    for inputs, targets in batches(8):
        for share in range(WORLD):
            output = working(inputs[share::WORLD].bfloat16())
            (mse_loss(output.float(), targets[share::WORLD]) / WORLD).backward()
        for one, other in zip(master.parameters(), working.parameters(), strict=True):
            one.grad, other.grad = other.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for one, other in zip(master.parameters(), working.parameters(), strict=True):
                other.copy_(one)
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))
        for inputs, targets in batches(8):
            output = model(mine(inputs))
            assert output.dtype is torch.float32
            fabric.backward(mse_loss(output, mine(targets)))
            optimizer.step()
            optimizer.zero_grad()
        found = parameters_of(fabric, model)
        rounded = {name: value.bfloat16() for name, value in found.items()}
        assert all(value.dtype is torch.float32 for value in found.values())
        return distance(found, master), distance(found, rounded)


# -- models that are not trained, and models that are created in parts ------------------------------------------------


@on(STAGES)
def models_for_inference(opened: Any) -> float:
    with opened() as fabric:
        raw = net().requires_grad_(False)
        model = fabric.setup_module(raw)
        inputs, _ = batches(1)[0]
        with torch.no_grad():
            off = (model(inputs) - net()(inputs)).abs().max().item()
        return max(off, distance(parameters_of(fabric, model), net()))


@on(STAGES)
def models_created_in_parts(opened: Any) -> Any:
    plain = net()
    optimizer = sgd(plain)
    for inputs, targets in batches(3):
        mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    with opened() as fabric:
        torch.manual_seed(1)
        with fabric.init_module():
            raw = Net()
        sizes = [parameter.numel() for parameter in raw.parameters()]
        model, optimizer = fabric.setup(raw, sgd(raw))
        path = FOLDER / "raw.pt"
        if RANK == 0:
            torch.save(net().state_dict(), path)
        fabric.barrier()
        fabric.load_raw(path, model)
        for inputs, targets in batches(3):
            fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
            optimizer.step()
            optimizer.zero_grad()
        return distance(parameters_of(fabric, model), plain), sizes


class Outer(nn.Module):
    """Does something to its inner module, which is divided by then."""

    def __init__(self, do: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        do(self.inner)


@on({"stage 3": STAGES["stage 3"]})
def models_that_change_what_is_divided(opened: Any) -> Any:
    def give_other_data(inner: nn.Linear) -> None:
        inner.weight.data = torch.ones(4, 4)

    def create(do: Callable[[nn.Linear], Any], **options: Any) -> None:
        with opened() as fabric, fabric.init_module(**options):
            Outer(do)

    return (
        error_of(create, lambda inner: nn.init.orthogonal_(inner.weight), empty_init=True),
        error_of(create, lambda inner: nn.init.dirac_(inner.weight)),
        error_of(create, give_other_data),
    )


# -- checkpoints ------------------------------------------------------------------------------------------------------


def continued(begin: int, end: int, state: dict[str, Any], backward: Any, share: Any) -> None:
    model, optimizer, scheduler = (state[name] for name in ("model", "optimizer", "scheduler"))
    for inputs, targets in batches(6)[begin:end]:
        backward(mse_loss(model(share(inputs)), share(targets)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["steps"] += 1


def fresh(fabric: Fabric | None, seed: int = 1) -> dict[str, Any]:
    raw = net(seed)
    optimizer: Any = torch.optim.Adam(raw.parameters(), lr=0.05)
    model: Any = raw
    if fabric is not None:
        model, optimizer = fabric.setup(raw, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "steps": 0, "note": ["a", 1]}


def reference() -> Net:
    state = fresh(None)
    continued(0, 6, state, lambda loss: loss.backward(), lambda x: x)
    return state["model"]


@on(ALL)
def everything_is_saved_and_goes_on(opened: Any) -> Any:
    where = FOLDER / f"middle-{WORLD}-{next(NUMBERS)}"
    with opened() as fabric:
        state = fresh(fabric)
        continued(0, 3, state, fabric.backward, mine)
        fabric.save(where, state)
    with opened() as fabric:
        state = fresh(fabric, seed=5)
        rest = fabric.load(where, state)
        assert state["steps"] == 3
        assert state["scheduler"].last_epoch == 3
        assert not {key for key in rest if not key.startswith("__")}, rest
        continued(3, 6, state, fabric.backward, mine)
        again = distance(parameters_of(fabric, state["model"]), reference())
        whole = fabric.load(where)
    return again, sorted(whole), {name: value.dtype for name, value in whole["model"].items()}


@on(ALL)
def a_checkpoint_for_others(opened: Any) -> None:
    """Written here, to be read by a job of another size."""
    with opened() as fabric:
        state = fresh(fabric)
        continued(0, 3, state, fabric.backward, mine)
        name = f"{fabric.plan.strategy.name}-{fabric.strategy.stage}-{WORLD}"
        fabric.save(FOLDER / "others" / name, state)


@on({**ALL, "a plain process": {"strategy": "single_device"}})
def a_checkpoint_of_others(opened: Any) -> float | None:
    """Each of those that a job of two processes has written goes on here, at another stage, too."""
    written = sorted((FOLDER / "others").glob("*-2"))
    if WORLD == 2:
        return None
    assert len(written) == len(ALL), written
    far = 0.0
    for path in written:
        with opened() as fabric:
            state = fresh(fabric, seed=7)
            fabric.load(path, state)
            continued(3, 6, state, fabric.backward, mine)
            found = state["model"].state_dict() if fabric.plan.strategy.name == "single_device" else None
            far = max(far, distance(found or parameters_of(fabric, state["model"]), reference()))
    return far


@on(STAGES)
def files_of_other_strategies_are_read(opened: Any) -> float:
    """A checkpoint that a plain process has written, and one in one file that DeepSpeed has written for it."""
    plain = fresh(None)
    continued(0, 3, plain, lambda loss: loss.backward(), lambda x: x)
    path, full = FOLDER / "plain.pt", FOLDER / f"full-{WORLD}-{next(NUMBERS)}.pt"
    if RANK == 0:
        plain_state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in plain.items()}
        torch.save(plain_state, path)
    with opened(strategy_options={"checkpoint": "full"}) as fabric:
        fabric.barrier()
        state = fresh(fabric, seed=7)
        fabric.load(path, state)
        fabric.save(full, state)
        saved = torch.load(full, weights_only=True)
        assert saved["optimizer"]["state"][0]["exp_avg"].shape == (7, 5)
        continued(3, 6, state, fabric.backward, mine)
        off = distance(parameters_of(fabric, state["model"]), reference())
    return max(off, distance(saved["model"], plain["model"]))


@on(STAGES)
def what_does_not_fit_is_refused(opened: Any) -> Any:
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))
        path = FOLDER / f"unfit-{WORLD}-{next(NUMBERS)}"
        fabric.save(path, {"model": model})
        state = net(1, 4).state_dict()
        if RANK == 0:
            torch.save(state, FOLDER / "unfit.pt")
        fabric.barrier()
        found = [error_of(fabric.load_raw, FOLDER / "unfit.pt", model)]
        found.append(error_of(fabric.load, path, {"model": model, "optimizer": optimizer}))
        fabric.barrier()
        if RANK == 0 and path.is_dir():
            torch.save({"model": Harmful()}, path / "values.pt")
            manifest = path / "fabric.json"
            content = json.loads(manifest.read_text())
            size, checksum = sum_of(path / "values.pt")
            content["files"]["values.pt"] = {"size": size, "crc32": checksum}
            del content["checksum"]
            manifest.write_text(as_text(content))
        fabric.barrier()
        found.append(error_of(fabric.load, path, {"model": model}) if path.is_dir() else None)
        return [*found, "HARMED" in os.environ]


class Harmful:
    """Executes code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.putenv, ("HARMED", "yes")


@on(ALL)
def gradients_are_complete_once_they_are_clipped(opened: Any) -> Any:
    with opened() as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, sgd(raw))
        inputs, targets = batches(1)[0]
        fabric.backward(mse_loss(model(mine(inputs)), mine(targets)))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        return error_of(lambda: fabric.backward(mse_loss(model(mine(inputs)), mine(targets))))


@on(STAGES)
def holding_back_gradients_warns_once(opened: Any) -> list[str]:
    with opened() as fabric:
        raw = net()
        model, _ = fabric.setup(raw, sgd(raw))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                with fabric.no_backward_sync(model):
                    pass
        return [str(warning.message) for warning in caught]


def main() -> None:
    global FOLDER
    answer, folder, *wanted = sys.argv[1:]
    FOLDER = Path(folder)
    FOLDER.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("error")
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            found[name] = check()
        except Exception as error:
            found[name] = "".join(traceback.format_exception(error))
        if RANK == 0:
            torch.save(found, answer)


if __name__ == "__main__":
    main()
