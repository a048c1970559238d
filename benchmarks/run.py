"""Run the figures, and write RESULTS.md and its picture: what ``make bench`` does.

``make bench`` runs all of them, which takes about a quarter of an hour where nothing else runs. ``make bench
ARGS="step loader"`` runs some; the others' results stay as they are. ``make bench ARGS=--quick`` shows whether all of
them run, and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

from harness.command_line import add_choice, choice_of
from harness.figure import Choice, Figure
from harness.machine import describe, watched
from harness.results import Entry, page, read, write
from harness.summary import summarise
from harness.tables import rows_table

HERE = Path(__file__).parent
NAMES = (
    "step",
    "loader",
    "ddp_step",
    "collectives",
    "single_file",
    "imports",
    "help",
    "minimal",
    "launch",
    "constructor",
    "plan",
    "discovery",
)
PLOT = "results.svg"


def figures() -> list[Figure]:
    """All of them, in the order of the page."""
    return [import_module(name).FIGURE for name in NAMES]


def measure(figure: Figure, choice: Choice) -> Entry:
    """One figure, and under what load."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    with watched() as load:
        rows = summarise(figure, figure.run(choice))
    print(f"\n## {figure.title} (others used {100 * load.others:.0f} % of the machine)\n", flush=True)
    print(rows_table(figure, rows), flush=True)
    return Entry(date, load.others, describe(), rows)


def on_gpus() -> str:
    """What the benchmark of GPUs says, on a machine with or without one."""
    command = [sys.executable, str(HERE / "cuda_step.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(NAMES)}; all by default")
    add_choice(parser)
    told = parser.parse_args()
    if unknown := set(told.figures) - set(NAMES):
        parser.error(f"no figure is named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    choice = choice_of(told)
    whole = not (choice.quick or choice.only or choice.cases)
    entries, failed = read(HERE / "results.json"), []
    for figure in figures():
        if told.figures and figure.name not in told.figures:
            continue
        try:
            entries[figure.name] = measure(figure, choice)
        except Exception:
            failed.append(figure.name)
            traceback.print_exc()
            continue
        if whole:
            write(HERE / "results.json", entries)
    if whole:
        from harness.plot import draw

        draw(HERE / PLOT, figures(), entries)
        (HERE / "RESULTS.md").write_text(page(figures(), entries, PLOT, on_gpus()), encoding="utf-8")
    if failed:
        sys.exit(f"These figures failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
