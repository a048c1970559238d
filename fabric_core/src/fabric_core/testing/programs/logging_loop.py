"""A loop that logs on every rank, as loops do."""

from __future__ import annotations

from typing import Any


def main(arguments: dict[str, Any]) -> int:
    """Log a number, a tensor, and the rank; save and load a checkpoint in between.

    Args:
        arguments: ``fabric``: arguments of ``Fabric``; ``logger``: its kind and name; ``options``: with which it is
            made, by rank; ``checkpoint``: a path.
    """
    import os

    import torch

    from fabric_core import Fabric
    from fabric_core.registry import default_registry
    from fabric_core.testing.parts import made

    options = arguments["options"][int(os.environ["RANK"])]
    logger = made(default_registry().one(*arguments["logger"]), options)
    with Fabric(**arguments["fabric"], loggers=[logger]) as fabric:
        fabric.launch()
        fabric.log("loss", 0.5, step=0)
        state = {"loggers": fabric.loggers}
        fabric.save(arguments["checkpoint"], state)
        fabric.load(arguments["checkpoint"], state)
        fabric.log_dict({"loss": torch.tensor(0.25), "rank": fabric.global_rank}, step=1)
        fabric.barrier()
        return int(fabric.global_rank)
