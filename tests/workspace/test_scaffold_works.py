"""What ``fabric plugins new`` makes works as it is: its wheels build, and pass their tests where they are installed.

One fresh environment holds the core and a new plugin of each kind, all from wheels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fabric_core.scaffold.kinds import WORDS

SCRIPTS = "Scripts" if os.name == "nt" else "bin"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def empty(fresh: Callable[[str], Path]) -> Path:
    """A fresh environment with the core and the kit."""
    return fresh("fabric-core[testing]")


@pytest.fixture(scope="module")
def projects(
    empty: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]
) -> dict[str, Path]:
    """A new plugin of each kind, by that kind, made by what is in the core's wheel."""
    folder = tmp_path_factory.mktemp("projects")
    made = {}
    for kind in WORDS:
        run(empty / SCRIPTS / "fabric", "plugins", "new", kind, f"acme-{kind}", cwd=folder)
        made[kind] = folder / f"fabric-acme-{kind}"
    return made


@pytest.fixture(scope="module")
def environment(
    empty: Path,
    projects: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    run: Callable[..., str],
    install: Callable[[list[Path], Path], None],
) -> Path:
    """The same environment with the new plugins, from their wheels."""
    folder = tmp_path_factory.mktemp("built")
    for project in projects.values():
        run(
            *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project),
            cwd=folder,
        )
    install(sorted(folder.iterdir()), empty)
    return empty


def test_every_new_part_is_listed_and_usable(environment: Path, run: Callable[..., str]) -> None:
    listed = json.loads(run(environment / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=environment))
    new = {part["kind"]: part["state"] for part in listed["parts"] if part["name"].startswith("acme-")}
    assert new == {kind.replace("-", " "): "ok" for kind in WORDS}


@pytest.mark.parametrize("kind", WORDS)
def test_a_new_plugin_passes_its_own_tests(
    kind: str, projects: dict[str, Path], environment: Path, run: Callable[..., str]
) -> None:
    printed = run(
        *(environment / SCRIPTS / "python", "-m", "pytest", "-p", "no:cacheprovider"),
        cwd=projects[kind],
        timeout=280,
        OMP_NUM_THREADS="1",
    )
    print(printed)
    assert re.search(r"^=+ \d+ passed", printed, re.MULTILINE), printed
    report = json.loads((projects[kind] / "fabric-conformance.json").read_text(encoding="utf-8"))
    assert report["plugins"] == {f"fabric-acme-{kind}": "0.1.0"}
    assert kind.replace("-", " ") in {result["kind"] for result in report["results"]}


TRAIN = """
import torch
from fabric_core import Fabric

fabric = Fabric(
    strategy="acme-strategy", accelerator="acme-accelerator", precision="acme-precision", devices=2,
    plugins=["acme-launcher", "acme-checkpoint-io"], loggers=["acme-logger"], strategy_options={"timeout": 60.0},
)
fabric.launch()
torch.manual_seed(fabric.global_rank)
model = torch.nn.Linear(4, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
begin = [parameter.detach().clone() for parameter in model.parameters()]
torch.manual_seed(7)
inputs, targets = torch.randn(3, 8, 4), torch.randn(3, 8, 1)
mine = slice(4 * fabric.global_rank, 4 * fabric.global_rank + 4)
for step in range(3):
    loss = torch.nn.functional.mse_loss(model(inputs[step, mine]), targets[step, mine])
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.log("loss", loss, step=step)
fabric.save("model.ckpt", {"model": model})
fabric.close()

plain = torch.nn.Linear(4, 1)
with torch.no_grad():
    for parameter, value in zip(plain.parameters(), begin):
        parameter.copy_(value)
optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for step in range(3):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = plain(inputs[step])
    torch.nn.functional.mse_loss(outputs.float(), targets[step]).backward()
    optimizer.step()
    optimizer.zero_grad()
for one, other, before in zip(model.parameters(), plain.parameters(), begin):
    assert (one - before).abs().max() > 0.01
    torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=2e-3)
"""


def test_all_new_parts_train_together_on_two_processes(
    environment: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    """The numbers of a plain loop over the whole batch; one checkpoint, and the lines of rank 0."""
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    run(environment / SCRIPTS / "python", "train.py", cwd=tmp_path, OMP_NUM_THREADS="1")
    lines = (tmp_path / "acme-logger.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("step") for line in lines] == [0, 1, 2, None]
    assert json.loads(lines[-1])["status"] == "success"
    assert (tmp_path / "model.ckpt").is_file()


CLUSTER = TRAIN.replace('"acme-launcher", "acme-checkpoint-io"', '"acme-cluster-environment"').replace(
    'loggers=["acme-logger"], ', ""
)


def test_the_new_cluster_environment_says_who_each_of_two_processes_is(
    environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        CLUSTER + "print(fabric.global_rank, fabric.plan.cluster_environment.name)\n", encoding="utf-8"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": 2, "LOCAL_SIZE": 2, "NODE_RANK": 0, "MAIN_ADDRESS": "127.0.0.1", "MAIN_PORT": port}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    processes = []
    for rank in range(2):
        values = {**job, "RANK": rank, "LOCAL_RANK": rank}
        variables = {f"ACME_CLUSTER_ENVIRONMENT_{name}": str(value) for name, value in values.items()}
        processes.append(
            subprocess.Popen(
                [environment / SCRIPTS / "python", "train.py"],
                cwd=tmp_path,
                env={**clean, **variables, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert [out for out, _ in ended] == [f"{rank} acme-cluster-environment\n" for rank in range(2)]


def test_new_plugins_are_clean_by_their_own_settings_and_by_ours(
    projects: dict[str, Path], tmp_path: Path, root: Path, run: Callable[..., str]
) -> None:
    """Also with the longest name that there may be."""
    tools = Path(sys.executable).parent
    long = tmp_path / "long"
    for kind in WORDS:
        run(tools / "fabric", "plugins", "new", kind, "a" * 32, "--dir", long / kind, cwd=tmp_path)
    for project in (*projects.values(), *long.iterdir()):
        run(tools / "ruff", "check", "--no-cache", ".", cwd=project)
    for project in projects.values():
        ours = ("--config", root / "pyproject.toml", "--config", "src=['src']")
        strangers = ("--config", "lint.isort.known-third-party=['fabric_core']")
        run(tools / "ruff", "check", "--no-cache", *ours, *strangers, "src", cwd=project)


def test_new_plugins_are_typed_strictly(
    projects: dict[str, Path], tmp_path: Path, root: Path, run: Callable[..., str]
) -> None:
    sources = [project / "src" for project in projects.values()]
    packages = [package.name for source in sources for package in source.iterdir()]
    cache = tmp_path / "cache"
    if (root / ".mypy_cache").is_dir():  # what `make check` has seen, and has not changed
        shutil.copytree(root / ".mypy_cache", cache)
    run(
        *(sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", "--cache-dir", cache),
        *(word for package in packages for word in ("-p", package)),
        cwd=tmp_path,
        timeout=280,
        MYPYPATH=os.pathsep.join(map(str, sources)),
    )


BESIDE = """
import sys
import torch
from fabric_core import Fabric, FabricError

try:
    with Fabric(strategy=sys.argv[1], accelerator="cpu", devices=1) as fabric:
        model = fabric.setup(torch.nn.Linear(4, 1))
        print(fabric.plan.strategy.identity, model(torch.ones(2, 4)).shape)
except FabricError as error:
    print(type(error).__name__, error)
"""


def test_a_stranger_s_part_is_used_and_missed_as_ours_are(
    environment: Path,
    wheels: dict[str, Path],
    install: Callable[[list[Path], Path], None],
    tmp_path: Path,
    run: Callable[..., str],
) -> None:
    """The last of this file: what it uninstalls stays away."""
    python = environment / SCRIPTS / "python"
    (tmp_path / "beside.py").write_text(BESIDE, encoding="utf-8")
    install([wheels["fabric_backends"], wheels["fabric_cuda"]], environment)

    def told(strategy: str) -> str:
        return run(python, "beside.py", strategy, cwd=tmp_path, OMP_NUM_THREADS="1")

    shape = "torch.Size([2, 1])"
    assert told("acme-strategy") == f"acme-strategy (from fabric-acme-strategy 0.1.0) {shape}\n"
    assert told("ddp").startswith("ddp (from fabric-backends ")
    listed = run(environment / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=tmp_path)
    states = {part["distribution"]: part["state"] for part in json.loads(listed)["parts"]}
    assert {f"fabric-acme-{kind}" for kind in WORDS} | {"fabric-backends"} <= set(states)

    gone = ("fabric-acme-strategy", "fabric-cuda", "fabric-backends")
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "--yes", *gone, cwd=tmp_path)
    missed = told("acme-strategy")
    assert missed.startswith("UnknownPluginError No strategy is named 'acme-strategy'.")
    assert "Installed: single_device." in missed
    missed = told("ddp")
    assert missed.startswith("UnknownPluginError No strategy is named 'ddp'.")
    assert missed.rstrip().endswith("pip install fabric-backends.")
