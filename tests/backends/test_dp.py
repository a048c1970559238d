"""Data parallel in one process: what there is of it on the CPU, and what its threads need elsewhere."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from fabric_backends.precisions.mixed import MixedPrecision
from fabric_backends.strategies.dp import DataParallelStrategy, _InPrecision
from fabric_core import Fabric, Registry, Request
from fabric_core.contracts.strategy import Surroundings
from fabric_core.errors import UnsupportedError
from fabric_core.parts.cpu import CPUAccelerator
from fabric_core.parts.local import LocalEnvironment
from fabric_core.parts.torch_file import TorchFile
from fabric_core.resolve import resolve


def net() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 6, generator=generator), torch.randn(64, 3, generator=generator))


@pytest.mark.parametrize("devices", [1, 2])
def test_on_the_cpu_it_is_one_replica_with_the_numbers_of_a_plain_loop(devices: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fabric = Fabric(accelerator="cpu", strategy="dp", devices=devices)
        fabric.launch()
        raw = net()
        model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.1, momentum=0.9))
        other = fabric.setup_module(nn.Linear(2, 2))
    assert [
        "'dp' copies a model to accelerators, and here is none" in str(one.message) for one in caught
    ] == [True]
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=8))
    assert len(loader) == 8  # nothing is split
    assert fabric.all_reduce(torch.tensor(3.0), reduce_op="sum").item() == 3.0
    assert fabric.all_gather(torch.ones(2)).shape == (1, 2)
    assert other(torch.ones(1, 2)).shape == (1, 2)
    for inputs, targets in loader:
        with fabric.accumulate(model, every=3):
            fabric.backward(mse_loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    fabric.close()

    plain = net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    batches = list(DataLoader(data(), batch_size=8))
    for window in (batches[:3], batches[3:6], batches[6:]):
        for inputs, targets in window:
            (mse_loss(plain(inputs), targets) / len(window)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:The strategy 'dp' copies")
def test_the_synchronisation_cannot_be_held_back_and_that_is_said_once() -> None:
    with Fabric(accelerator="cpu", strategy="dp") as fabric:
        model = fabric.setup(nn.Linear(2, 1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                with fabric.no_backward_sync(model):
                    fabric.backward(model(torch.ones(1, 2)).sum())
        assert ["'dp' cannot hold back" in str(one.message) for one in caught] == [True]
        assert model.weight.grad.tolist() == [[3.0, 3.0]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with fabric.accumulate(model, every=2):
                fabric.backward(model(torch.ones(1, 2)).sum())


def test_one_process_cannot_drive_several_nodes() -> None:
    registry = Registry(environ={})
    with pytest.raises(UnsupportedError, match=r"'dp' is one process.*2 nodes.*strategy='ddp'"):
        resolve(Request(accelerator="cpu", strategy="dp", num_nodes=2), registry)
    plan = resolve(Request(accelerator="cpu", strategy="dp", devices=3), registry)
    assert (plan.world_size, plan.launcher, len(plan.devices)) == (1, None, 3)


class Meta(CPUAccelerator):
    """Stands in for an accelerator: devices of a type that is not the CPU, on which nothing is computed."""

    def device(self, index: int) -> torch.device:
        return torch.device("meta", index)


def attached(count: int) -> DataParallelStrategy:
    precision = MixedPrecision("bfloat16")
    precision.attach(torch.device("cpu"))
    strategy, accelerator = DataParallelStrategy(), Meta()
    parts = accelerator, precision, LocalEnvironment(), TorchFile()
    strategy.attach(Surroundings(*parts, tuple(accelerator.device(i) for i in range(count)), 1, 1))
    return strategy


def test_several_devices_share_a_model_and_a_single_one_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ``DataParallel``, which does nothing where PyTorch finds no GPU."""
    made: list[Any] = []

    def make(module: nn.Module, device_ids: list[Any], output_device: Any) -> nn.Module:
        made.append((device_ids, output_device))
        return module

    monkeypatch.setattr(nn, "DataParallel", make)
    model = nn.Linear(2, 1)
    assert attached(1).setup_module(model) is model
    strategy = attached(3)
    wrapped: Any = strategy.setup_module(model)
    assert wrapped.module is model
    assert made == [([torch.device("meta", i) for i in range(3)], torch.device("meta", 0))]
    assert strategy.sampler_arguments == {"num_replicas": 1, "rank": 0}
    assert strategy.root_device == strategy.loader_device == torch.device("meta", 0)


def test_a_thread_computes_in_the_precision_of_the_process() -> None:
    """Threads do not inherit the dtype of an autocast."""
    model, seen = nn.Linear(2, 1), []
    precision = MixedPrecision("bfloat16")
    precision.attach(torch.device("cpu"))
    wrapped = _InPrecision(model, precision)

    def run() -> None:
        seen.append(wrapped(torch.ones(1, 2)).dtype)
        seen.append(model(torch.ones(1, 2)).dtype)

    with precision.forward_context():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: needs two GPUs")
def test_two_gpus_train_as_one_process_does() -> None:
    with Fabric(accelerator="cuda", strategy="dp", devices=2) as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.1))
        plain = net()
        other = torch.optim.SGD(plain.parameters(), lr=0.1)
        for inputs, targets in DataLoader(data(), batch_size=8):
            fabric.backward(mse_loss(model(inputs.cuda()), targets.cuda()))
            mse_loss(plain(inputs), targets).backward()
            for each in (optimizer, other):
                each.step()
                each.zero_grad()
        for name, value in plain.state_dict().items():
            assert (model.state_dict()[name].cpu() - value).abs().max() < 1e-5
