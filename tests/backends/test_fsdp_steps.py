"""Single steps of sharded training, and its life, on two real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_task import batches, seeded, sgd
from torch.nn.functional import mse_loss

from fabric_backends.strategies.fsdp import FSDPStrategy
from fabric_core import Fabric
from fabric_core.errors import OptionsError

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
import copy, gc, io, math, pickle, warnings, weakref

BLOCKS = {{"auto_wrap_policy": {{Block}}}}
INPUTS, TARGETS = batches(2)
found = {{}}

def share(step):
    begin = 8 * step + 4 * rank
    return INPUTS[begin : begin + 4], TARGETS[begin : begin + 4]

def started(strategy="fsdp", precision="32-true", how=sgd, **options):
    fabric = Fabric(
        accelerator="cpu",
        strategy=strategy,
        precision=precision,
        strategy_options={{**BLOCKS, **options}},
        precision_options={{"scaler": {{"init_scale": 256.0}}}} if precision == "16-mixed" else {{}},  # low enough
    )
    model = seeded()
    return fabric, *fabric.setup(model, how(model))

def loss_of(model, step):
    inputs, targets = share(step)
    return mse_loss(model(inputs), targets)

def gradients(optimizer):
    return [None if p.grad is None else whole(p.grad) for group in optimizer.param_groups for p in group["params"]]
"""

STEPPING = """
for label, options in (("plain", {}), ("replicas", {"shard_size": 1}), ("half", {"precision": "bf16-mixed"})):
    # Held back, and then synchronised with the next.
    fabric, model, optimizer = started(**options)
    with fabric.no_backward_sync(model):
        fabric.backward(loss_of(model, 0))
    held = gradients(optimizer)
    fabric.backward(loss_of(model, 1))
    found[f"held, {label}"] = held, gradients(optimizer)

    # Dropped while they are held back.
    optimizer.zero_grad()
    with fabric.no_backward_sync(model):
        fabric.backward(loss_of(model, 0))
    optimizer.zero_grad()
    fabric.backward(loss_of(model, 1))
    found[f"dropped, {label}"] = gradients(optimizer)

    # Scaled while some are held back, and others are there already; a look at the model in between changes nothing.
    with fabric.no_backward_sync(model):
        fabric.backward(loss_of(model, 0))
    with torch.no_grad():
        model(INPUTS)
    fabric.strategy.scale_gradients(model.module, 3.0)
    with fabric.no_backward_sync(model, enabled=False):
        fabric.backward(loss_of(model, 0))
    found[f"scaled, {label}"] = gradients(optimizer)
    fabric.close()

# What was gathered before a step is not taken for current after it.
fabric, model, optimizer = started()
fabric.backward(loss_of(model, 0))
with torch.no_grad():
    model(INPUTS)
optimizer.step()
with torch.no_grad():
    found["after a step"] = model(INPUTS).clone()
found["weights after a step"] = whole(model.state_dict())
other = seeded(1).state_dict()
model(INPUTS)
fabric.strategy.load_module_state_dict(model.module, other)
with torch.no_grad():
    found["after loading"] = model(INPUTS).clone()

# Clipping.
optimizer.zero_grad()
fabric.backward(loss_of(model, 0))
fabric.clip_gradients(model, optimizer, clip_val=0.01)
found["clipped by value"] = gradients(optimizer)
optimizer.zero_grad()
found["nothing to clip"] = fabric.clip_gradients(model, optimizer, max_norm=1.0)
found["norm type"] = error_of(fabric.clip_gradients, model, optimizer, max_norm=1.0, norm_type=-1)
fabric.backward(loss_of(model, 0))
parameter = optimizer.param_groups[0]["params"][0]
if rank == 1:
    parameter.grad.to_local().view(-1)[0] = math.nan
found["not finite"] = error_of(fabric.clip_gradients, model, optimizer, max_norm=1.0)
found["not finite, allowed"] = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
fabric.close()

# An infinity in one rank's shard, with a scaled loss: every rank skips, and every scale is lowered.
def skipping(strategy="fsdp", how=sgd, **options):
    fabric, model, optimizer = started(strategy, "16-mixed", how, **options)
    states = []
    for step in range(3):
        fabric.backward(loss_of(model, step % 2))
        if step == 1 and rank == 1:
            optimizer.param_groups[0]["params"][0].grad.to_local().view(-1)[0] = math.inf
        optimizer.step()
        optimizer.zero_grad()
        states.append((whole(model.state_dict()), fabric._parts.precision.state_dict()["scale"]))
    fabric.close()
    return states

found["skipped"] = skipping()
found["skipped by a fused one"] = skipping(how=lambda model: torch.optim.AdamW(model.parameters(), fused=True))
found["skipped on the CPU"] = skipping("fsdp_cpu_offload")
fabric, model, optimizer = started(precision="16-mixed")
found["unscaled"] = error_of(loss_of(model, 0).backward)
optimizer.zero_grad()
fabric.close()
answer(found)
"""


@pytest.fixture(scope="module")
def stepping(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(PROGRAM + STEPPING, timeout=110)


def seeded_weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        return dict(seeded().state_dict())


def plain_gradients(*steps: int, factor: float = 1.0, precision: str = "plain") -> list[torch.Tensor]:
    with torch.random.fork_rng():
        inputs, targets = (whole.split(4) for whole in batches(2))
        model = seeded()
    for step in steps:
        for part in (2 * step, 2 * step + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "half"):
                output = model(inputs[part])
            (factor * mse_loss(output.float(), targets[part]) / 2).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("label", ["plain", "replicas", "half"])
def test_gradients_that_are_held_back_are_summed_scaled_and_dropped(
    stepping: list[dict[str, Any]], label: str
) -> None:
    most = 5e-2 if label == "half" else 1e-6  # bfloat16 has eight bits

    def check(own: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
        assert len(own) == len(plain)
        for one, other in zip(own, plain, strict=True):
            assert one.dtype is torch.float32
            assert (one - other).abs().max() <= most * max(1, other.abs().max())

    for found in stepping:
        held, summed = found[f"held, {label}"]
        assert held == [None] * len(summed)
        check(summed, plain_gradients(0, 1, precision=label))
        check(found[f"dropped, {label}"], plain_gradients(1, precision=label))
        expected = [
            3 * (one + other)
            for one, other in zip(
                plain_gradients(1, precision=label), plain_gradients(0, precision=label), strict=True
            )
        ]
        once = plain_gradients(0, precision=label)
        check(found[f"scaled, {label}"], [a + b for a, b in zip(expected, once, strict=True)])


def test_what_was_gathered_is_gathered_anew_after_the_shards_have_changed(
    stepping: list[dict[str, Any]],
) -> None:
    with torch.random.fork_rng():
        inputs, targets = batches(2)
        model, other = seeded(), seeded(1)
    optimizer = sgd(model)
    mse_loss(model(inputs[:8]), targets[:8]).backward()
    optimizer.step()
    for found in stepping:
        assert (found["after a step"] - model(inputs)).abs().max() <= 1e-5
        assert torch.equal(found["after loading"], other(inputs))


def test_gradients_are_clipped_by_value(stepping: list[dict[str, Any]]) -> None:
    for found in stepping:
        largest = max(gradient.abs().max() for gradient in found["clipped by value"])
        assert largest == torch.tensor(0.01)
        assert found["nothing to clip"] == 0


def test_a_norm_that_is_not_finite_is_an_error_on_every_rank(stepping: list[dict[str, Any]]) -> None:
    for found in stepping:
        name, message = found["not finite"]
        assert name == "RuntimeError"
        assert "nan" in message
        assert found["not finite, allowed"].isnan()
        name, message = found["norm type"]
        assert name == "ConfigurationError"
        assert "norm_type=-1" in message


@pytest.mark.parametrize("name", ["skipped", "skipped by a fused one", "skipped on the CPU"])
def test_an_infinity_on_one_rank_skips_the_step_on_every_rank(
    stepping: list[dict[str, Any]], name: str
) -> None:
    first = stepping[0][name]
    for found in stepping:
        (before, scale), (skipped, lowered), (after, _) = found[name]
        for key in before:
            assert torch.equal(skipped[key], before[key]), key
            assert torch.equal(after[key], first[2][0][key]), key
        assert not torch.equal(after["last.weight"], before["last.weight"])
        assert not torch.equal(before["last.weight"], seeded_weights()["last.weight"])
        assert lowered == scale / 2
        assert all(value.isfinite().all() for value in after.values())


def test_a_backward_pass_without_the_scale_is_refused(stepping: list[dict[str, Any]]) -> None:
    for found in stepping:
        name, message = found["unscaled"]
        assert name == "SetupError"
        assert "fabric.backward(loss)" in message


FACES = """
fabric, model, optimizer = started()
found["classes"] = isinstance(model, Net), type(model).__name__, isinstance(model.module, Net)
found["keys"] = list(model.state_dict()) == list(seeded().state_dict())
found["attributes"] = model.count(), model.module.calls
found["copied"] = error_of(copy.deepcopy, model)
found["copied inside"] = error_of(copy.deepcopy, model.module.blocks[0])
found["pickled"] = error_of(pickle.dumps, model)
found["saved"] = error_of(torch.save, model, io.BytesIO())
found["again"] = error_of(fabric.setup, model.module)
with fabric_for() as second:
    found["by another"] = error_of(second.setup, model.module)
    found["scalar"] = error_of(second.setup, type("Scaled", (nn.Linear,), {"__init__": lambda self: (
        nn.Linear.__init__(self, 2, 2), setattr(self, "scale", nn.Parameter(torch.tensor(1.0))))[0]})())
    found["a list"] = error_of(second.setup, nn.ModuleList([nn.Linear(2, 2)]))

found["bypassing"] = error_of(model.twice, share(0)[0])
model.mark_forward_method("twice")
found["marked"] = model.twice(share(0)[0]).detach(), model(share(0)[0]).detach()
found["output"] = model(share(0)[0]).dtype

alive = weakref.ref(model.module)
fabric.close()
found["after closing"] = error_of(model, share(0)[0])
found["group"] = dist.is_initialized()
del model, optimizer
gc.collect()
found["alive"] = alive() is not None

# Half precision: who sees which numbers.
class Watching(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.last = Block(), nn.Linear(6, 2)
    def forward(self, x, mask=None):
        seen.append(("model", x.dtype, self.last.weight.dtype))
        look = lambda module, args: seen.append(("unit", args[0].dtype, module.up.weight.dtype))
        self.block.register_forward_pre_hook(look)
        return self.last(self.block(x))
for precision in ("bf16-mixed", "16-mixed", "bf16-true", "64-true"):
    with fabric_for(precision=precision, **BLOCKS) as fabric:
        seen = []
        model = fabric.setup(Watching())
        out = model(torch.randn(4, 6))
        fabric.backward(out.sum())
        shard = next(model.parameters())
        found[precision] = seen[:2], out.dtype, shard.dtype, shard.grad.dtype
policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
with fabric_for(mixed_precision=policy, **BLOCKS) as fabric:
    seen = []
    found["a policy"] = fabric.setup(Watching())(torch.randn(4, 6)).dtype, seen[0]

found["threads"] = threads()
for _ in range(2):
    fabric, model, optimizer = started(shard_size=1)
    with fabric:
        fabric.backward(loss_of(model, 0))
        optimizer.step()
        fabric.save("somewhere", {"model": model, "optimizer": optimizer})
    del model, optimizer
found["threads afterwards"] = threads()
answer(found)
fabric = fabric_for()  # never to be closed
model = fabric.setup(seeded())
fabric.backward(model(share(0)[0]).sum())
"""


@pytest.fixture(scope="module")
def faces(shared_programs: Any) -> list[dict[str, Any]]:
    return shared_programs.answers_of(PROGRAM + FACES, timeout=110)


def test_a_sharded_model_is_still_the_users(faces: list[dict[str, Any]]) -> None:
    for found in faces:
        assert found["classes"][0] is found["classes"][2] is True
        assert found["classes"][1] == "FabricFSDPNet"
        assert found["keys"] is True
        assert found["attributes"] == (1, 1)


@pytest.mark.parametrize("how", ["copied", "copied inside", "pickled", "saved"])
def test_a_sharded_model_cannot_be_copied_or_pickled_and_says_so(
    faces: list[dict[str, Any]], how: str
) -> None:
    for found in faces:
        name, message = found[how]
        assert name == "SetupError"
        assert ("This Block" if how == "copied inside" else "This Net") in message
        assert "fabric.save()" in message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("again", "set up before"),
        ("by another", "sharded already"),
        ("scalar", "'scale' has no dimension to divide"),
        ("a list", "never called itself"),
    ],
)
def test_what_cannot_be_sharded_is_refused(faces: list[dict[str, Any]], what: str, words: str) -> None:
    for found in faces:
        name, message = found[what]
        assert name == "SetupError"
        assert words in message


def test_methods_go_through_forward_once_they_are_marked(faces: list[dict[str, Any]]) -> None:
    for found in faces:
        name, message = found["bypassing"]
        assert name == "SetupError"
        assert "mark_forward_method('twice')" in message
        assert torch.equal(*found["marked"])


def test_each_precision_means_what_its_name_says(faces: list[dict[str, Any]]) -> None:
    half, double, single = torch.bfloat16, torch.float64, torch.float32
    for found in faces:
        assert found["bf16-mixed"] == (
            [("model", single, single), ("unit", half, half)],
            single,
            single,
            single,
        )
        in_half = [("model", single, single), ("unit", torch.float16, torch.float16)]
        assert found["16-mixed"] == (in_half, single, single, single)
        assert found["bf16-true"] == ([("model", half, half), ("unit", half, half)], single, half, half)
        assert found["64-true"] == (
            [("model", double, double), ("unit", double, double)],
            double,
            double,
            double,
        )
        assert found["a policy"] == (double, ("model", half, half))


def test_nothing_is_left_when_it_is_closed(faces: list[dict[str, Any]]) -> None:
    for found in faces:
        assert found["group"] is False
        assert found["alive"] is False
        assert found["threads afterwards"] <= found["threads"]
        name, message = found["after closing"]
        assert name == "SetupError"
        assert "closed" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"auto_wrap_policy": "big"}, "auto_wrap_policy is 'big'"),
        ({"auto_wrap_policy": [3]}, "a set of module classes"),
        ({"min_parameters": 0}, "from 1"),
        ({"activation_checkpointing": 3}, "activation_checkpointing is 3"),
        ({"mixed_precision": "bf16"}, "set precision= instead"),
        ({"device_mesh": (1, 2, 3)}, "(replicas, shards)"),
        ({"device_mesh": (2,), "shard_size": 2}, "Keep one of them"),
        ({"shard_size": "rack"}, "'node'"),
        ({"checkpoint": "shards"}, "Did you mean 'sharded'?"),
        ({"reshard_after_forward": "never"}, "reshard_after_forward is 'never'"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionsError) as caught:
        FSDPStrategy(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "equation"),
    [
        ({"device_mesh": (2, 2)}, "replicate(2) * shard(2) != WORLD_SIZE(3)"),
        ({"shard_size": 2}, "replicate(1) * shard(2) != WORLD_SIZE(3)"),
    ],
)
def test_a_mesh_that_does_not_fit_the_job_is_refused(options: dict[str, Any], equation: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Fabric(accelerator="cpu", strategy="fsdp", devices=3, strategy_options=options)
    assert equation in str(caught.value)
