"""What may be said of DeepSpeed, what is refused before anything starts, and what is kept from waiting or compiling."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import (
    LaunchError,
    OptionsError,
    Registry,
    Request,
    UnsupportedError,
)
from fabric_core.resolve import resolve
from fabric_deepspeed import library
from fabric_deepspeed.config import combine, complete, read
from fabric_deepspeed.hooks import NAMES
from fabric_deepspeed.options import Options, options_from
from fabric_deepspeed.strategy import DeepSpeedStrategy


def plan(**flags: Any) -> Any:
    return resolve(Request(**{"accelerator": "cpu", "devices": 1, **flags}), Registry(environ={}))


def config_of(config: Any = None, dtype: torch.dtype = torch.float32, ranks: int = 2, **options: Any) -> Any:
    """The config of an engine, as the strategy makes it."""
    return complete(combine(read(config, {}), options_from(options)), dtype=dtype, world_size=ranks)


# -- names ------------------------------------------------------------------------------------------------------------

ON_CPU = [name for name in NAMES if not name.endswith("nvme")]


@pytest.mark.parametrize("name", ON_CPU)
def test_every_name_is_found_and_makes_its_stage(name: str) -> None:
    choice = plan(strategy=name).strategy
    strategy = DeepSpeedStrategy(**choice.options)
    assert strategy.stage == int(([*name.split("_"), "2"])[2] if "stage" in name else 2)
    offloads = strategy.config["zero_optimization"].get("offload_optimizer", {}).get("device")
    assert offloads == ("cpu" if "offload" in name else None)


def test_offloading_to_a_disk_is_for_gpus() -> None:
    with pytest.raises(
        UnsupportedError, match="deepspeed_stage_3_offload_nvme' cannot work with the accelerator 'cpu'"
    ):
        plan(strategy="deepspeed_stage_3_offload_nvme")
    with pytest.raises(OptionsError, match="needs nvme_path, a folder on a fast disk"):
        Options(stage=3, offload_optimizer=True, offload_optimizer_device="nvme")
    entries = {
        path: value
        for _, path, value in Options(
            stage=3,
            offload_optimizer=True,
            offload_optimizer_device="nvme",
            nvme_path="/fast",
            queue_depth=16,
        ).entries()
    }
    assert entries["zero_optimization", "offload_optimizer", "nvme_path"] == "/fast"
    assert entries["aio", "queue_depth"] == 16


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16"])
def test_float16_on_a_cpu_is_one_clear_error(precision: str) -> None:
    with pytest.raises(UnsupportedError, match="DeepSpeed does not train in float16 on a CPU"):
        plan(strategy="deepspeed_stage_1", precision=precision)


def test_a_precision_that_deepspeed_does_not_have_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'deepspeed' cannot work with the precision '64-true'"):
        plan(strategy="deepspeed", precision="64-true")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_its_precisions_are_its_own(precision: str) -> None:
    chosen = plan(strategy="deepspeed_stage_2", precision=precision).precision
    assert (chosen.distribution, chosen.name) == ("fabric-deepspeed", precision)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stagge": 2}, "Did you mean 'stage'"),
        ({"stage": 4}, "stage=4 has to be 0, 1, 2, 3"),
        ({"stage": True}, "has to be 0, 1, 2, 3"),
        ({"stage": "2"}, "has to be 0, 1, 2, 3"),
        ({"overlap_comm": 1}, "overlap_comm=1 has to be True or False"),
        ({"reduce_bucket_size": -5}, "a whole number from 1"),
        ({"reduce_bucket_size": 1.5}, "a whole number from 1"),
        ({"loss_scale": "big"}, "loss_scale='big' has to be a number"),
        ({"pin_memory": "yes"}, "True or False"),
        ({"offload_optimizer_device": "cpu"}, "needs offload_optimizer=True"),
        ({"offload_parameters": True, "stage": 2}, "needs stage=3"),
        ({"offload_optimizer": True, "stage": 0}, "needs a stage from 1"),
        ({"nvme_path": "/fast"}, "only used when something is offloaded to 'nvme'"),
        ({"checkpoint": "shardet"}, "Did you mean 'sharded'"),
        ({"logging_level": "LOUD"}, "a level of Python's logging"),
        ({"timeout": -1}, "a number of seconds above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        DeepSpeedStrategy(**options)


def test_options_become_entries_of_the_config() -> None:
    made = config_of(stage=3, reduce_bucket_size=5e7, param_persistence_threshold=10, gradient_clipping=0.5)
    zero = made["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (3, 50_000_000)
    assert zero["stage3_param_persistence_threshold"] == 10
    assert made["gradient_clipping"] == 0.5


# -- the config -------------------------------------------------------------------------------------------------------


def test_what_nobody_said_is_what_fabric_knows() -> None:
    made = config_of(ranks=4)
    assert made["gradient_clipping"] == 0.0, "DeepSpeed's own default would clip to a norm of 1"
    assert made["gradient_accumulation_steps"] == 1
    assert (made["train_micro_batch_size_per_gpu"], made["train_batch_size"]) == (1, 4)
    assert made["zero_optimization"]["stage"] == 2
    assert not made["bf16"]["enabled"]
    assert not made["fp16"]["enabled"]


def test_auto_is_filled_in() -> None:
    auto: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale_window": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    made = config_of(auto, torch.bfloat16)
    assert (made["train_batch_size"], made["gradient_clipping"]) == (2, 0.0)
    assert made["bf16"]["enabled"]
    assert not made["fp16"]["enabled"]
    assert "auto" not in json.dumps(made)
    assert auto["train_batch_size"] == "auto", "the user's dictionary is left alone"


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"zero_optimisation": {}}, {}, "no entry 'zero_optimisation'. Did you mean 'zero_optimization'"),
        ({"amp": {"enabled": True}}, {}, "cannot be used here. Say precision='16-mixed'"),
        (
            {"zero_optimization": {"stage": 1}},
            {"stage": 2},
            "The option stage is 2, and DeepSpeed's config says",
        ),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled = True, and the precision computes in float32"),
        ({"gradient_accumulation_steps": 4}, {}, r"with fabric.accumulate\(model, every=4\)"),
        ({"train_batch_size": 7}, {}, "train_batch_size = 7, which is not a whole number per rank"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, {}, "not 3 per rank"),
        ({"optimizer": {"type": "auto"}}, {}, "optimizer.type = 'auto', which Fabric does not know"),
        (7, {}, "a dictionary or the path of a JSON file"),
    ],
)
def test_contradictions_are_errors_and_nothing_wins_in_silence(
    config: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionsError, match=message):
        config_of(config, **options)


def test_a_config_may_be_a_file_named_in_code_or_by_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    for found in (read(str(path), {}), read(path, {}), read(None, {"FABRIC_DEEPSPEED_CONFIG": str(path)})):
        assert found["zero_optimization"]["stage"] == 3
    assert read({}, {"FABRIC_DEEPSPEED_CONFIG": str(path)}) == {}, "what is said in code comes first"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is no JSON"), ("[1]", "holds no dictionary")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionsError, match=f"zero.json.*{message}"):
        read(path, {})


# -- what is compiled at first use ------------------------------------------------------------------------------------


class Builder:
    """Stands for a builder of DeepSpeed's, whose build takes minutes."""

    name = "cpu_adam"
    error_log = "no compiler"

    def __init__(self, compatible: bool) -> None:
        self.is_compatible = lambda verbose: compatible


class Engine:
    """As much of the module ``deepspeed`` as is asked."""

    def __init__(self, compatible: bool = True) -> None:
        self.builder = Builder(compatible)

    def get_accelerator(self) -> Any:
        return self

    def create_op_builder(self, name: str) -> Builder:
        return self.builder


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which PyTorch would build."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return folder


def test_a_build_is_announced_before_it_begins(extensions: Path) -> None:
    with pytest.warns(UserWarning, match="compiles 'cpu_adam' for this machine now.*DS_BUILD_CPU_ADAM=1"):
        library.announce_build(Engine(), "CPUAdamBuilder")


def test_what_is_built_already_is_not_announced(extensions: Path) -> None:
    (extensions / "cpu_adam.so").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.announce_build(Engine(), "CPUAdamBuilder")


def test_what_cannot_be_built_is_an_error_at_once(extensions: Path) -> None:
    with pytest.raises(UnsupportedError, match="'cpu_adam' cannot be compiled here: no compiler"):
        library.announce_build(Engine(compatible=False), "CPUAdamBuilder")


def test_the_lock_of_a_killed_build_is_an_error_and_no_endless_wait(extensions: Path) -> None:
    lock = extensions / "lock"
    lock.touch()
    past = time.time() - 2 * library.STALE
    for path in (lock, extensions):
        os.utime(path, (past, past))
    with pytest.raises(LaunchError, match="has left its lock.*Delete that file"):
        library.announce_build(Engine(), "CPUAdamBuilder")


def test_the_lock_of_a_build_that_runs_is_waited_for(extensions: Path) -> None:
    past = time.time() - 2 * library.STALE
    (extensions / "lock").touch()
    os.utime(extensions / "lock", (past, past))
    (extensions / "cpu_adam.o").touch()
    library.check_lock(extensions)
