"""The benchmarks: their statistics and tables are right, and all of them run. What they find is not judged here."""

# ruff: noqa: RUF001

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the harness, by name."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield lambda name: import_module(f"harness.{name}")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"harness", *(path.stem for path in BENCHMARKS.glob("*.py"))}:
            del sys.modules[name]


def figure_of(harness: Any, *targets: Any) -> Any:
    """A figure of one case with two measures, which nobody runs."""
    figures, operations = harness("figure"), harness("operations")
    return operations.Operations(
        name="sleep",
        about="How long sleep takes.\n\nMore about it.",
        contenders={},
        cases=(figures.Case("short"),),
        measures=(figures.Measure("cpu", "µs", "CPU"), figures.Measure("calls", "", "calls")),
        targets=targets,
    )


def runs_of(**seconds: list[float]) -> dict[str, Any]:
    """Samples of the case "short" by contender; each calls ten functions more than the one before."""
    return {
        "short": {
            name: [{"cpu": second, "calls": 10.0 * number} for second in values]
            for number, (name, values) in enumerate(seconds.items(), 1)
        }
    }


def test_a_round_that_is_slow_for_all_changes_no_ratio(harness: Any) -> None:
    statistics = harness("statistics")
    plain, other = [1.0, 9.0, 1.0], [2.0, 18.0, 2.0]
    assert statistics.paired_ratio(other, plain) == 2.0
    assert statistics.paired_difference([1.5, 9.5, 1.0], plain) == 0.5


def test_contenders_take_turns_so_that_nobody_is_always_first(harness: Any) -> None:
    turns = harness("statistics").turns(["A", "B", "C"], 4)
    assert ["".join(turn) for turn in turns] == ["ABC", "BCA", "CAB", "ABC"]


def test_a_table_shows_medians_minima_and_paired_ratios(harness: Any) -> None:
    table = harness("tables").table(
        figure_of(harness), runs_of(plain=[1e-6, 3e-6, 2e-6], fabric=[4e-6, 3e-6, 4e-6])
    )
    assert table.splitlines() == [
        "| case |  | CPU, µs | least | × plain | calls |",
        "|---|---|---|---|---|---|",
        "| short | plain PyTorch | 2 | 1 | 1.00 | 10 |",
        "| short | **fabric** | 4 | 3 | 2.00 | 20 |",
    ]


def test_a_target_is_met_or_missed_and_a_missed_one_says_why(harness: Any) -> None:
    figures, summary, tables = harness("figure"), harness("summary"), harness("tables")
    figure = figure_of(
        harness,
        figures.Target("short", "cpu", 2.0),
        figures.Target("short", "calls", 5, figures.Against.OVER, why="It looks twice."),
        figures.Target("short", "cpu", 3, figures.Against.VALUE, at_least=True),
        figures.Target("long", "cpu", 3),
    )
    rows = summary.summarise(figure, runs_of(plain=[2e-6, 2e-6], fabric=[4e-6, 4e-6]))
    lines = [line[1:5] for line in tables.verdict_lines(figure, rows)]
    assert lines == [
        ["short, CPU", "≤ 2.00 × plain", "2.00", "met"],
        ["short, calls", "≤ 5 over plain", "+10", "**missed**"],
        ["short, CPU", "≥ 3 µs", "4", "met"],
        ["long, CPU", "≤ 3.00 × plain", "–", "not measured"],
    ]
    assert tables.missed(figure, rows) == ["Missed: short, calls (≤ 5 over plain). It looks twice."]


def test_results_are_kept_figure_by_figure_and_written_as_a_page(harness: Any, tmp_path: Path) -> None:
    results, summary = harness("results"), harness("summary")
    figure = figure_of(harness)
    rows = summary.summarise(figure, runs_of(plain=[1e-6], fabric=[1e-6]))
    entry = results.Entry("2026-01-01 00:00 UTC", 0.5, {"processor": "abacus"}, rows)
    results.write(tmp_path / "results.json", {"sleep": entry})
    kept = results.read(tmp_path / "results.json")
    assert kept == {"sleep": entry}
    page = results.page([figure], kept, "picture.svg", "No GPU.")
    for text in (
        "- processor abacus",
        "## How long sleep takes",
        "others used 50 %",
        "No GPU.",
        "picture.svg",
    ):
        assert text in page
    assert "Not measured: How long sleep takes." in results.page([figure], {}, "picture.svg", "")


@pytest.mark.timeout(600)
def test_every_figure_runs_with_what_is_installed_here(harness: Any) -> None:
    figures = [name for name in import_module("run").NAMES if name != "launch"]
    rows = [*run_quickly(*figures, "--only", "plain", "fabric"), *run_quickly("launch", "--only", "fabric")]
    ours = [row for row in rows if "**fabric**" in row]
    assert len(ours) == sum(len(figure.cases) for figure in import_module("run").figures()), rows


def run_quickly(*arguments: str) -> list[str]:
    """The rows of the tables of ``run.py --quick``."""
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "run.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def test_checkpoints_are_measured_beside_pytorchs_own() -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "checkpoints.py"), "--mb=1", "--rounds=1"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True).stdout
    rows = re.findall(r"^\| ([12]) \| (save|load) \| (.+) \| \d+ \| [\d.]+ \|$", printed, re.MULTILINE)
    assert len(rows) == 2 * 4 + 2 * 2, printed


IN_README = (
    ("step", "float32", "cpu", "ratio"),
    ("step", "bf16-mixed", "cpu", "ratio"),
    ("ddp_step", "16 M parameters", "cpu", "ratio"),
    ("loader", "", "cpu", "over"),
    ("minimal", "", "own_cpu", "ratio"),
    ("launch", "", "first_step", "ratio"),
    ("launch", "", "pss", "median"),
)
SHOWN = {"ratio": "{:.2f} ×", "over": "{:+.1f} µs", "median": "{:.0f} MB"}


def test_the_readme_says_what_was_measured(harness: Any) -> None:
    entries = harness("results").read(BENCHMARKS / "results.json")
    table = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8").split("| beside plain PyTorch |")[1]
    told = [line.split(" | ")[1:] for line in table.split("\n\n")[0].splitlines()[2:]]
    contenders = ("fabric", "lightning-fabric", "accelerate")
    found = []
    for figure, case, measure, kind in IN_README:
        rows = {row.contender: row.numbers for row in entries[figure].rows if row.case == case}
        numbers = [getattr(rows[contender][measure], kind) for contender in contenders]
        found.append([SHOWN[kind].format(number) for number in numbers])
    assert [[cell.removesuffix(" |") for cell in line] for line in told] == found
