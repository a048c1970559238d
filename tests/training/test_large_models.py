"""Models of which a rank holds a share: created, loaded and saved without being whole anywhere."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import first_values
import pytest
import torch

from fabric_core.sharded.reading import read_checkpoint
from fabric_core.sharded.stored import plain

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "large_models.py"
LAYERS = 24
SLACK = 40
"""Megabytes that come and go while a layer is divided, read or written. A second half of the model would be 48 more."""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what a process holds"),
    pytest.mark.timeout(300),
]
WITH_ADAM = {"fsdp": 3, "deepspeed_stage_3": 5}
"""How many shares of the model's size a rank holds: weights and what Adam has; gradients and weights of DeepSpeed's."""
strategies = pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])


@functools.cache
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("large_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Measured = tuple[Path, Mapping[int, Mapping[str, float]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Measured]:
    """Two ranks load what a single process wrote, and three what the two have saved.

    The folder with ``whole.ckpt``, ``2`` and ``3``, and what each number of ranks needed.
    """

    @functools.cache
    def measure(strategy: str) -> Measured:
        folder = tmp_path_factory.mktemp(strategy)
        torch.manual_seed(3)
        benchmark().write(folder / "whole.ckpt", LAYERS, adam=False)
        sources = {2: folder / "whole.ckpt", 3: folder / "2"}
        return folder, {
            size: benchmark().measure(strategy, size, LAYERS, source, folder / str(size))
            for size, source in sources.items()
        }

    return measure


@pytest.mark.parametrize("size", [2, 3])
@strategies
def test_no_rank_ever_holds_more_than_its_share_and_a_layer(
    strategy: str, size: int, measured: Callable[[str], Measured]
) -> None:
    needed, layer = measured(strategy)[1][size], benchmark().LAYER
    share = LAYERS * layer / size
    for phase in ("create", "load", "save"):
        assert share < needed[phase] < share + layer + SLACK < LAYERS * layer, needed


@strategies
def test_with_an_optimizer_no_rank_holds_more_than_the_shares_of_both_bit_for_bit(
    strategy: str, tmp_path: Path
) -> None:
    write, measure, layer = (getattr(benchmark(), name) for name in ("write", "measure", "LAYER"))
    write(tmp_path / "whole.ckpt", LAYERS, adam=True)
    needed = measure(strategy, 2, LAYERS, tmp_path / "whole.ckpt", tmp_path / "2", adam=True)
    shares = WITH_ADAM[strategy] * LAYERS * layer / 2
    assert needed["create"] < shares + layer + SLACK, needed
    for phase in ("load", "save"):
        assert shares < needed[phase] < shares + layer + SLACK, needed
    expected, found = (
        torch.load(tmp_path / "whole.ckpt", mmap=True)["optimizer"],
        _read(tmp_path / "2")["optimizer"],
    )
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert all(torch.equal(found["state"][number][name], value) for name, value in state.items()), number


@pytest.mark.parametrize("size", [2, 3])
@strategies
def test_what_was_loaded_is_what_a_single_process_wrote_bit_for_bit(
    strategy: str, size: int, measured: Callable[[str], Measured]
) -> None:
    folder, _ = measured(strategy)
    expected = torch.load(folder / "whole.ckpt", mmap=True)["model"]
    found = _read(folder / str(size))["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("strategy", "size"), [("fsdp", 2), ("deepspeed_stage_3", 3)])
def test_first_values_are_those_of_a_single_process_bit_for_bit(
    strategy: str, size: int, tmp_path: Path, fabric_run: Callable[..., Any]
) -> None:
    flags = (f"--strategy={strategy}", f"--devices={size}", "--accelerator=cpu")
    fabric_run("first_values", *flags, tmp_path / "saved")
    found, expected = _read(tmp_path / "saved")["model"], first_values.make().state_dict()
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def _read(path: Path) -> Any:
    return plain(read_checkpoint(path, lambda file: torch.load(file, weights_only=True)))
