"""What four devices in SPMD mode do. Each function is one check; what it found is written as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import dropping_out
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric, FabricError

FOLDER = Path(sys.argv[1])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def data(samples: int = 30) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, torch.sin(inputs[:, :4]))


def opened(strategy: str = "xla_spmd", **options: Any) -> Any:
    return Fabric(accelerator="tpu", strategy=strategy, strategy_options=options)


def train(model: Any, optimizer: Any, loader: Any, backward: Any) -> list[float]:
    losses = []
    for _ in range(2):
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The plain loop over the same batches, of which the last is short: 30 = 3 * 8 + 6."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = train(model, optimizer, DataLoader(data(), batch_size=8), torch.Tensor.backward)
    return losses, model.state_dict()


def specs_of(tensors: dict[str, Any]) -> dict[str, str]:
    get = torch_xla._XLAC._get_xla_sharding_spec
    return {name: get(tensor) for name, tensor in tensors.items() if tensor.device.type == "xla"}


def compare(strategy: str = "xla_spmd", **options: Any) -> dict[str, Any]:
    """Train in some way, save, load into another model; how far from the plain loop, and how things are divided."""
    with opened(strategy, **options) as fabric:
        fabric.launch()  # first of all: see `too_late` in the tests
        losses, parameters = plain()
        raw = net()
        model, optimizer = fabric.setup(raw, torch.optim.Adam(raw.parameters(), lr=0.05))
        loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=8))
        found = train(model, optimizer, loader, fabric.backward)
        path = Path(tempfile.mkdtemp(dir=FOLDER))
        fabric.save(path / "model", {"model": model, "optimizer": optimizer})
        saved = fabric.load(path / "model")["model"]
        fabric.save(path / "beside", {"model": model, "optimizer": optimizer}, wait=False)
        optimizer.step()
        with torch.no_grad():
            model[0].bias.zero_()
        beside = fabric.load(path / "beside")["model"]
        other = net()
        second, step = fabric.setup(other, torch.optim.Adam(other.parameters(), lr=0.05))
        fabric.load(path / "model", {"model": second, "optimizer": step})
        weight = optimizer.param_groups[0]["params"][0]
        return {
            "sizes": [fabric.world_size, fabric.global_rank, len(fabric.strategy.mesh.device_ids)],
            "axes": fabric.strategy.axes,
            "losses": max(abs(a - b) for a, b in zip(found, losses, strict=True)),
            "parameters": max(float((saved[n] - v).abs().max()) for n, v in parameters.items()),
            "keys": list(saved) == list(parameters),
            "beside": all(torch.equal(beside[name], value) for name, value in saved.items()),
            "file": (path / "model").is_file(),
            "shards": chunks_of(path / "model"),
            "divided": list(specs_of(dict(model.named_parameters())).values()),
            "state": specs_of(optimizer.state[weight]).get("exp_avg"),
            "after load": list(specs_of(dict(second.named_parameters())).values()),
            "loaded": max(
                float((a.detach().cpu() - b).abs().max())
                for a, b in zip(second.parameters(), saved.values(), strict=True)
            ),
        }


def chunks_of(path: Path) -> list[list[int]]:
    """How the first weight lies in a folder: the lengths of its parts; nothing for one file."""
    if path.is_file():
        return []
    manifest = json.loads((path / "fabric.json").read_text())
    return [chunk["lengths"] for chunk in manifest["tensors"].get("model.0.weight", {}).get("chunks", [])]


def resumed() -> Any:
    options = {"mesh_shape": {"data": 2, "model": 2}, "partition": {"2.weight": ("model", None)}}
    return dropping_out.compare(lambda: opened(**options), Path(tempfile.mkdtemp(dir=FOLDER)))


def data_parallel() -> Any:
    return compare()


def tensor_parallel() -> Any:
    partition = {"0.weight": ("model", None), "0.bias": ("model",), "2.weight": (None, "model")}
    return compare(mesh_shape={"data": 2, "model": 2}, partition=partition)


def tensor_parallel_by_hand() -> Any:
    import torch_xla.distributed.spmd as xs

    def parallelize(model: Any, mesh: Any) -> None:
        xs.mark_sharding(model[0].weight, mesh, ("model", None))

    return compare(mesh_shape={"model": -1}, parallelize_fn=parallelize)


def partition_by_function() -> Any:
    def rules(name: str, parameter: nn.Parameter) -> Any:
        return ("model", None) if parameter.dim() == 2 else None

    return compare(mesh_shape={"data": -1, "model": 2}, partition=rules)


def fully_sharded() -> Any:
    return compare("xla_spmd_fsdp")


def data_and_fully_sharded() -> Any:
    return compare(mesh_shape={"data": 2, "fsdp": 2}, auto_wrap_policy={nn.Linear})


def batches() -> Any:
    """How the parts of a batch lie, and that their values are what they were."""
    batch = {"x": torch.arange(16.0).reshape(8, 2), "y": [torch.arange(8)], "n": 3, "s": torch.tensor(5.0)}
    loader = DataLoader([0], batch_size=1, collate_fn=lambda _: batch)
    with opened() as fabric:
        (there,) = fabric.setup_dataloaders(loader)
        return {
            "divided": specs_of({"x": there["x"], "y": there["y"][0]}),
            "values": [
                there["x"].cpu().tolist() == batch["x"].tolist(),
                there["y"][0].cpu().tolist(),
                there["n"],
            ],
            "scalar": [there["s"].item(), there["s"].device.type],
            "sum": (there["x"] * 2).sum().item(),
        }


def compilations() -> Any:
    with opened("xla_spmd_fsdp") as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, torch.optim.Adam(raw.parameters(), lr=0.05))
        counts = []
        for inputs, targets in fabric.setup_dataloaders(DataLoader(data(80), batch_size=8)):
            fabric.backward(nn.functional.mse_loss(model(inputs), targets))
            fabric.clip_gradients(model, optimizer, max_norm=0.1, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            counts.append(metrics.metric_data("CompileTime")[0])
        return counts


def seeds() -> Any:
    with opened() as fabric:
        drawn = []
        for seed in (1, 1, 2):
            fabric.seed_everything(seed)
            drawn.append(torch.rand(4, device=fabric.device).cpu().tolist())
        return [drawn[0] == drawn[1], drawn[0] == drawn[2]]


def verbs() -> Any:
    with opened() as fabric:
        tensor = torch.arange(3.0, device=fabric.device)
        return [
            fabric.all_gather(tensor).cpu().tolist(),
            fabric.all_reduce(tensor).cpu().tolist(),
            fabric.broadcast("word"),
        ]


def told(**options: Any) -> str:
    try:
        with opened(**options) as fabric:
            fabric.setup(net())
    except FabricError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors() -> Any:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        told(partition={"no.such": ("data",)})
    return {
        "mesh": told(mesh_shape={"data": 3, "model": -1}),
        "shape": told(mesh_shape={"data": 0}),
        "axis": told(mesh_shape={"data": 2, "model": 2}, partition={"*.weight": ("modle", None)}),
        "entries": told(mesh_shape={"data": 2, "model": 2}, partition={"*": ("model", None)}),
        "rules": told(partition=3),
        "function": told(parallelize_fn=3),
        "policy": told(auto_wrap_policy={3}),
        "option": told(mesh={"data": 4}),
        "unmatched": [str(each.message) for each in heard if each.category is UserWarning],
    }


def holding_back() -> Any:
    with opened() as fabric, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = fabric.setup(net())
        with fabric.no_backward_sync(model):
            fabric.backward(model(torch.ones(4, 6, device=fabric.device)).sum())
        return [str(each.message) for each in heard]


def one_process_per_device_afterwards() -> Any:
    """In this process no other mode is possible any more. One device is what PJRT on the CPU allows it to ask for."""
    try:
        Fabric(accelerator="tpu", strategy="xla", devices=1).launch()
    except FabricError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


CHECKS = (
    *(data_parallel, tensor_parallel, tensor_parallel_by_hand, partition_by_function, fully_sharded),
    *(data_and_fully_sharded, batches, compilations, seeds, verbs, errors, holding_back, resumed),
    one_process_per_device_afterwards,
)

if __name__ == "__main__":
    answers = {check.__name__: check() for check in CHECKS}
    (FOLDER / "answers.json").write_text(json.dumps(answers))
