"""Kill a small training on two processes again and again, and count what was lost: ``crashes.py [--crashes 200]``.

One row per strategy: so many kills with SIGKILL, of a rank or of the supervisor, most of them inside of saves, and one
in each moment of two saves besides (a moment: one look at the folder of checkpoints, or one change of it); system calls
that fail; and what the trainings were worth in the end beside one that was never killed. The training is that of the
suite: samples are shuffled, and augmented in worker processes, and the loader is in the state. How far it is goes to
the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parents[1] / "tests" / "crashes" / "programs" / "server.py"
STRATEGIES = ("ddp", "fsdp", "deepspeed_stage_2")
COLUMNS = (
    *("strategy", "kills", "in saves", "in rotations", "in loads", "else", "starts"),
    *("trainings", "not identical", "torn or lost", "failed calls", "minutes"),
)


def crashed(strategy: str, crashes: int, seed: int) -> dict[str, Any]:
    """The report of one strategy."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        config = {"strategy": strategy, "folder": folder, "seed": seed, "crashes": crashes}
        config |= {"sweep": True, "faults": crashes // 10, "disk": False}
        done = subprocess.run(
            [sys.executable, str(SERVER), json.dumps(config)],
            env={**os.environ, "FABRIC_GRACE_SECONDS": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(strategy: str, report: dict[str, Any]) -> tuple[Any, ...]:
    """What the table says of a report."""
    phases = report["phases"]
    saves, rotations, loads = (phases.get(name, 0) for name in ("save", "rotation", "load"))
    elsewhere = report["crashes"] - saves - rotations - loads
    return (
        *(strategy, report["crashes"], saves, rotations, loads, elsewhere, report["starts"]),
        *(report["trainings"], len(report["differ"]), len(report["complaints"]), report["faults"]),
        f"{report['seconds']['everything'] / 60:.1f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--crashes", type=int, default=200, help="at random, for each strategy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print("|", " | ".join(cells), "|", flush=True)
    for strategy in arguments.strategies:
        report = crashed(strategy, arguments.crashes, arguments.seed)
        print("|", " | ".join(map(str, row(strategy, report))), "|", flush=True)
        for line in (*report["failures"], *report["differ"], *report["complaints"]):
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
