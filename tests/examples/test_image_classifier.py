"""The main job: a real data set, two processes, one command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "image_classifier.py"


def run(*arguments: object) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fabric_core",
            "run",
            str(EXAMPLE),
            "--strategy=ddp",
            "--devices=2",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def accuracy(printed: str) -> float:
    match = re.fullmatch(r"test accuracy: (\d+\.\d\d)%", printed.strip().splitlines()[-1])
    assert match is not None, printed
    return float(match[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "deep" / "digits.ckpt"


def test_it_reads_at_least_97_percent_of_the_digits(checkpoint: Path) -> None:
    printed = run("--checkpoint", checkpoint)
    assert accuracy(printed) >= 97.0
    assert "epoch 15" in printed
    assert printed.count("test accuracy") == 1


def test_it_goes_on_from_its_checkpoint(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    printed = run("--checkpoint", checkpoint, "--resume")
    assert "going on after epoch 15" in printed
    assert accuracy(printed) >= 97.0
    assert checkpoint.read_bytes() == before
