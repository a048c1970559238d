"""Train a small convolutional network on scikit-learn's handwritten digits, on any device and any number of processes.

    fabric run examples/image_classifier.py --strategy=ddp --devices=2
    python examples/image_classifier.py --epochs 3
    fabric run examples/image_classifier.py --devices=2 --resume

The 1,797 images are scans of real handwriting, 8 by 8 pixels; they come with scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from fabric_core import Fabric


class DigitNet(nn.Module):
    """Two convolutions and two linear layers: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),  # (N, 32, 8, 8)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),  # (N, 64, 8, 8)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 64, 4, 4)
            nn.Dropout(0.25),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the ten digits."""
        return self.classifier(self.features(images))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The images, scaled to [0, 1], and their digits: four fifths for training, one fifth for testing."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return (
        TensorDataset(train_x.float().view(-1, 1, 8, 8), train_y),
        TensorDataset(test_x.float().view(-1, 1, 8, 8), test_y),
    )


def accuracy(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    """The share of right answers over the whole test set: right answers and answers are summed over all ranks."""
    model.eval()
    right, seen = 0, 0
    with torch.no_grad():
        for images, labels in loader:
            right += int((model(images).argmax(dim=1) == labels).sum())
            seen += len(labels)
    model.train()
    total = fabric.all_reduce({"right": right, "seen": seen}, reduce_op="sum")
    return float(total["right"] / total["seen"])


def main() -> None:
    """Train, evaluate after every epoch, and keep a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/image_classifier.ckpt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(7)
    train_set, test_set = digits()
    own_share = Subset(
        test_set, range(fabric.global_rank, len(test_set), fabric.world_size)
    )  # each image once

    model = DigitNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    model, optimizer = fabric.setup(model, optimizer)
    train_loader = fabric.setup_dataloaders(
        DataLoader(train_set, batch_size=args.batch_size // fabric.world_size, shuffle=True)
    )
    test_loader = fabric.setup_dataloaders(DataLoader(own_share, batch_size=256), replace_sampler=False)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    if args.resume:
        fabric.load(args.checkpoint, state)
        fabric.print(f"going on after epoch {state['epoch']}")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    result = accuracy(fabric, model, test_loader)
    with Progress(*columns, disable=not fabric.is_global_zero) as progress:
        for epoch in range(state["epoch"], args.epochs):
            train_loader.set_epoch(epoch)
            bar = progress.add_task(f"epoch {epoch + 1}", total=len(train_loader), note="")
            for images, labels in train_loader:
                loss = cross_entropy(model(images), labels)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                progress.update(bar, advance=1, note=f"loss {loss.item():.4f}")
            scheduler.step()
            result = accuracy(fabric, model, test_loader)
            progress.update(bar, note=f"loss {loss.item():.4f}, accuracy {result:.2%}")
            state["epoch"] = epoch + 1
            fabric.save(args.checkpoint, state)

    fabric.print(f"test accuracy: {result:.2%}")
    fabric.close()


if __name__ == "__main__":
    main()
