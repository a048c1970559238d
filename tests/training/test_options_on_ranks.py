"""Options from the file, the command line and the code reach the strategy's constructor, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import json, sys
from fabric_core import Fabric
from fabric_backends.strategies.ddp import DDPStrategy

def see_what_is_given(strategy, **options):
    global seen
    seen = options
    kept(strategy, **options)

if __name__ == "__main__":
    kept, DDPStrategy.__init__ = DDPStrategy.__init__, see_what_is_given
    stated = {"gradient_as_bucket_view": False, "static_graph": True}
    fabric = Fabric(strategy_options=stated, **json.loads(sys.argv[1]))
    fabric.launch()
    seen["comm_hook"] = seen["comm_hook"].__name__
    origins = dict(fabric.plan.strategy.origins)
    print(json.dumps([fabric.global_rank, fabric.world_size, seen, origins]), flush=True)
"""
FILE = """
[strategy.ddp]
bucket-cap-mb = 7
static_graph = false
init_timeout = 250
[strategy.fsdp]
whatever = 1
"""
GIVEN = {
    "bucket_cap_mb": 3.5,
    "gradient_as_bucket_view": False,
    "static_graph": True,
    "init_timeout": 250,
    "comm_hook": "fp16_compress_hook",
}
HOOK = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks:fp16_compress_hook"


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """``fabric run`` in a folder with the script and the file."""
    (folder / "show.py").write_text(SHOW)
    (folder / "fabric.toml").write_text(FILE)
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("FABRIC_", "PYTHON"))
    }
    return subprocess.run(
        [str(Path(sys.executable).with_name("fabric")), "run", "--accelerator=cpu", *args],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.parametrize(
    ("ours", "code"),
    [(["--strategy=ddp", "--devices=2"], {}), ([], {"strategy": "ddp", "devices": 2})],
    ids=["ranks of fabric run", "ranks of a launcher"],
)
def test_options_of_all_three_sources_reach_the_constructor_on_both_ranks(
    tmp_path: Path, ours: list[str], code: dict[str, object]
) -> None:
    options = [
        "--strategy.bucket_cap_mb",
        "3.5",
        f"--strategy.comm-hook={HOOK}",
        "--strategy.static_graph=yes",
    ]
    ended = run(tmp_path, *ours, *options, "show.py", json.dumps(code))
    assert ended.returncode == 0, ended.stderr
    found = sorted(json.loads(line) for line in ended.stdout.splitlines())
    file = f"[strategy.ddp] in {tmp_path / 'fabric.toml'}"
    origins = {
        "bucket_cap_mb": "the command line",
        "static_graph": "the code",
        "gradient_as_bucket_view": "the code",
        "comm_hook": "the command line",
        "init_timeout": file,
    }
    assert found == [[rank, 2, GIVEN, origins] for rank in (0, 1)]


def test_code_and_command_line_that_contradict_each_other_are_told_by_the_script(tmp_path: Path) -> None:
    ended = run(tmp_path, "--strategy=ddp", "--strategy.static_graph=no", "show.py", '{"devices": 1}')
    assert ended.returncode != 0
    assert (
        "The code says static_graph=True for the strategy, and the command line says --strategy.static_graph no. Make "
        "them agree, or leave static_graph out of the code so that the command line decides."
    ) in ended.stderr
