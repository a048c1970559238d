"""Two models that take turns, on real data, with the strategies that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dcgan.py"
SHORT = ("--devices=2", "--epochs=2")
EPOCH = re.compile(
    r"epoch (\d+): loss of the discriminator (\S+), of the generator (\S+); "
    r"mean pixel (\S+) \(real: (\S+)\), deviation over images (\S+) \(real: (\S+)\)"
)


def run(out: Path, *arguments: object) -> list[tuple[float, ...]]:
    """Epoch, losses of both, mean pixel, deviation over images (each drawn and real), for each epoch."""
    command = [
        sys.executable,
        "-m",
        "fabric_core",
        "run",
        str(EXAMPLE),
        "--accelerator=cpu",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == f"64 drawn digits: {out}"
    return [tuple(map(float, found)) for found in EPOCH.findall(done.stdout)]


def test_it_learns_to_draw_with_ddp(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "digits.pgm"
    epochs = run(out, "--strategy=ddp", "--devices=2", "--epochs=20")
    assert [epoch[0] for epoch in epochs] == list(range(1, 21))
    _, _, _, mean, real_mean, deviation, real_deviation = epochs[-1]
    assert abs(mean - real_mean) < 0.15
    assert deviation > 0.4 * real_deviation  # it draws more than one image
    assert epochs[0][5] < 0.4 * real_deviation  # which it has learnt
    image = out.read_bytes()
    assert image.startswith(b"P5 320 320 255\n")
    assert len(set(image[15:])) > 100


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    return run(tmp_path_factory.mktemp("ddp") / "digits.pgm", "--strategy=ddp", *SHORT)


@pytest.mark.parametrize("strategy", ["ddp_sharded", "fsdp"])
def test_other_strategies_print_what_ddp_prints(
    strategy: str, by_ddp: list[tuple[float, ...]], tmp_path: Path
) -> None:
    found = run(tmp_path / "digits.pgm", f"--strategy={strategy}", *SHORT)
    for epoch, like in zip(found, by_ddp, strict=True):
        assert epoch == pytest.approx(
            like, abs=0.0021
        )  # three decimals; a GAN multiplies what rounding leaves


def test_one_process_draws_too(tmp_path: Path) -> None:
    assert len(run(tmp_path / "digits.pgm", "--epochs=1")) == 1
