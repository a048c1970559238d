"""Train a small transformer to write like Python's documentation, one character at a time, on any number of processes.

    fabric run examples/language_model.py --strategy=fsdp --devices=2
    fabric run examples/language_model.py --strategy=tensor_parallel --devices=2
    python examples/language_model.py --steps 500

The 465,000 characters come with Python itself: they are what ``help()`` shows on its topics. How the model is cut up
under ``tensor_parallel`` it says itself, in ``LanguageModel.parallelize``; no other strategy asks for that.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric

CHARACTERS = 128  # those of ASCII


class Attention(nn.Module):
    """Every position looks back at those before it: (N, T, width) to (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The number of heads is what the layers give: all of them, or this process's share."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (N, heads, T, head size)
            for layer in (self.query, self.key, self.value)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and two linear layers, each around a residual: (N, T, width) to (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm, as GPT-2 has it."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(torch.relu(self.expand(self.feed_forward_norm(x))))


class LanguageModel(nn.Module):
    """A decoder: characters (N, T) to scores of the character that follows each (N, T, 128)."""

    def __init__(self, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of what comes next, at each position."""
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Divide the layers among the processes of a tensor-parallel group; asked for by that strategy alone.

        Of each pair of layers, the first is cut into columns and the second into rows, so that between the two each
        process has its share of the heads or of the hidden units, and one sum follows.
        """
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(),
            "expand": ColwiseParallel(),
            "contract": RowwiseParallel(),
        }
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], plan)
        parallelize_module(self.head, mesh["tensor_parallel"], ColwiseParallel(output_layouts=Replicate()))

    @torch.no_grad()
    def write(self, beginning: str, length: int, seed: int = 0) -> str:
        """Go on with a text, character by character. Called on every rank: each has a part of the model."""
        text = encode(beginning).to(self.characters.weight.device)[None]  # (1, T)
        chance = torch.Generator().manual_seed(seed)  # the same on every rank, so that all go on alike
        for _ in range(length):
            scores = self(text[:, -self.context :])[0, -1].float().cpu()
            following = torch.multinomial(scores.softmax(dim=0), 1, generator=chance)
            text = torch.cat([text, following.to(text.device)[None]], dim=1)
        return "".join(map(chr, text[0].tolist()))


def encode(text: str) -> Tensor:
    """The characters as numbers, without those that are not ASCII."""
    return torch.frombuffer(bytearray(text.encode("ascii", errors="ignore")), dtype=torch.uint8).long()


def passages(context: int) -> tuple[TensorDataset, TensorDataset]:
    """Python's documentation in passages of ``context + 1`` characters: nine tenths to learn from, one to test on.

    They are shuffled here, once and for all, so that every strategy reads them in the same order.
    """
    characters = encode("\n\n".join(topics[name] for name in sorted(topics)))
    cut = characters[: len(characters) // (context + 1) * (context + 1)].view(-1, context + 1)
    cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
    return TensorDataset(cut[len(cut) // 10 :]), TensorDataset(cut[: len(cut) // 10])


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    """How badly the model foretells each character from those before it: nats per character."""
    return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@torch.no_grad()
def test_loss(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    """The mean over the test set, and over all ranks."""
    model.eval()
    losses = [loss_of(model, text) for (text,) in loader]
    model.train()
    return float(fabric.all_reduce(torch.stack(losses).mean()))


def main() -> None:
    """Train, print the loss, save, and write a little."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32, help="passages per step, over all processes")
    parser.add_argument("--context", type=int, default=96, help="how many characters the model sees")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/language_model.ckpt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(7)

    model = LanguageModel(args.width, args.heads, args.layers, args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer = fabric.setup(model, optimizer)
    train_set, test_set = passages(args.context)
    # Ranks that hold parts of one model read the same passages, so there may be fewer shares than ranks.
    share = args.batch_size // fabric.strategy.sampler_arguments["num_replicas"]
    train_loader = fabric.setup_dataloaders(DataLoader(train_set, batch_size=share, drop_last=True))
    test_loader = fabric.setup_dataloaders(DataLoader(test_set, batch_size=share, drop_last=True))

    state = {"model": model, "optimizer": optimizer, "step": 0}
    if args.resume:
        fabric.load(args.checkpoint, state)
        fabric.print(f"going on after step {state['step']}")

    while state["step"] < args.steps:
        seen = state["step"] % len(train_loader)  # in this pass over the data
        for (text,) in islice(train_loader, seen, None):
            loss = loss_of(model, text)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            if state["step"] % 20 == 0 or state["step"] == args.steps:
                mean = float(fabric.all_reduce(loss.detach()))
                fabric.print(f"step {state['step']}: loss {mean:.4f}")
            if state["step"] == args.steps:
                break

    fabric.save(args.checkpoint, state)
    fabric.print(f"test loss: {test_loss(fabric, model, test_loader):.4f}")
    fabric.print(model.write("The statement ", 120))
    fabric.close()


if __name__ == "__main__":
    main()
