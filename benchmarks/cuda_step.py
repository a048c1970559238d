"""What this library costs beside plain PyTorch on a GPU, and what copying batches while computing saves.

    .venv/bin/python benchmarks/cuda_step.py

First, a small transformer is trained in bf16-mixed, by a plain loop and through the verbs, in turns; tokens per second
count. Then a loop that copies as much as it computes, with copies that wait and copies that overlap.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_cuda import CUDAAccelerator

VOCABULARY, LENGTH, BATCH = 8192, 512, 16
Step = Callable[[Tensor], Tensor]


class LanguageModel(nn.Module):
    """A causal transformer: token numbers (N, T) to logits (N, T, vocabulary)."""

    def __init__(self, width: int = 512, layers: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """No token sees a later one."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        hidden = self.tokens(tokens) + self.places.weight[:length]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def data(batches: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(VOCABULARY, (batches * BATCH, LENGTH), generator=generator))


def plain_loop(device: torch.device, batches: int) -> Callable[[], float]:
    """A loop without this library; each call is one epoch, and gives the last loss."""
    torch.manual_seed(0)
    model = LanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(data(batches), batch_size=BATCH, pin_memory=device.type == "cuda", num_workers=2)

    def epoch() -> float:
        for (batch,) in loader:
            tokens = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(tokens)
            loss = loss_of(logits.float(), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return epoch


def fabric_loop(device: torch.device, batches: int) -> Callable[[], float]:
    """The same through the verbs."""
    fabric = Fabric(accelerator=device.type, devices=1, precision="bf16-mixed")
    fabric.launch()
    torch.manual_seed(0)
    raw = LanguageModel()
    model, optimizer = fabric.setup(raw, torch.optim.AdamW(raw.parameters(), lr=1e-4, fused=True))
    loader = fabric.setup_dataloaders(
        DataLoader(data(batches), batch_size=BATCH, pin_memory=device.type == "cuda", num_workers=2)
    )

    def epoch() -> float:
        for (tokens,) in loader:
            loss = loss_of(model(tokens), tokens)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        return loss.item()

    return epoch


class _Ready:
    """Batches in pinned memory, as worker processes and a pinning thread would have them ready."""

    _num_workers = 1

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self._batches)


def copying_loop(device: torch.device, overlap: bool, mebibytes: int, batches: int) -> Callable[[], float]:
    """A loop that computes about as long as it copies, and looks at each loss, as many loops do."""
    accelerator = CUDAAccelerator(overlap_copies=overlap)
    pinned = [torch.ones(mebibytes * 2**18).pin_memory() for _ in range(4)]
    weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    products = _as_long_as_a_copy(pinned[0], weight)

    def epoch() -> float:
        source = _Ready([pinned[number % 4] for number in range(batches)])
        total = 0.0
        for batch in accelerator.move_batches(source, lambda b: b.to(device, non_blocking=True), device):
            for _ in range(products):
                weight @ weight
            total += batch[0].item()
        return total

    return epoch


def _as_long_as_a_copy(batch: Tensor, weight: Tensor) -> int:
    device = weight.device
    for _ in range(3):
        copy = seconds(lambda: float(batch.to(device, non_blocking=True)[0]), device)
        product = seconds(lambda: float((weight @ weight)[0, 0]), device)
    return max(1, round(copy / product))


def seconds(run: Callable[[], float], device: torch.device) -> float:
    """How long a call takes, until the device has nothing left to do."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(loops: dict[str, Callable[[], float]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median time of one epoch of each loop; the first round only warms up."""
    times = [{name: seconds(epoch, device) for name, epoch in loops.items()} for _ in range(rounds + 1)]
    return {name: median(row[name] for row in times[1:]) for name in loops}


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loop")
    parser.add_argument("--batches", type=int, default=40, help="batches of an epoch")
    parser.add_argument(
        "--mebibytes", type=int, default=128, help="size of a batch where copies are measured"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            f"benchmarks/cuda_step.py needs a GPU, and PyTorch {torch.__version__} finds none here. "
            "Nothing was measured."
        )
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)

    trained = in_turns(
        {"plain": plain_loop(device, args.batches), "fabric": fabric_loop(device, args.batches)},
        args.rounds,
        device,
    )
    table = Table("loop", "tokens per second", "x plain", title=f"A transformer in bf16-mixed on {name}")
    for loop, took in trained.items():
        tokens = args.batches * BATCH * LENGTH / took
        table.add_row(loop, f"{tokens:,.0f}", f"{trained['plain'] / took:.3f}")
    Console().print(table)

    ways = {"copies wait": False, "copies overlap": True}
    copied = in_turns(
        {way: copying_loop(device, overlap, args.mebibytes, args.batches) for way, overlap in ways.items()},
        args.rounds,
        device,
    )
    table = Table("loop", "ms per batch", title=f"Batches of {args.mebibytes} MiB on {name}")
    for way, took in copied.items():
        table.add_row(way, f"{1000 * took / args.batches:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
