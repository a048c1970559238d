"""One rank of a job of `on_ranks`: ``python -m fabric_core.testing.rank FOLDER MODULE``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


def main(folder: Path, module: str) -> None:
    """Run a program and write down what it answers."""
    import torch

    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    answer = importlib.import_module(module).main(arguments)
    torch.save(answer, folder / f"answer-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
