"""The device of PyTorch: whatever it computes is what the CPU computes, and nothing is left where it should not be."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_core import BrokenPluginError, DevicesError, Fabric, UnsupportedError
from fabric_cpuaccel.accelerator import CPUAccel, DeviceTensor
from fabric_cpuaccel.hooks import REFUSED


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The second of two devices, current."""
    monkeypatch.setenv("CPUACCEL_DEVICES", "2")
    accelerator = CPUAccel()
    accelerator.setup_device(accelerator.device(1))
    return torch.device("cpuaccel", 1)


def model() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 1)
    )
    layers[4].bias = layers[0].bias
    return layers


def train(module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device | str) -> list[float]:
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        loss = checkpoint(module, torch.randn(16, 4).to(device), use_reentrant=False).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_training_is_that_of_the_cpu_to_the_last_bit(device: torch.device) -> None:
    trained = {}
    for where in (device, "cpu"):
        module = model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        parameters = list(module.parameters())
        module.to(where)
        assert all(map(lambda old, new: old is new, parameters, module.parameters())), (
            "the optimizer has lost them"
        )
        assert module[0].bias is module[4].bias, "tied weights came apart"
        losses = train(module, optimizer, where)
        assert {tensor.device for tensor in module.state_dict().values()} == {torch.device(where)}
        trained[where] = losses, {name: value.cpu() for name, value in module.state_dict().items()}
    mine, theirs = trained.values()
    assert mine[0] == theirs[0]
    assert all(torch.equal(mine[1][name], value) for name, value in theirs[1].items())


def test_tensors_are_made_on_the_device_that_is_named_or_current(device: torch.device) -> None:
    assert torch.zeros(2, device="cpuaccel").device == device
    assert torch.zeros(2, device="cpuaccel:0").device == torch.device("cpuaccel", 0)
    with device:
        made = [
            torch.tensor([1.0]),
            torch.arange(3),
            torch.eye(2),
            torch.rand(2),
            torch.tril_indices(2, 2),
            nn.Linear(2, 2).weight,
        ]
    assert {tensor.device for tensor in made} == {device}
    assert [tuple(tensor.shape) for tensor in made] == [(1,), (3,), (2, 2), (2,), (2, 3), (2, 2)]
    assert made[1].tolist() == [0, 1, 2]
    assert f"{made[0].sum():.2f} {made[1]}" == "1.00 tensor([0, 1, 2])"


def test_a_tensor_that_was_not_moved_is_told(device: torch.device) -> None:
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=device)
    for wrong in (
        lambda: here + there,
        lambda: nn.Linear(2, 2)(there),
        lambda: there @ there.to("cpuaccel:0"),
    ):
        with pytest.raises(RuntimeError, match="needs all tensors on one device, not on cpu"):
            wrong()
    assert (there + torch.tensor(1.0)).device == device
    assert torch.equal(there[torch.tensor([0])].cpu(), here[:1])
    assert torch.equal(there.copy_(2 * here).cpu(), 2 * here)


def test_what_changes_in_place_changes_its_memory_and_its_form(device: torch.device) -> None:
    tensor = torch.arange(6.0, device=device)
    tensor.unsqueeze_(0).add_(1)
    assert tensor.shape == (1, 6)
    view = tensor.view(2, 3)
    view.t_()[0].zero_()
    assert view.cpu().tolist() == [[0, 0], [2, 5], [3, 6]]
    assert tensor.tolist() == [[0, 2, 3, 0, 5, 6]]
    parameter = nn.Parameter(torch.ones(2, device=device))
    parameter.data = torch.zeros(3, device=device)
    assert (parameter + 1).tolist() == [1, 1, 1]


def test_copies_and_files_keep_values_and_device(device: torch.device) -> None:
    module = model().to(device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other[0].weight, DeviceTensor)
        assert other[0].weight.device == device
        assert other[0].weight.requires_grad
        assert torch.equal(other[0].weight.cpu(), module[0].weight.cpu())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    for where in (None, "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=where, weights_only=True)
        assert loaded["0.weight"].device == torch.device(where or device)
        assert torch.equal(loaded["0.weight"].cpu(), module[0].weight.cpu())


def test_a_process_may_be_forked_after_its_use(device: torch.device) -> None:
    with Fabric(accelerator="cpuaccel", devices=2, strategy="ddp_fork") as fabric:
        torch.ones(1, device=device)
        assert sorted(fabric.launch(where)) == ["cpuaccel:0", "cpuaccel:1"]


def where(fabric: Fabric) -> list[str]:
    """The devices of all ranks, as tensors that were made on the kind of device alone say."""
    fabric.barrier()  # the ranks join at their first verb
    own = torch.full((1,), float(fabric.global_rank), device="cpuaccel")
    assert own.device == fabric.device
    return [f"cpuaccel:{int(rank)}" for rank in fabric.all_gather(own)]


def test_what_cannot_work_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(**flags: Any) -> Fabric:
        return Fabric(accelerator="cpuaccel", **flags)

    for name in REFUSED:
        with pytest.raises(UnsupportedError, match=f"'{name}' needs a device that is built into PyTorch"):
            asked(devices=2, strategy=name)
    with pytest.raises(DevicesError, match="3 devices were asked for, but 'cpuaccel' has 2 here: 0, 1"):
        asked(devices=3)
    with (
        asked(devices=1, precision="bf16-mixed") as fabric,
        pytest.raises(UnsupportedError, match="mixed precision"),
    ):
        fabric.launch()
        fabric.setup_module(nn.Linear(1, 1))
    monkeypatch.delenv("CPUACCEL_DEVICES")
    with pytest.raises(DevicesError, match="no such device here: CPUACCEL_DEVICES=0"):
        asked(devices=1)
    monkeypatch.setenv("CPUACCEL_DEVICES", "two")
    for accelerator in ("cpuaccel", "auto"):
        with pytest.raises(
            BrokenPluginError, match="CPUACCEL_DEVICES has to be a number of devices, such as 2, and is 'two'"
        ):
            Fabric(accelerator=accelerator, devices=1)
