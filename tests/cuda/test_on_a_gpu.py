"""What only a GPU can show. Nothing here pretends; without a GPU, each test is counted as not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import matrix
import pytest
import torch
from matrix import Cell, Outcome

pytestmark = pytest.mark.cuda

PROGRAM = Path(matrix.__file__)
TRAINS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fabric_core import Fabric

def data(samples=64, features=64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, features, generator=generator)
    return TensorDataset(inputs, inputs[:, :16] * 2)

def net(features=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 16))

def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

def train_fabric(precision, workers=0, pin=False, make=adamw):
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
    raw = net()
    model, optimizer = fabric.setup(raw, make(raw.parameters()))
    loader = fabric.setup_dataloaders(DataLoader(data(), batch_size=16, num_workers=workers, pin_memory=pin))
    losses = []
    for _ in range(3):
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
    found = [loss.item() for loss in losses]
    fabric.close()
    return found
"""


def train(cells: list[Cell], devices: int, folder: Path) -> dict[Cell, Outcome]:
    """What comes out of some cells of the matrix, trained on so many devices."""
    asked, answer = folder / "cells.json", folder / "results.pt"
    asked.write_text(json.dumps([asdict(cell) for cell in cells]))
    flags = (f"--devices={devices}", "--accelerator=cuda")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FABRIC_")}
    subprocess.run(
        [sys.executable, "-m", "fabric_core", "run", *flags, str(PROGRAM), str(asked), str(answer), "cuda"],
        env=environ,
        check=True,
        timeout=600,
    )
    return {
        Cell(*names): Outcome(**fields) for names, fields in torch.load(answer, weights_only=False).items()
    }


STRATEGIES = ("ddp", "fsdp", "ddp_sharded")


@pytest.mark.timeout(700)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_strategies_equal_a_plain_loop_on_the_cpu(devices: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < devices:
        pytest.skip(f"not run: {devices} devices are needed, and here are {torch.cuda.device_count()}")
    cells = [
        Cell(name, precision) for name in STRATEGIES for precision in ("32-true", "bf16-mixed", "16-mixed")
    ]
    cells += [Cell("single_device", "32-true")] if devices == 1 else []
    wrong = []
    for cell, outcome in train(cells, devices, tmp_path).items():
        wrong += [f"{cell}: {outcome.error}"] if outcome.error else []
        for name in outcome.trained:
            found, allowed = matrix.judge(cell, name, outcome)
            wrong += [] if found <= allowed else [f"{cell} {name}: {found:.1e} > {allowed:.1e}"]
    assert wrong == []


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_one_device_trains_as_a_plain_loop_there_bit_for_bit(
    precision: str, python: Callable[..., str]
) -> None:
    code = """
from contextlib import nullcontext
precision = PRECISION
weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
mixed = torch.autocast("cuda", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
model = net().to("cuda", weights)
optimizer = adamw(model.parameters())
plain = []
for _ in range(3):
    for inputs, targets in DataLoader(data(), batch_size=16):
        with mixed:
            output = model(inputs.to("cuda", weights))
        loss = nn.functional.mse_loss(output.float(), targets.to("cuda"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
assert plain[-1] < plain[0] / 2, plain
for workers, pin in ((0, False), (0, True), (2, False), (2, True)):
    found = train_fabric(precision, workers, pin)
    assert found == plain, (workers, pin, found, plain)
print("equal")
"""
    assert python(f"PRECISION = {precision!r}\n{TRAINS}{code}").strip() == "equal"


def test_the_probe_and_a_fabric_leave_the_device_alone_so_that_a_fork_works(
    python: Callable[..., str],
) -> None:
    code = """
import os
import torch
from fabric_core import Fabric
from fabric_cuda import find_usable_devices
from fabric_cuda.accelerators.probes import cuda

found = cuda()
assert found.available and len(found.names) == len(found.indices), found
assert find_usable_devices(1)[0] in found.indices
fabric = Fabric(accelerator="cuda", devices=1)
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    good = torch.ones(3, device="cuda").sum().item() == 3
    os._exit(0 if good else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def train(fabric):
    return str(torch.ones(1, device=fabric.device).device)

assert Fabric(accelerator="cuda", devices=1, strategy="ddp_notebook").launch(train) == "cuda:0"
print("forked")
"""
    assert python(code).strip().endswith("forked")


def test_a_uuid_means_the_same_device_before_and_after_it_is_in_use(python: Callable[..., str]) -> None:
    code = """
import torch
from fabric_cuda import CUDAAccelerator
from fabric_cuda.accelerators.visible import uuids

CUDAAccelerator()
before = uuids()
torch.cuda.init()
assert uuids() == before and all(before), (uuids(), before)
from fabric_core import Fabric
assert Fabric(devices=[before[-1]]).device == torch.device("cuda", len(before) - 1)
print("same")
"""
    assert python(code).strip() == "same"


def test_statistics_speak_of_the_device_that_is_used(python: Callable[..., str]) -> None:
    code = """
import torch
from fabric_core import Fabric
fabric = Fabric(accelerator="cuda", devices=1)
fabric.launch()
kept = fabric.to_device(torch.zeros(2**20))
stats = fabric.accelerator.device_stats(fabric.device)
assert stats["allocated_bytes"] >= 2**22 and stats["peak_reserved_bytes"] >= stats["allocated_bytes"], stats
if "total_bytes" in stats:
    assert 0 < stats["free_bytes"] < stats["total_bytes"], stats
fabric.close()
print("read")
"""
    assert python(code).strip().endswith("read")


def test_memory_of_a_batch_is_not_used_again_while_it_is_computed_with(python: Callable[..., str]) -> None:
    code = """
import torch
from fabric_cuda.accelerators.copies import overlapped
device = torch.device("cuda", 0)
move = lambda batch: batch.to(device)

class Workers:
    _num_workers = 1
    def __init__(self): self.batches = iter(torch.full((2**20,), float(n)) for n in range(60))
    def __iter__(self): return self
    def __next__(self): return next(self.batches)

big = torch.randn(2048, 2048, device=device)
for source in (Workers(), iter(Workers().batches)):
    sums = []
    for batch in overlapped(source, move, device):
        for _ in range(3):
            big = (big @ big).clamp(-1, 1)  # keeps the device busy while the host runs ahead
        sums.append(batch.double().mean())
        del batch
    assert [total.item() for total in sums] == list(range(60))
print("kept")
"""
    assert python(code).strip() == "kept"


def test_copies_overlap_with_the_computation(python: Callable[..., str]) -> None:
    code = """
import time
import torch
from fabric_cuda.accelerators.copies import overlapped
device = torch.device("cuda", 0)
move = lambda batch: batch.to(device, non_blocking=True)

class Workers:
    _num_workers = 1
    def __init__(self, batches): self.batches = iter(batches)
    def __iter__(self): return self
    def __next__(self): return next(self.batches)

pinned = [torch.randn(2**25).pin_memory() for _ in range(4)] * 5  # 128 MiB each
weight = torch.randn(4096, 4096, device=device)

def timed(work):
    torch.cuda.synchronize(); started = time.perf_counter(); work(); torch.cuda.synchronize()
    return time.perf_counter() - started

def copies(): return [move(batch) for batch in pinned] and None
copies()
copy = timed(copies)
products, compute = 1, 0.0
while compute < 0.7 * copy:
    products *= 2
    compute = timed(lambda: [weight @ weight for _ in range(products * len(pinned))])

def loop(batches):
    for batch in batches:
        for _ in range(products): weight @ weight
        torch.cuda.current_stream().synchronize()  # as loss.item() does

apart = min(timed(lambda: loop(map(move, pinned))) for _ in range(3))
together = min(timed(lambda: loop(overlapped(Workers(pinned), move, device))) for _ in range(3))
print(f"copy {copy:.3f} compute {compute:.3f} apart {apart:.3f} together {together:.3f}")
assert together < apart - 0.5 * min(copy, compute), "less than half of it was hidden"
"""
    assert "together" in python(code)


def test_a_step_of_ddp_is_captured_in_a_graph_when_it_is_set_up_on_a_side_stream(
    python: Callable[..., str],
) -> None:
    code = """
fabric = Fabric(accelerator="cuda", devices=1, strategy="ddp")
fabric.launch()
inputs, targets = (t.to(fabric.device) for t in data().tensors)
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    raw = net()
    model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.01))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        return loss

    for _ in range(11):  # PyTorch wants that many steps before it captures DDP
        step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
for _ in range(5):
    graph.replay()
found = captured.item()
plain = net().to(fabric.device)
optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
for _ in range(16):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(plain(inputs), targets)
    loss.backward()
    optimizer.step()
assert abs(found - loss.item()) < 1e-5, (found, loss.item())
print("captured", flush=True)
import os
os._exit(0)  # a graph holds the communicator
"""
    ports = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    assert "captured" in python(TRAINS + code, **ports, **address)


@pytest.mark.parametrize(
    ("precision", "package"),
    [
        ("float8", "torchao"),
        ("transformer-engine", "transformer_engine"),
        ("transformer-engine-float16", "transformer_engine"),
        ("bitsandbytes-int8-training", "bitsandbytes"),
    ],
)
def test_formats_of_few_bits_train_nearly_as_well(
    precision: str, package: str, python: Callable[..., str]
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"not run: {package} is not installed")
    if package != "bitsandbytes" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("not run: the device cannot multiply in 8 bits")
    code = f"""
exact, coarse = train_fabric("bf16-mixed", make=sgd), train_fabric({precision!r}, make=sgd)
print(exact[-1], coarse[-1], coarse[0])
"""
    exact, coarse, first = map(float, python(TRAINS + code).split()[-3:])
    assert coarse < first / 2
    assert coarse < 3 * exact + 0.1


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_frozen_layers_are_quantised_on_their_way_to_the_device(
    mode: str, python: Callable[..., str]
) -> None:
    if find_spec("bitsandbytes") is None:
        pytest.skip("not run: bitsandbytes is not installed")
    code = f"""
fabric = Fabric(accelerator="cuda", devices=1, precision="bitsandbytes-{mode}")
raw = net()
exact = raw(torch.ones(4, 64)).detach()
model = fabric.setup_module(raw)
layer = model[0]
assert layer.weight.is_cuda and layer.weight.dtype in (torch.uint8, torch.int8), layer.weight.dtype
with torch.no_grad():
    coarse = model(fabric.to_device(torch.ones(4, 64))).cpu()
assert (coarse - exact).norm() / exact.norm() < 0.5
restored = {{name: value.clone() for name, value in model.state_dict().items()}}
model.load_state_dict(restored)
with torch.no_grad():
    assert torch.equal(model(fabric.to_device(torch.ones(4, 64))).cpu(), coarse)
print("quantised")
"""
    assert python(TRAINS + code).strip().endswith("quantised")
