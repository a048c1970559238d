"""Cross-validate a classifier of scikit-learn's handwritten digits: k models, trained on k different splits at once.

    fabric run examples/k_fold.py --strategy=ddp --devices=2
    fabric run examples/k_fold.py --strategy=fsdp --devices=2 --folds 4
    python examples/k_fold.py --epochs 3

A fifth of the images is kept for the end. The rest is split into k folds; model i is trained on all but fold i and
tested on that. In the end, the models vote on the images that none of them has seen.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from fabric_core import Fabric


class DigitNet(nn.Module):
    """One convolution and two linear layers: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),  # (N, 32, 8, 8)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 32, 4, 4)
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the ten digits."""
        return self.layers(images)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The images, scaled to [0, 1], and their digits: for cross-validation, and for the end."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return (
        TensorDataset(train_x.float().view(-1, 1, 8, 8), train_y),
        TensorDataset(test_x.float().view(-1, 1, 8, 8), test_y),
    )


def shares(fabric: Fabric, dataset: TensorDataset, indices: list[int]) -> DataLoader:
    """The images of this process among some, each image on one process; padded, so that all have as many batches.

    Every process has to take part in each forward pass, also of sharded models. A padded image has the label -1.
    """
    inputs, labels = dataset[indices]
    missing = -len(indices) % fabric.world_size
    inputs = torch.cat([inputs, inputs[:1].expand(missing, *inputs.shape[1:])])
    labels = torch.cat([labels, torch.full((missing,), -1)])
    mine = slice(fabric.global_rank, None, fabric.world_size)
    own = TensorDataset(inputs[mine], labels[mine])
    return fabric.setup_dataloaders(DataLoader(own, batch_size=128), replace_sampler=False)


def train(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """One epoch; the mean loss of the last batch, over all processes."""
    model.train()
    for images, labels in loader:
        loss = cross_entropy(model(images), labels)
        fabric.backward(loss, model=model)
        optimizer.step()
        optimizer.zero_grad()
    return float(fabric.all_reduce(loss.detach()))


@torch.no_grad()
def accuracy(fabric: Fabric, models: list[nn.Module], loader: DataLoader) -> float:
    """The share of right answers of the mean opinion of some models, over the images of all processes."""
    right, seen = 0, 0
    for images, labels in loader:
        opinion = sum(model.eval()(images).softmax(dim=1) for model in models)
        right += int((opinion.argmax(dim=1) == labels).sum())
        seen += int((labels >= 0).sum())
    total = fabric.all_reduce({"right": right, "seen": seen}, reduce_op="sum")
    return float(total["right"] / total["seen"])


def main() -> None:
    """Train each model for an epoch, one after the other, and so on; then let them vote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all processes")
    args = parser.parse_args()

    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(7)
    train_set, test_set = digits()
    folds = StratifiedKFold(args.folds, shuffle=True, random_state=0).split(*train_set.tensors)

    parts = []
    for used, held_out in folds:
        model = DigitNet()
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        batch_size = args.batch_size // fabric.world_size
        loader = DataLoader(Subset(train_set, used.tolist()), batch_size=batch_size, shuffle=True)
        parts.append(
            (model, optimizer, fabric.setup_dataloaders(loader), shares(fabric, train_set, held_out.tolist()))
        )

    for epoch in range(args.epochs):
        results = []
        for model, optimizer, loader, held_out in parts:
            loader.set_epoch(epoch)
            loss = train(fabric, model, optimizer, loader)
            results.append((loss, accuracy(fabric, [model], held_out)))
        lines = ", ".join(f"{share:.2%} (loss {loss:.3f})" for loss, share in results)
        fabric.print(f"epoch {epoch + 1}: {lines}")

    fabric.print(
        f"mean accuracy over {args.folds} folds: {sum(share for _, share in results) / args.folds:.2%}"
    )
    everything = shares(fabric, test_set, list(range(len(test_set))))
    together = accuracy(fabric, [model for model, *_ in parts], everything)
    fabric.print(f"accuracy of all models together on {len(test_set)} other images: {together:.2%}")
    fabric.close()


if __name__ == "__main__":
    main()
