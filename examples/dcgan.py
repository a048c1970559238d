"""Train a DCGAN on scikit-learn's handwritten digits: two models and two optimizers that take turns.

    fabric run examples/dcgan.py --strategy=ddp --devices=2
    fabric run examples/dcgan.py --strategy=ddp_sharded --devices=2
    python examples/dcgan.py --epochs 40 --out digits.pgm

The generator draws 8-by-8 images from noise, the discriminator tells them from scans of real handwriting; the 1,797
scans come with scikit-learn. After each epoch a grid of generated images is written (as PGM, which needs no library).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric

NOISE = 32


class Generator(nn.Module):
    """Noise (N, 32) to images (N, 1, 8, 8) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (NOISE, 1, 1)),
            nn.ConvTranspose2d(NOISE, 64, 2, bias=False),  # (N, 64, 2, 2)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),  # (N, 32, 4, 4)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # (N, 1, 8, 8)
            nn.Tanh(),
        )

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Draw."""
        return self.layers(noise)


class Discriminator(nn.Module):
    """Images (N, 1, 8, 8) to one score each, above 0 for what looks real: (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1),  # (N, 32, 4, 4)
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (N, 64, 2, 2)
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(256, 1),
            nn.Flatten(0),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Judge."""
        return self.layers(images)


def init_weights(layer: nn.Module) -> None:
    """As in the paper (Radford et al., 2015): small normal weights."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, 0.05)


def write_images(path: Path, images: torch.Tensor, columns: int = 8) -> None:
    """Write images (N, 1, 8, 8) in [-1, 1] as a grid, each pixel four wide, in the PGM format."""
    framed = pad(images.cpu().squeeze(1), (1, 1, 1, 1), value=-1.0)
    rows = [torch.cat(list(row), dim=-1) for row in framed.split(columns)]
    grid = ((torch.cat(rows) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    grid = grid.repeat_interleave(4, 0).repeat_interleave(4, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5 %d %d 255\n" % (grid.shape[1], grid.shape[0]) + bytes(grid.flatten().tolist()))


def towards(scores: torch.Tensor, target: float) -> torch.Tensor:
    """How far scores are from "real" (1) or "drawn" (0)."""
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


def main() -> None:
    """Train both in turns, and show what the generator draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes")
    parser.add_argument("--out", type=Path, default=Path("runs/dcgan.pgm"), help="where to draw")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(7)
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8.0 - 1.0
    dataset = TensorDataset(images)

    generator, discriminator = Generator().apply(init_weights), Discriminator().apply(init_weights)
    draws = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    judges = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    generator, draws = fabric.setup(generator, draws)
    discriminator, judges = fabric.setup(discriminator, judges)
    loader = fabric.setup_dataloaders(
        DataLoader(dataset, batch_size=args.batch_size // fabric.world_size, shuffle=True, drop_last=True)
    )
    always_same = torch.randn(64, NOISE, generator=torch.Generator().manual_seed(1)).to(fabric.device)
    own = torch.Generator().manual_seed(fabric.global_rank)  # every process draws from noise of its own

    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        for (real,) in loader:
            noise = torch.randn(len(real), NOISE, generator=own).to(fabric.device)
            drawn = generator(noise)

            # The discriminator learns to tell them apart, in one forward pass, so that one backward pass ends it.
            scores = discriminator(torch.cat([real, drawn.detach()]))
            judged = towards(scores[: len(real)], 0.9) + towards(scores[len(real) :], 0.0)
            fabric.backward(judged, model=discriminator)
            judges.step()
            judges.zero_grad()

            # The generator learns to be taken for real; what that leaves in the discriminator is dropped.
            fooled = towards(discriminator(drawn), 1.0)
            fabric.backward(fooled, model=generator)
            draws.step()
            draws.zero_grad()
            judges.zero_grad()

        losses = fabric.all_reduce({"discriminator": judged.detach(), "generator": fooled.detach()})
        generator.eval()
        with torch.no_grad():
            grid = generator(always_same)
        generator.train()
        if fabric.is_global_zero:
            write_images(args.out, grid)
        fabric.print(
            f"epoch {epoch + 1}: loss of the discriminator {losses['discriminator']:.3f}, of the generator "
            f"{losses['generator']:.3f}; mean pixel {grid.mean():+.3f} (real: {images.mean():+.3f}), deviation over "
            f"images {grid.std(0).mean():.3f} (real: {images.std(0).mean():.3f})"
        )
    fabric.print(f"64 drawn digits: {args.out}")
    fabric.close()


if __name__ == "__main__":
    main()
