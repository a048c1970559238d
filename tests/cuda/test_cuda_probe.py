"""The probe from end to end, and what it asks of another process, with a PyTorch and a driver that pretend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import DevicesError, Fabric, Registry, Request
from fabric_core.resolve import resolve
from fabric_cuda import BitsandbytesPrecision, find_usable_devices
from fabric_cuda.accelerators import probes, usable, visible

FIRST, SECOND, THIRD = "GPU-11111111-aaaa", "GPU-22222222-bbbb", "GPU-11119999-cccc"

PYTORCH = """
from types import SimpleNamespace

UUIDS = ["11111111-aaaa", "22222222-bbbb"]

def empty(size, device):
    if device == "cuda:1":
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\\nand more")

cuda = SimpleNamespace(
    device_count=lambda: len(UUIDS),
    get_device_properties=lambda index: SimpleNamespace(uuid=UUIDS[index]),
    synchronize=lambda index: None,
)
"""


@pytest.fixture
def built_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the installed PyTorch say that it is built for such devices."""
    monkeypatch.setattr(probes, "current_type", lambda: "cuda")


@pytest.fixture
def other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are asked find a PyTorch that pretends to have two devices, of which one is in use."""
    (tmp_path / "torch.py").write_text(PYTORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(visible, "library", lambda: None)
    monkeypatch.setattr(usable, "library", lambda: None)
    for name in (*visible.HIDING, visible.ORDER):
        monkeypatch.delenv(name, raising=False)
    visible._through_process.cache_clear()


def plan(**flags: Any) -> Any:
    return resolve(Request(**flags), Registry(environ={}))


@pytest.mark.usefixtures("built_for_it", "management")
def test_what_the_library_lists_is_found_and_chosen_by_any_name() -> None:
    found = probes.cuda()
    assert (found.indices, found.note) == ((0, 1, 2), "3 device(s)")
    assert found.names == {FIRST: 0, SECOND: 1, THIRD: 2}
    for name in ("auto", "gpu", "cuda", "rocm", "hip"):
        chosen = plan(accelerator=name, devices=[SECOND])
        assert (chosen.accelerator.name, chosen.devices) == ("cuda", (1,))
    lost = dict(plan(accelerator="gpu").accelerator.lost)
    assert lost["torch_accelerator"] == "has a lower priority", "it must not compete for the same card"
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("built_for_it", "management")
def test_a_uuid_means_the_index_that_is_left_by_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"2,{FIRST}")
    assert plan(accelerator="cuda", devices="GPU-11111").devices == (1,)
    assert plan(accelerator="cuda", devices=-1).devices == (0, 1)
    with pytest.raises(DevicesError, match=f"no device named 'gpu-2222'.*There are: {FIRST}, {THIRD}"):
        plan(accelerator="cuda", devices="GPU-2222")


@pytest.mark.usefixtures("built_for_it", "management")
def test_when_all_are_hidden_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DevicesError, match=r"finds no device: CUDA_VISIBLE_DEVICES='' may hide it"):
        plan(accelerator="cuda")
    assert plan().accelerator.name == "cpu"
    with pytest.raises(DevicesError, match="found no device"):
        find_usable_devices(1)


@pytest.mark.usefixtures("built_for_it", "other_process")
def test_without_the_library_another_process_lists_and_tries_the_devices() -> None:
    found = probes.cuda()
    assert found.names == {FIRST: 0, SECOND: 1}
    assert find_usable_devices() == find_usable_devices(1) == [0]
    with pytest.raises(
        DevicesError, match=r"device 1: CUDA-capable device\(s\) is/are busy or unavailable\. "
    ):
        find_usable_devices(2)
    visible._through_process.cache_clear()


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_a_quantised_model_goes_through_the_verbs_and_a_checkpoint(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="not run: bitsandbytes is not installed")
    inputs = torch.randn(4, 32)

    def set_up(seed: int) -> tuple[Fabric, Any]:
        torch.manual_seed(seed)
        fabric = Fabric(accelerator="cpu", devices=1, precision=BitsandbytesPrecision(mode))
        return fabric, fabric.setup_module(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)))

    fabric, model = set_up(1)
    with torch.no_grad():
        before = model(inputs)
    fabric.save(tmp_path / "checkpoint", {"model": model})
    fabric, other = set_up(2)
    fabric.load(tmp_path / "checkpoint", {"model": other})
    with torch.no_grad():
        assert torch.equal(other(inputs), before)
