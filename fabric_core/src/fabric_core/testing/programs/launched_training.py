"""A training that a launcher starts by name: ``python -m fabric_core.testing.programs.launched_training FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fabric_core.testing.programs import small_training


def main(folder: Path) -> None:
    """Train on two processes."""
    from fabric_core import Fabric
    from fabric_core.testing.parts import part_of

    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    launcher = part_of("launcher", asked["name"], asked["options"])
    fabric = Fabric(accelerator="cpu", devices=2, plugins=[launcher])
    fabric.launch(_train, str(folder))
    fabric.close()


def _train(fabric: Any, folder: str) -> None:
    import torch

    trained = small_training.train(fabric)
    torch.save(trained, Path(folder, f"trained-{fabric.global_rank}.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
