"""What is planned for XLA devices: on machines that are made up here, with and without torch_xla."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabric_core import Detection, Fabric, Registry, Request, requirements
from fabric_core.errors import DevicesError, MissingRequirementError, UnsupportedError
from fabric_core.resolve import resolve
from fabric_xla import probes
from fabric_xla.hooks import STRATEGIES

Plan = Callable[..., Any]


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put chips into the machine, by their numbers; among them always one device that is no TPU."""
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    monkeypatch.delenv("CPU_NUM_DEVICES", raising=False)
    monkeypatch.setattr(probes, "PCI_DEVICES", tmp_path)

    def put(*chips: str) -> None:
        for number, (vendor, device) in enumerate(
            [("0x8086", "0x0063"), *(("0x1ae0", chip) for chip in chips)]
        ):
            folder = tmp_path / f"0000:00:{number:02}.0"
            folder.mkdir()
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "device").write_text(f"{device}\n")

    return put


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch_xla be there, as far as plans are concerned."""
    real = requirements.installed_version
    monkeypatch.setattr(
        requirements, "installed_version", lambda name: "2.9.0" if name == "torch_xla" else real(name)
    )


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch_xla be absent."""
    real = requirements.installed_version
    monkeypatch.setattr(
        requirements, "installed_version", lambda name: None if name == "torch_xla" else real(name)
    )


def plan(**flags: Any) -> Any:
    return resolve(Request(**flags), Registry(environ={}))


# -- without torch_xla -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("missing")
def test_asking_for_a_tpu_says_what_to_install() -> None:
    with pytest.raises(MissingRequirementError, match=r"'?tpu.* needs torch_xla\[tpu\]>=2\.7") as told:
        Fabric(accelerator="tpu")
    assert "pip install 'torch_xla[tpu]>=2.7'" in str(told.value)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", [name for spec in STRATEGIES for name in spec.names])
def test_asking_for_a_strategy_says_what_to_install(name: str) -> None:
    with pytest.raises(
        MissingRequirementError, match=r"needs torch_xla\[tpu\]>=2\.7, which is not installed"
    ):
        Fabric(strategy=name, devices=1)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", ["xla", "xla_fork", "xla_spawn", "xla_file"])
def test_asking_for_any_other_part_says_what_to_install(name: str) -> None:
    with pytest.raises(MissingRequirementError, match=r"needs torch_xla\[tpu\]>=2\.7"):
        Fabric(accelerator="cpu", plugins=name)


@pytest.mark.usefixtures("missing")
def test_everything_else_goes_on_working(bus: Callable[..., None]) -> None:
    bus("0x0063")
    found = Fabric().plan
    assert found.accelerator.name != "tpu"
    assert dict(found.accelerator.lost)["tpu"] == "needs torch_xla[tpu]>=2.7"


# -- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chips", "count"),
    [((), 0), (("0x0063",) * 4, 4), (("0x005e",), 1), (("0x0027",) * 4, 8), (("0x9999",), 0)],
)
def test_tpus_are_counted_on_the_bus(bus: Callable[..., None], chips: tuple[str, ...], count: int) -> None:
    bus(*chips)
    assert probes.devices().indices == tuple(range(count))
    assert not probes.devices().only_by_name


@pytest.mark.parametrize(
    ("variables", "indices", "note"),
    [
        ({"PJRT_DEVICE": "CPU"}, (0,), "PJRT_DEVICE=CPU, 1 device(s)"),
        ({"PJRT_DEVICE": "cpu", "CPU_NUM_DEVICES": "3"}, (0, 1, 2), "PJRT_DEVICE=CPU, 3 device(s)"),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "0"}, (), "CPU_NUM_DEVICES=0 is no number of devices"),
        ({"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "x"}, (), "CPU_NUM_DEVICES=x is no number of devices"),
        ({"PJRT_DEVICE": "TPU"}, (), "PJRT_DEVICE=TPU, but this machine has no TPU"),
        ({"PJRT_DEVICE": "CUDA"}, (), "PJRT_DEVICE=CUDA, and TPU and CPU are what is supported"),
        ({}, (), "this machine has no TPU, and PJRT_DEVICE is not set"),
    ],
)
def test_the_variable_says_which_devices_are_meant(
    bus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    indices: tuple[int, ...],
    note: str,
) -> None:
    bus()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert probes.devices().indices == indices
    assert probes.devices().note == note


@pytest.mark.usefixtures("installed")
def test_a_tpu_that_is_not_there_is_told_of(bus: Callable[..., None]) -> None:
    bus()
    with pytest.raises(DevicesError, match="this machine has no TPU, and PJRT_DEVICE is not set"):
        plan(accelerator="tpu")


@pytest.mark.parametrize(
    ("variables", "detected"),
    [
        ({}, None),
        ({"PJRT_LOCAL_PROCESS_COUNT": "4"}, None),
        ({"PJRT_LOCAL_PROCESS_RANK": "0", "PJRT_LOCAL_PROCESS_COUNT": "4"}, (4, 1)),
        (
            {
                "PJRT_LOCAL_PROCESS_RANK": "1",
                "PJRT_LOCAL_PROCESS_COUNT": "2",
                "TPU_PROCESS_ADDRESSES": "a:1,a:2,b:1,b:2",
            },
            (2, 2),
        ),
        ({"PJRT_LOCAL_PROCESS_RANK": "0", "PJRT_LOCAL_PROCESS_COUNT": "?"}, (None, None)),
    ],
)
def test_processes_of_torch_xla_are_recognised_by_their_variables(
    variables: dict[str, str], detected: Any
) -> None:
    found = probes.detect(variables)
    if detected is None:
        assert found is None
    else:
        assert found == Detection(*detected, "PJRT_LOCAL_PROCESS_RANK is set")


# -- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("flags", "strategy", "launcher"),
    [
        ({"devices": 1}, "xla", None),
        ({"devices": [2]}, "xla", None),
        ({}, "xla", "xla_fork"),
        ({"num_nodes": 2}, "xla", "xla_fork"),
        ({"interactive": True}, "xla", "xla_fork"),
        ({"strategy": "tpu_spawn"}, "xla", "xla_fork"),
        ({"plugins": ("xla_spawn",)}, "xla", "xla_spawn"),
        ({"strategy": "single_tpu"}, "single_xla", None),
        ({"strategy": "xla_fsdp"}, "xla_fsdp", "xla_fork"),
        ({"strategy": "xla_spmd"}, "xla_spmd", None),
        ({"strategy": "xla_spmd_fsdp"}, "xla_spmd_fsdp", None),
    ],
)
def test_a_tpu_gets_the_strategy_that_fits(
    bus: Callable[..., None], flags: dict[str, Any], strategy: str, launcher: str | None
) -> None:
    bus(*["0x0063"] * 4)
    found = plan(accelerator="tpu", **flags)
    assert found.strategy.name == strategy
    assert (found.launcher and found.launcher.name) == launcher
    assert found.warnings == ()


@pytest.mark.usefixtures("installed")
def test_auto_takes_a_tpu_but_not_the_cpu_in_its_place(
    bus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bus("0x0063")
    assert plan().accelerator.name == "tpu"
    assert plan(accelerator="xla").accelerator.name == "tpu"
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert plan().accelerator.name != "tpu"
    assert plan(accelerator="xla").accelerator.name == "tpu"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", ["32-true", 32, "bf16-mixed", "bf16", "bf16-true", "16-true"])
def test_precisions_are_those_made_for_xla(bus: Callable[..., None], precision: Any) -> None:
    bus("0x0063")
    for strategy in ("xla", "xla_spmd"):
        found = plan(accelerator="tpu", strategy=strategy, precision=precision)
        assert found.precision.distribution == "fabric-xla"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("chips", "variables", "flags", "message"),
    [
        (
            1,
            {},
            {"accelerator": "cpu", "strategy": "xla"},
            "'xla' computes on XLA devices, and the accelerator is 'cpu'",
        ),
        (1, {}, {"strategy": "ddp"}, "'ddp' does not know XLA devices"),
        (
            1,
            {},
            {"strategy": "single_device"},
            "Strategies that do: xla, single_xla, xla_fsdp, xla_spmd, xla_spmd_fsdp",
        ),
        (4, {}, {"devices": 2}, "for every one of the 4 devices, or for one; devices=2 were asked for"),
        (
            4,
            {},
            {"devices": 2, "strategy": "xla_spmd"},
            "makes one mesh of all 4 devices, and 2 were asked for",
        ),
        (
            4,
            {},
            {"num_nodes": 2, "strategy": "xla_spmd"},
            "drives the devices of one machine, and num_nodes=2",
        ),
        (
            0,
            {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"},
            {},
            "can use one device of it, and 4 were asked for",
        ),
        (1, {}, {"precision": "16-mixed"}, "'xla' cannot work with the precision '16-mixed'"),
        (1, {}, {"precision": "64-true"}, "'xla' cannot work with the precision '64-true'"),
        (
            1,
            {},
            {"precision": "bf16-true", "strategy": "xla_fsdp"},
            "'xla_fsdp' cannot work with the precision 'bf16-true'",
        ),
    ],
)
def test_what_cannot_work_is_one_clear_error(
    bus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    chips: int,
    variables: dict[str, str],
    flags: dict[str, Any],
    message: str,
) -> None:
    bus(*["0x0063"] * chips)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=message):
        plan(**{"accelerator": "tpu", **flags})


@pytest.mark.usefixtures("installed")
def test_chips_that_are_two_devices_are_driven_by_one_program(bus: Callable[..., None]) -> None:
    bus(*["0x0027"] * 4)
    with pytest.raises(UnsupportedError, match="Each chip of this TPU is 2 devices.*'xla_spmd'"):
        plan(accelerator="tpu")
    assert plan(accelerator="tpu", devices=1).strategy.name == "xla"
    assert len(plan(accelerator="tpu", strategy="xla_spmd").devices) == 8
