"""The benchmarks run, and what a step costs in calls does not grow unnoticed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "step.py"
MOST_CALLS_MORE = {"32-true": 12, "bf16-mixed": 26}


def test_a_step_calls_few_functions_more_than_a_plain_one() -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--rounds=2", "--steps=5"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    rows = re.findall(r"│ (\S+) +│ (plain|fabric) +│ +[\d.]+ +│ +[\d.]+ +│ +(\d+) +│", printed)
    calls = {(precision, loop): int(number) for precision, loop, number in rows}
    for precision, most in MOST_CALLS_MORE.items():
        assert calls[precision, "fabric"] - calls[precision, "plain"] <= most, printed


def test_checkpoints_are_measured_beside_pytorchs_own() -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "checkpoints.py"), "--mb=1", "--rounds=1"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True).stdout
    rows = re.findall(r"^\| ([12]) \| (save|load) \| (.+) \| \d+ \| [\d.]+ \|$", printed, re.MULTILINE)
    assert len(rows) == 2 * 4 + 2 * 2, printed
