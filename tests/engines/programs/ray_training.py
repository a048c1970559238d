"""The one training in two actors of Ray: with ranks of ours, and in a process group as Ray Train makes it.

ray_training.py FOLDER [FOLDER]
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import ray

from fabric_backends.environments.ray import ranks_of_workers


@ray.remote
class Worker:
    def place(self) -> tuple[str, int]:
        with socket.create_server(("", 0)) as listener:
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def environment(self) -> str:
        """What a worker without a rank is."""
        from fabric_core import Fabric

        return Fabric(accelerator="cpu").plan.cluster_environment.name

    def train(self, variables: dict[str, str], folder: str, group_first: bool) -> bool:
        """Whether there is a process group afterwards."""
        import one_training
        import torch.distributed as dist

        from fabric_core import Fabric

        os.environ.update(variables)
        if group_first:
            dist.init_process_group("gloo", init_method="env://")
        with Fabric(accelerator="cpu", strategy="ddp") as fabric:
            fabric.launch()
            one_training.train(fabric, Path(folder))
        return dist.is_initialized()


def main() -> None:
    paths = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    with ray.init(num_cpus=2, include_dashboard=False, runtime_env=paths):
        workers = [Worker.remote() for _ in range(2)]
        assert ray.get(workers[0].environment.remote()) == "local"
        for folder, group_first in zip(sys.argv[1:], (False, True), strict=False):
            hosts, ports = zip(*ray.get([worker.place.remote() for worker in workers]), strict=True)
            ranks = ranks_of_workers(hosts, ports[0])
            runs = [w.train.remote(rank, folder, group_first) for w, rank in zip(workers, ranks, strict=True)]
            assert ray.get(runs) == [group_first] * 2


if __name__ == "__main__":
    main()
