"""Train on several workers of Ray: each is an actor that becomes a rank, and runs the training function.

    python examples/ray_train.py --workers 2
    RAY_ADDRESS=auto python examples/ray_train.py --workers 8 --gpus-per-worker 1

With Ray Train in place of actors of your own, only ``train`` is needed: pass it to a ``TorchTrainer``.
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import ray
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from fabric_backends.environments.ray import ranks_of_workers
from fabric_core import Fabric


def train(epochs: int) -> float:
    """The training function: nothing in it knows of Ray. Returns the accuracy on the test set."""
    with Fabric(strategy="ddp") as fabric:
        fabric.launch()
        fabric.seed_everything(7)
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        dataset = TensorDataset(images, torch.tensor(digits.target))
        train_set, test_set = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(7))

        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
        loader = fabric.setup_dataloaders(DataLoader(train_set, batch_size=32, shuffle=True))
        for epoch in range(epochs):
            for inputs, targets in loader:
                loss = cross_entropy(model(inputs), targets)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            fabric.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
        return accuracy(fabric, model, test_set)


def accuracy(fabric: Fabric, model: nn.Module, test_set: Any) -> float:
    share = Subset(test_set, range(fabric.global_rank, len(test_set), fabric.world_size))
    right = 0
    with torch.no_grad():
        for inputs, targets in fabric.setup_dataloaders(
            DataLoader(share, batch_size=256), replace_sampler=False
        ):
            right += int((model(inputs).argmax(1) == targets).sum())
    return fabric.all_reduce(right, reduce_op="sum") / len(test_set)


@ray.remote
class Worker:
    """One rank."""

    def place(self) -> tuple[str, int]:
        """The address of this worker's node, and a port that is free there."""
        with socket.create_server(("", 0)) as listener:
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def run(self, variables: dict[str, str], epochs: int) -> float:
        """Become the rank that the variables describe, and train."""
        os.environ.update(variables)
        return train(epochs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": args.workers, "include_dashboard": False}
    with ray.init(**local):
        workers = [Worker.options(num_gpus=args.gpus_per_worker).remote() for _ in range(args.workers)]
        hosts, ports = zip(*ray.get([worker.place.remote() for worker in workers]), strict=True)
        ranks = ranks_of_workers(hosts, main_port=ports[0])
        runs = [worker.run.remote(rank, args.epochs) for worker, rank in zip(workers, ranks, strict=True)]
        print(f"test accuracy on {args.workers} workers: {ray.get(runs)[0]:.2%}")


if __name__ == "__main__":
    main()
