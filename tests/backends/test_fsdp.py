"""Fully sharded training on real processes, against a plain PyTorch loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_task import STEPS, batches, seeded, sgd
from torch import nn
from torch.nn.functional import mse_loss

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
"""

CASES = """
found = {
    "as one unit": train(),
    "in units by class": train(auto_wrap_policy={Block}),
    "in units by a function": train(auto_wrap_policy=lambda module: isinstance(module, nn.Linear)),
    "in units by size": train(min_parameters=20),
    "accumulating": train(auto_wrap_policy={Block}, every=4),
    "accumulating in one unit": train(every=4),
    "clipping": train(min_parameters=20, clip=(0.5, 2.0)),
    "clipping by the largest": train(min_parameters=20, clip=(0.1, float("inf"))),
    "clipping by p=1": train(min_parameters=20, clip=(2.0, 1.0)),
    "clipping by p=3": train(min_parameters=20, clip=(0.2, 3.0)),
    "recomputing units": train(auto_wrap_policy={Block}, activation_checkpointing=True),
    "recomputing classes": train(min_parameters=20, activation_checkpointing=[Block]),
    "on the CPU": train(strategy="fsdp_cpu_offload", auto_wrap_policy={Block}, every=4),
    "keeping what was gathered": train(auto_wrap_policy={Block}, reshard_after_forward=False, every=4),
    "dropping everything": train(auto_wrap_policy={Block}, reshard_after_forward=True),
    "on a node of many": train(strategy="fsdp_hybrid", auto_wrap_policy={Block}),
    "in as many replicas as ranks": train(shard_size=1, auto_wrap_policy={Block}, every=4, clip=(0.5, 2.0)),
    "on a mesh": train(device_mesh=MESH, min_parameters=20, every=4, clip=(0.5, 2.0)),
}
answer(found)
"""


def plain_loop(every: int = 1, clip: tuple[float, float] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """The training of all ranks on one process: plain PyTorch on the whole batch."""
    with torch.random.fork_rng():
        inputs, targets = (whole.split(8) for whole in batches())
        model = seeded()
    optimizer = sgd(model)
    norms: list[Any] = []
    for begin in range(0, STEPS, every):
        window = range(begin, min(begin + every, STEPS))
        for step in window:
            (mse_loss(model(inputs[step]), targets[step]) / len(window)).backward()
        if clip is not None:
            norms += [None] * (len(window) - 1)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip[0], clip[1]))
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict()), norms


LIKE: dict[str, dict[str, Any]] = {
    "accumulating": {"every": 4},
    "accumulating in one unit": {"every": 4},
    "clipping": {"clip": (0.5, 2.0)},
    "clipping by the largest": {"clip": (0.1, float("inf"))},
    "clipping by p=1": {"clip": (2.0, 1.0)},
    "clipping by p=3": {"clip": (0.2, 3.0)},
    "on the CPU": {"every": 4},
    "keeping what was gathered": {"every": 4},
    "in as many replicas as ranks": {"every": 4, "clip": (0.5, 2.0)},
    "on a mesh": {"every": 4, "clip": (0.5, 2.0)},
}


@pytest.fixture(scope="module", params=[1, 2, 4])
def trained(request: pytest.FixtureRequest, shared_programs: Any) -> list[dict[str, Any]]:
    mesh = {1: "(1,)", 2: "(1, 2)", 4: "(2, 2)"}[request.param]
    return shared_programs.answers_of(PROGRAM + CASES.replace("MESH", mesh), request.param, timeout=110)


CASE_NAMES = re.findall(r'^    "(.+?)": train', CASES, re.MULTILINE)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_training_equals_the_plain_loop_however_the_model_is_sharded(
    trained: list[dict[str, Any]], name: str
) -> None:
    expected, norms = plain_loop(**LIKE.get(name, {}))
    for rank, found in enumerate(trained):
        weights, own_norms = found[name]
        assert list(weights) == list(expected)
        for key, value in expected.items():
            assert (weights[key] - value).abs().max() <= 1e-6, (rank, key)
        for norm, own, first in zip(norms, own_norms, trained[0][name][1], strict=True):
            if norm is None:
                assert own is None
            else:
                assert type(own) is torch.Tensor
                assert own.shape == ()
                torch.testing.assert_close(own, norm, rtol=1e-5, atol=0)
                assert torch.equal(own, first)
