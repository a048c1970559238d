"""Which devices there are, how they are called and which are free, with a management library that pretends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fabric_core import DevicesError, Inventory, Registry, Request
from fabric_core.resolve import resolve
from fabric_cuda import CUDAAccelerator, find_usable_devices
from fabric_cuda.accelerators import asking, nvml, probes, statistics, usable, visible

FIRST, SECOND, THIRD = "GPU-11111111-aaaa", "GPU-22222222-bbbb", "GPU-11119999-cccc"


def test_absent_hardware_is_an_answer_and_not_an_exception() -> None:
    if torch.cuda.is_available():
        pytest.skip("not run: this machine has the hardware")
    found = probes.cuda()
    assert not found.available
    assert found.note


def test_the_probe_imports_no_pytorch_where_nothing_suggests_a_device(python: Callable[..., str]) -> None:
    printed = python(
        "import sys, fabric_cuda.accelerators.probes as p; print(p.cuda().note); print('torch' in sys.modules)"
    )
    note, imported = printed.splitlines()
    if "nothing here suggests" in note:
        assert imported == "False"


def test_asking_for_it_by_any_name_without_hardware_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("not run: this machine has the hardware")
    for name in ("cuda", "rocm", "hip", "gpu"):
        with pytest.raises(DevicesError, match="no such device"):
            resolve(Request(accelerator=name), Registry(environ={}))
    assert resolve(Request(), Registry(environ={})).accelerator.name == "cpu"


def with_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the probe find devices, as if the installed PyTorch were built for them."""
    found = Inventory(
        tuple(range(count)), names=dict(zip((FIRST, SECOND, THIRD), range(count), strict=False))
    )
    monkeypatch.setattr(probes, "cuda", lambda: found)
    monkeypatch.setattr(usable, "cuda", lambda: found)


def plan(**flags: Any) -> Any:
    return resolve(Request(**flags), Registry(environ={}))


def test_auto_and_gpu_take_it_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 3)
    for name in ("auto", "gpu", "cuda"):
        found = plan(accelerator=name)
        assert (found.accelerator.name, found.devices, found.strategy.name) == ("cuda", (0, 1, 2), "ddp")


@pytest.mark.parametrize(
    ("devices", "indices"),
    [
        (2, (0, 1)),
        (-1, (0, 1, 2)),
        ("1, 2", (1, 2)),
        ([2], (2,)),
        (SECOND, (1,)),
        ("gpu-2222", (1,)),
        (f"{THIRD},{FIRST}", (2, 0)),
        ([0, SECOND], (0, 1)),
    ],
)
def test_devices_are_chosen_by_count_index_and_uuid(
    monkeypatch: pytest.MonkeyPatch, devices: Any, indices: tuple[int, ...]
) -> None:
    with_devices(monkeypatch, 3)
    assert plan(accelerator="cuda", devices=devices).devices == indices


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (4, "4 devices were asked for"),
        ([3], "no device 3 here"),
        ("GPU-1111", "2 devices whose name begins with"),
        ("GPU-33", "no device named"),
        ([0, FIRST], "twice"),
    ],
)
def test_devices_that_are_not_there_are_an_error(
    monkeypatch: pytest.MonkeyPatch, devices: Any, message: str
) -> None:
    with_devices(monkeypatch, 3)
    with pytest.raises(DevicesError, match=message):
        plan(accelerator="cuda", devices=devices)


# -- what the management library and the variables say ---------------------------------------------------------------


@pytest.mark.usefixtures("management")
def test_the_library_names_devices_along_the_bus_and_starts_none() -> None:
    assert visible.uuids() == (FIRST, SECOND, THIRD)
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("management")
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("0,1,2", (FIRST, SECOND, THIRD)),
        ("2,0", (THIRD, FIRST)),
        (" 1 ", (SECOND,)),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", (FIRST,)),
        ("0,9,1", (FIRST,)),
        ("0,0", ()),
        ("GPU-2222", (SECOND,)),
        ("GPU-1111", ()),
        (f"{THIRD},0", (THIRD, FIRST)),
        ("none", ()),
    ],
)
def test_the_variable_that_hides_devices_means_what_cuda_says(
    monkeypatch: pytest.MonkeyPatch, value: str, seen: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible.uuids() == seen


@pytest.mark.usefixtures("management")
def test_divided_devices_are_asked_for_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(code: str, question: Any = None) -> Any:
        asked.append(code)
        return ["aaaa-bbbb"]

    visible._through_process.cache_clear()
    monkeypatch.setattr(visible, "ask", answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert visible.uuids() == ("MIG-aaaa-bbbb",)
    assert visible.uuids() == ("MIG-aaaa-bbbb",)
    assert len(asked) == 1, "once, as long as the variables stay"
    visible._through_process.cache_clear()


def test_without_a_library_there_is_no_answer_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "LIBRARY", "libnothing-of-that-name.so.1")
    nvml._opened.cache_clear()
    assert nvml.library() is None
    nvml._opened.cache_clear()


@pytest.mark.usefixtures("management")
def test_a_question_that_a_device_does_not_answer_is_an_error_of_its_own() -> None:
    library = nvml.library()
    assert library is not None
    with pytest.raises(nvml.NVMLError, match="nvmlDeviceGetPowerUsage answered with the error 3"):
        library.power(FIRST)
    with pytest.raises(nvml.NVMLError, match="error 6"):
        library.name("GPU-of another machine")
    assert not library.is_divided(FIRST)


@pytest.mark.usefixtures("management")
def test_statistics_leave_out_what_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"allocated_bytes.all.current": 7})
    found = statistics.device_stats(torch.device("cuda", 1))
    assert found == {
        "allocated_bytes": 7,
        "reserved_bytes": 0,
        "peak_allocated_bytes": 0,
        "peak_reserved_bytes": 0,
        "free_bytes": 500,
        "total_bytes": 1000,
        "compute_percent": 70,
        "memory_percent": 30,
        "temperature_celsius": 55,
    }


# -- finding free ones -----------------------------------------------------------------------------------------------


def trying(monkeypatch: pytest.MonkeyPatch, broken: dict[int, str]) -> list[list[int]]:
    """Let devices be tried in a process that pretends: these fail, all others work."""
    orders: list[list[int]] = []

    def answer(code: str, question: Any) -> Any:
        indices, wanted = json.loads(json.dumps(question))
        orders.append(indices)
        good = [index for index in indices if index not in broken]
        return good[: wanted if wanted > 0 else None], [[i, broken[i]] for i in indices if i in broken]

    monkeypatch.setattr(usable, "ask", answer)
    return orders


@pytest.mark.usefixtures("management")
def test_free_devices_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 3)
    orders = trying(monkeypatch, {})
    assert find_usable_devices(2) == [1, 2]
    assert orders == [[2, 1, 0]], (
        "the one with most free memory, and last of all the one where a process computes"
    )
    assert find_usable_devices() == [0, 1, 2]


@pytest.mark.usefixtures("management")
def test_devices_that_cannot_be_used_are_named_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 3)
    trying(monkeypatch, {1: "in exclusive use", 2: "out of memory"})
    assert find_usable_devices(1) == [0]
    with pytest.raises(
        DevicesError, match=r"of 3 there are 1\. device 1: in exclusive use; device 2: out of memory"
    ):
        find_usable_devices(2)


@pytest.mark.parametrize("number", [0, -2, "two", 1.5, True, None])
def test_a_number_of_usable_devices_that_makes_no_sense_is_an_error(number: Any) -> None:
    with pytest.raises(DevicesError, match="a number from 1, or -1"):
        find_usable_devices(number)


def test_more_usable_devices_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 1)
    with pytest.raises(DevicesError, match=r"sees 1 device"):
        find_usable_devices(2)
    with_devices(monkeypatch, 0)
    with pytest.raises(DevicesError, match="found no device"):
        find_usable_devices(1)


def test_a_process_that_is_asked_answers_fails_or_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = asking.ask(
        "import json, sys; print('noise'); print(json.dumps([1, json.loads(sys.argv[1])]))", {"a": 2}
    )
    assert answer == [1, {"a": 2}]
    with pytest.raises(RuntimeError, match="failed: ValueError: no driver"):
        asking.ask("raise ValueError('no driver')")
    monkeypatch.setattr(asking, "PATIENCE", 0.2)
    with pytest.raises(RuntimeError, match="did not answer"):
        asking.ask("import time; time.sleep(30)")


# -- the accelerator itself ------------------------------------------------------------------------------------------


def test_devices_are_numbered_along_the_bus_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    CUDAAccelerator()
    assert visible.os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert CUDAAccelerator().device(1) == torch.device("cuda", 1)
    assert visible.os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


class Pretended:
    """What `setup_device` asks of a device; it is one with matrix units for TF32."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended 100")
        monkeypatch.setattr(CUDAAccelerator, "_advised", False)
        for name in ("RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)


def advice(caplog: pytest.LogCaptureFixture, times: int = 2) -> int:
    caplog.clear()
    for _ in range(times):
        CUDAAccelerator().setup_device(torch.device("cuda", 0))
    return caplog.text.count("set_float32_matmul_precision")


def test_tf32_is_advised_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Pretended(monkeypatch)
    assert advice(caplog) == 1


def test_tf32_is_not_advised_without_matrix_units_or_on_other_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Pretended(monkeypatch, (7, 5))
    assert advice(caplog) == 0
    Pretended(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    assert advice(caplog) == 0


def test_tf32_is_not_advised_to_who_has_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Pretended(monkeypatch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert advice(caplog) == 0
    finally:
        torch.set_float32_matmul_precision(before)


def test_collectives_have_less_time_than_elsewhere() -> None:
    accelerator = CUDAAccelerator()
    assert (accelerator.process_group_backend, accelerator.process_group_timeout) == ("nccl", 100.0)
    assert accelerator.binds_process_group


def test_teardown_before_anything_was_used_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("touched"))
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        CUDAAccelerator().teardown()
        CUDAAccelerator().teardown()
