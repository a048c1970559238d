"""The distributions under ``examples/plugins``, from their wheels.

They are installed into an environment that has nothing of ours but the core, its kit and the backends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SCRIPTS = "Scripts" if os.name == "nt" else "bin"
EXAMPLES = {
    "fabric-acme-cluster": ("cluster environment", "acme"),
    "fabric-cpuaccel": ("accelerator", "cpuaccel"),
    "fabric-sgdfp8sim": ("precision", "sgdfp8sim"),
}
MOST_LINES = 150

TRAIN = """
import json, os, sys, torch
from torch import nn
from fabric_core import Fabric

def train(**flags):
    with Fabric(**flags) as fabric:
        fabric.launch()
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        data = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(2))
        losses = []
        for batch in data:
            mine = fabric.to_device(batch[fabric.global_rank :: fabric.world_size])
            loss = (model(mine) - mine.sum(1, keepdim=True)).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        whole = [getattr(value, "full_tensor", lambda value=value: value)() for value in model.state_dict().values()]
        chosen = [fabric.plan.accelerator.name, fabric.plan.strategy.name, fabric.plan.cluster_environment.name]
        return {
            "chosen": [*chosen, fabric.plan.precision.name, str(fabric.device)],
            "rank": [fabric.global_rank, fabric.world_size],
            "losses": losses,
            "weights": [value.cpu().flatten().tolist() for value in whole],
        }

print(json.dumps([train(**flags) for flags in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    """Where the examples are."""
    return root / "examples" / "plugins"


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]) -> list[Path]:
    """Their wheels."""
    out = tmp_path_factory.mktemp("examples")
    for name in EXAMPLES:
        run(
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, folder / name),
            cwd=out,
        )
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def environment(
    fresh: Callable[[str], Path],
    install: Callable[[list[Path], Path], None],
    wheels: dict[str, Path],
    built: list[Path],
) -> Path:
    """A fresh environment with the core, the kit, the backends and the examples. The last test empties it."""
    made = fresh("fabric-core[testing]")
    install([wheels["fabric_backends"], *built], made)
    return made


def plain(rounds: bool) -> tuple[list[float], list[list[float]]]:
    """The losses and the weights of the same training in PyTorch alone, on the CPU and in one process."""

    def rounded(x: Tensor) -> Tensor:
        low = x.detach().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
        return low + (x - x.detach()) if rounds else x

    torch.manual_seed(1)
    first, last = nn.Linear(4, 8), nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for batch in torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(2)):
        hidden = torch.tanh(linear(rounded(batch), rounded(first.weight), first.bias))
        loss = (
            (linear(rounded(hidden), rounded(last.weight), last.bias) - batch.sum(1, keepdim=True))
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [value.flatten().tolist() for layer in (first, last) for value in layer.state_dict().values()]
    return losses, weights


def accelerator(environment: Path, run: Callable[..., str], *flags: str, **variables: str) -> dict[str, Any]:
    """What ``fabric explain`` says of the accelerator."""
    command = (environment / SCRIPTS / "fabric", "explain", "--json", *flags)
    plan = json.loads(run(*command, cwd=environment, **variables))
    (part,) = (part for part in plan["parts"] if part["kind"] == "accelerator")
    found: dict[str, Any] = part | {"devices": plan["devices"], "strategy": plan["parts"][1]["name"]}
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_complete(name: str, folder: Path, root: Path) -> None:
    package = name.replace("-", "_")
    source = folder / name / "src"
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in source.rglob("*.py"))
    assert 0 < lines <= MOST_LINES
    assert {"__init__.py", "hooks.py", "py.typed"} <= {file.name for file in (source / package).iterdir()}
    assert {"test_conformance.py"} < {file.name for file in (folder / name / "tests").glob("*.py")}
    assert (folder / name / "README.md").read_text("utf-8").startswith(f"# {name}\n")
    assert (folder / name / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()


def test_the_types_of_every_example_are_checked_with_ours(folder: Path, settings: dict[str, Any]) -> None:
    checked = settings["tool"]["mypy"]
    assert "examples/plugins/*/src" in checked["files"]
    assert {path.parent.name for path in folder.glob("*/pyproject.toml")} == set(EXAMPLES)
    searched = {f"$MYPY_CONFIG_FILE_DIR/examples/plugins/{name}/src" for name in EXAMPLES}
    assert searched <= set(checked["mypy_path"])


def test_every_example_is_listed_and_usable(environment: Path, run: Callable[..., str]) -> None:
    listed = json.loads(run(environment / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=environment))
    states = {
        (part["distribution"], part["kind"], part["name"]): part["state"]
        for part in listed["parts"]
        if part["distribution"] in EXAMPLES
    }
    assert {(name, *part) for name, part in EXAMPLES.items()} <= set(states)
    assert set(states.values()) == {"ok"}
    assert listed["broken"] == []


def test_trainings_on_two_processes_equal_a_plain_loop(environment: Path, tmp_path: Path) -> None:
    """Acme's scheduler starts two processes, in which the parts are used by name, one training after the other."""
    by_name: dict[str, Any] = {"accelerator": "cpu", "precision": "sgdfp8sim", "plugins": "acme"}
    trainings: list[tuple[dict[str, Any], list[str], bool]] = [
        (by_name, ["cpu", "ddp", "acme", "sgdfp8sim"], True),
        (by_name | {"strategy": "fsdp"}, ["cpu", "fsdp", "acme", "sgdfp8sim"], True),
        ({"accelerator": "cpuaccel"}, ["cpuaccel", "ddp", "acme", "32-true"], False),
        ({"precision": "sgdfp8sim"}, ["cpuaccel", "ddp", "acme", "sgdfp8sim"], True),
        ({"strategy": "ddp_sharded"}, ["cpuaccel", "ddp_sharded", "acme", "32-true"], False),
    ]
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    (tmp_path / "job.json").write_text(
        json.dumps({"nodes": ["localhost"], "processes_per_node": 2, "port": free_port()})
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environ |= {"ACME_JOB_FILE": str(tmp_path / "job.json"), "CPUACCEL_DEVICES": "2", "OMP_NUM_THREADS": "1"}

    def process(task: int) -> list[dict[str, Any]]:
        done = subprocess.run(
            [environment / SCRIPTS / "python", "train.py", json.dumps([flags for flags, *_ in trainings])],
            cwd=tmp_path,
            env=environ | {"ACME_TASK": str(task)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return answers

    with ThreadPoolExecutor() as pool:
        ranks = list(pool.map(process, (0, 1)))
    for rank, answers in enumerate(ranks):
        for (_, chosen, rounds), answer in zip(trainings, answers, strict=True):
            losses, weights = plain(rounds)
            device = "cpu" if chosen[0] == "cpu" else f"cpuaccel:{rank}"
            assert answer["chosen"] == [*chosen, device]
            assert answer["rank"] == [rank, 2]
            assert answer["losses"] == pytest.approx(losses, rel=1e-5)
            for mine, theirs in zip(answer["weights"], weights, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert plain(rounds=True)[0] != pytest.approx(plain(rounds=False)[0], rel=1e-3), (
        "rounding changes nothing"
    )


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_auto_takes_the_device_where_its_variable_says_so(environment: Path, run: Callable[..., str]) -> None:
    found = accelerator(environment, run, CPUACCEL_DEVICES="2")
    assert (found["name"], found["devices"], found["strategy"]) == ("cpuaccel", [0, 1], "ddp")
    assert accelerator(environment, run, "--accelerator=gpu", CPUACCEL_DEVICES="1")["name"] == "cpuaccel"
    without = accelerator(environment, run)
    assert without["name"] == "cpu"
    assert {"name": "cpuaccel", "reason": "CPUACCEL_DEVICES=0"} in without["lost"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_its_own_tests(
    name: str, environment: Path, folder: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    report = tmp_path / "report.json"
    command = (environment / SCRIPTS / "python", "-m", "pytest", "-p", "no:cacheprovider", folder / name)
    print(run(*command, f"--fabric-conformance={report}", cwd=tmp_path, OMP_NUM_THREADS="1"))
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["plugins"] == {name: "1.0.0"}
    assert {result["outcome"] for result in found["results"]} <= {"passed", "skipped"}
    checked = {(result["kind"], result["name"]) for result in found["results"]}
    assert checked == {EXAMPLES[name], ("manifest", name)}


def test_what_was_uninstalled_is_told_by_its_name(environment: Path, run: Callable[..., str]) -> None:
    pip = (sys.executable, "-m", "pip", "--python", environment / SCRIPTS / "python")
    run(*pip, "--disable-pip-version-check", "uninstall", "--yes", *EXAMPLES, cwd=environment)
    asked = {
        "accelerator": ("explain", "--accelerator=cpuaccel"),
        "precision": ("explain", "--precision=sgdfp8sim"),
    }
    for kind, name in EXAMPLES.values():
        words = asked.get(kind, ("plugins", "info", name))
        with pytest.raises(AssertionError, match=f"ended with 2:(.|\n)*{name!r}(.|\n)*[Ii]nstalled: "):
            run(environment / SCRIPTS / "fabric", *words, cwd=environment)
    assert accelerator(environment, run, CPUACCEL_DEVICES="2")["name"] == "cpu"
