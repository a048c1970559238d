"""Launchers with real processes: what runs in them, what comes back, and what is left of them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import textwrap
import time
from types import SimpleNamespace
from typing import Any

import nbclient
import nbformat
import pytest
import torch
import torch.distributed as dist

from fabric_backends.launchers.function import ForkLauncher
from fabric_backends.launchers.hazards import refuse_unsafe_fork
from fabric_backends.launchers.nodes import Node, this_node
from fabric_backends.launchers.script import ScriptLauncher
from fabric_core.contracts.launcher import LaunchJob
from fabric_core.errors import LaunchError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and forks as POSIX has them")

BEGINNING = """
import os, random, signal, sys, threading, time
import numpy
import torch
from functools import partial
from fabric_backends.launchers.function import ForkLauncher, SpawnLauncher
from fabric_core.contracts.launcher import LaunchJob
from fabric_core.errors import LaunchError, RankFailedError

def answer(value):
    torch.save(value, "answer-0.part")
    os.rename("answer-0.part", "answer-0")

def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)

def pid_written():
    name = f"pid-{os.environ['RANK']}"
    with open(name + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(name + ".part", name)
"""

FORKING = """
launcher = ForkLauncher()
found = {}

# What makes a careless copy hang: pools of threads that this process has and its copies will not.
wide = torch.randn(1200, 1200)
(wide @ wide).exp().sum()
layer = torch.nn.Conv2d(3, 8, 3)
layer(torch.randn(8, 3, 64, 64)).sum().backward()

model = torch.nn.Linear(2, 2, bias=False).share_memory()
weight = model.weight.clone()
torch.manual_seed(5)

def compute(x, *, scale):
    rank = int(os.environ["RANK"])
    drawn = torch.rand(1).item(), random.random(), numpy.random.rand()
    product = (wide @ wide).exp().sum()
    layer(torch.randn(8, 3, 64, 64)).sum().backward()
    with torch.no_grad():
        model.weight.fill_(rank)
    time.sleep(0.1 * (1 - rank))
    variables = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "FABRIC_LAUNCHED")}
    return x * scale, variables, drawn, model.weight.detach(), torch.ones(5_000_000), torch.get_num_threads()

before = dict(os.environ)
state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
started = time.monotonic()
for time_ in ("first", "second"):
    found[time_] = launcher.launch(partial(compute, 21, scale=2), LaunchJob(2))
found["the parent's next"] = torch.rand(1).item(), random.random(), numpy.random.rand()
found["environ"] = dict(os.environ) == before
found["weight"] = torch.equal(model.weight, weight)
found["threads"] = threading.active_count()

def fail(how):
    if os.environ["RANK"] == "1":
        time.sleep(0.1)
        how()
    time.sleep(60)

def crash():
    raise ValueError("no such luck")

started = time.monotonic()
try:
    launcher.launch(partial(fail, crash), LaunchJob(2))
except RankFailedError as error:
    found["exception"] = error.rank, error.exit_code, str(error)
try:
    launcher.launch(partial(fail, lambda: os.kill(os.getpid(), signal.SIGKILL)), LaunchJob(2))
except RankFailedError as error:
    found["killed"] = error.rank, error.exit_code, str(error)
try:
    launcher.launch(partial(fail, lambda: sys.exit(7)), LaunchJob(2))
except RankFailedError as error:
    found["exit"] = error.rank, error.exit_code, str(error)
found["seconds"] = time.monotonic() - started
found["nothing"] = launcher.launch(lambda: None, LaunchJob(2)), launcher.launch(sys.exit, LaunchJob(1))
found["unsendable"] = error_of(launcher.launch, lambda: threading.Lock(), LaunchJob(1))
found["graph"] = launcher.launch(lambda: (torch.ones(2, requires_grad=True) * 3).sum(), LaunchJob(1)).item()
found["threads alone"] = launcher.launch(torch.get_num_threads, LaunchJob(1))
found["children"] = open(f"/proc/self/task/{os.getpid()}/children").read()
answer(found)
"""


@pytest.fixture(scope="module")
def forked(shared_programs: Any) -> dict[str, Any]:
    script = shared_programs.write(FORKING, preamble=BEGINNING)
    finished = shared_programs.run("-W", "error", str(script), timeout=100)
    assert finished.code == 0, finished.err
    return finished.answers[0]


def test_a_launch_returns_what_rank_0_returned_any_number_of_times(forked: dict[str, Any]) -> None:
    for time_ in ("first", "second"):
        result, variables, _, weight, large, _ = forked[time_]
        assert result == 42
        assert variables == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "FABRIC_LAUNCHED": "1"}
        assert weight.tolist() == [[0, 0], [0, 0]]
        assert large.sum() == 5_000_000
    assert forked["nothing"] == (None, None)
    assert forked["graph"] == 6


def test_a_forked_rank_computes_although_the_parents_threads_are_gone(forked: dict[str, Any]) -> None:
    assert forked["first"][5] == forked["threads alone"] == 1


def test_ranks_share_no_weights_with_each_other_or_the_parent(forked: dict[str, Any]) -> None:
    assert forked["weight"] is True


def test_ranks_go_on_with_the_parents_random_streams(forked: dict[str, Any]) -> None:
    assert forked["first"][2] == forked["second"][2] == forked["the parent's next"]


def test_a_launch_leaves_nothing_behind_in_the_parent(forked: dict[str, Any]) -> None:
    assert forked["environ"] is True
    assert forked["threads"] == 1
    assert forked["children"].split() == []


def test_the_first_failure_is_raised_and_the_other_ranks_are_ended(forked: dict[str, Any]) -> None:
    rank, code, message = forked["exception"]
    assert (rank, code) == (1, 1)
    assert message.startswith("Rank 1 failed: ValueError: no such luck")
    assert message.rstrip().endswith("ValueError: no such luck")
    assert "in crash" in message
    assert "_run_rank" not in message
    assert forked["killed"][:2] == (1, 137)
    assert "SIGKILL" in forked["killed"][2]
    assert forked["exit"][:2] == (1, 7)
    assert forked["seconds"] < 15


def test_a_result_that_cannot_be_sent_is_explained(forked: dict[str, Any]) -> None:
    name, message = forked["unsendable"]
    assert name == "RankFailedError"
    assert "The function returned a lock, which cannot be sent back" in message


SPAWNING = """
import multiprocessing
from dataclasses import dataclass

@dataclass
class Result:
    value: torch.Tensor

def compute(model, same, queue, graph):
    rank = int(os.environ["RANK"])
    found = {
        "drawn": (torch.rand(1, dtype=torch.float32).item(), random.random(), numpy.random.rand()),
        "dtype": torch.get_default_dtype(),
        "flags": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "seed": torch.initial_seed(),
        "run's seed": os.environ.get("FABRIC_SEED"),
        "threads": torch.get_num_threads(),
        "shared": model.weight.is_shared(),
        "graph": graph.item(),
        "tied": model.weight is same.weight and model.weight.data_ptr() == same.view.data_ptr(),
    }
    queue.put(rank)
    with torch.no_grad():
        model.weight.fill_(rank)
    time.sleep(0.2 * (1 - rank))
    return Result(model.weight.detach()), found

if __name__ == "__main__":
    from fabric_core.data.seed import seed_everything
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    model = torch.nn.Linear(2, 2, bias=False)
    same = torch.nn.Module()
    same.weight, same.view = model.weight, model.weight.detach()
    queue = multiprocessing.get_context("spawn").Queue()
    graph = (torch.ones(2, requires_grad=True) * 3).sum()
    seed_everything(11)
    launcher = SpawnLauncher()
    result, found = launcher.launch(partial(compute, model, same, queue, graph), LaunchJob(2))
    found["queue"] = sorted([queue.get(timeout=10), queue.get(timeout=10)])
    found["result"] = type(result) is Result, result.value.tolist()
    found["the parent's next"] = torch.rand(1, dtype=torch.float32).item(), random.random(), numpy.random.rand()
    found["still the parent's own"] = not model.weight.is_shared()
    found["lambda"] = error_of(launcher.launch, lambda: 1, LaunchJob(2))
    answer(found)
"""


def test_a_spawned_rank_has_the_parents_settings_and_copies_of_its_tensors(programs: Any) -> None:
    script = programs.write(SPAWNING, preamble=BEGINNING)
    finished = programs.run("-W", "error", str(script), timeout=100)
    assert finished.code == 0, finished.err
    found = finished.answers[0]
    assert found["drawn"] == found["the parent's next"]
    assert (found["dtype"], found["flags"]) == (torch.float64, (True, True))
    assert (found["seed"], found["run's seed"]) == (11, "11")
    assert found["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (found["shared"], found["still the parent's own"]) == (False, True)
    assert found["tied"] is True
    assert found["graph"] == 6
    assert found["queue"] == [0, 1]
    assert found["result"] == (True, [[0, 0], [0, 0]])
    name, message = found["lambda"]
    assert name == "LaunchError"
    assert "'<lambda>'" in message
    assert "strategy='ddp_fork'" in message


def test_a_script_without_a_main_guard_is_told_so_once(programs: Any) -> None:
    script = programs.write(
        "def main():\n    pass\n\nSpawnLauncher().launch(main, LaunchJob(2))\n",
        preamble=BEGINNING,
    )
    finished = programs.run(str(script), timeout=100)
    assert finished.code == 1
    assert finished.err.count('if __name__ == "__main__":') == 1
    assert finished.err.count("Traceback") == 1


def test_a_fabric_in_a_script_without_a_main_guard_is_told_so_too(programs: Any) -> None:
    script = programs.write(
        "from fabric_core import Fabric\ndef train(fabric):\n    pass\n"
        "Fabric(strategy='ddp_spawn', accelerator='cpu', devices=2).launch(train)\n",
        preamble=BEGINNING,
    )
    finished = programs.run(str(script), timeout=100)
    assert finished.code == 1
    assert finished.err.count('if __name__ == "__main__":') == 1
    assert "notebook" not in finished.err
    assert finished.err.strip().endswith("Or use the strategy 'ddp' or 'ddp_fork', which need none.")


WAITING = """
def wait():
    pid_written()
    time.sleep(60)

if __name__ == "__main__":
    {"fork": ForkLauncher, "spawn": SpawnLauncher}[sys.argv[1]]().launch(wait, LaunchJob(2))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_do_not_outlive_a_parent_that_is_killed(programs: Any, gone: Any, method: str) -> None:
    parent = programs.start(str(programs.write(WAITING, preamble=BEGINNING)), method)
    programs.wait_for("pid-0", "pid-1", timeout=60)
    pids = [int((programs.folder / f"pid-{rank}").read_text()) for rank in range(2)]
    os.kill(parent.pid, signal.SIGKILL)
    assert gone(*pids) < 30


def test_an_interrupt_ends_all_ranks_at_once_and_quietly(programs: Any, gone: Any) -> None:
    parent = programs.start(str(programs.write(WAITING, preamble=BEGINNING)), "fork")
    programs.wait_for("pid-0", "pid-1")
    pids = [int((programs.folder / f"pid-{rank}").read_text()) for rank in range(2)]
    started = time.monotonic()
    os.killpg(parent.pid, signal.SIGINT)
    finished = programs.finish(parent)
    assert time.monotonic() - started < 30, "they would have slept for 60"
    assert gone(*pids) < 30
    assert finished.code == -signal.SIGINT
    assert finished.err.count("Traceback") == 1


def test_a_start_method_that_the_system_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_context(method: str) -> Any:
        raise ValueError(f"cannot find context for {method!r}")

    monkeypatch.setattr(multiprocessing, "get_context", get_context)
    with pytest.raises(LaunchError, match="cannot start processes by 'fork'"):
        ForkLauncher().launch(print, LaunchJob(2))


def test_a_process_that_uses_a_device_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    for used in (False, True):
        monkeypatch.setattr(
            torch, "get_device_module", lambda device, used=used: SimpleNamespace(is_initialized=lambda: used)
        )
        if used:
            with pytest.raises(LaunchError, match="uses the device 'meta' already"):
                ForkLauncher().launch(print, LaunchJob(2))
        else:
            refuse_unsafe_fork()


def test_a_process_that_has_a_process_group_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LaunchError, match=r"Close the Fabric"):
            refuse_unsafe_fork()
    finally:
        dist.destroy_process_group()
    refuse_unsafe_fork()


NOTEBOOK = (
    """
    import os, torch
    from functools import partial
    from fabric_backends.launchers.function import ForkLauncher
    from fabric_core.contracts.launcher import LaunchJob
    launcher = ForkLauncher()
    """,
    """
    def work(number):
        print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
        return torch.full((3,), number)
    launcher.launch(partial(work, 7), LaunchJob(2)).tolist()
    """,
    """
    def fail():
        raise ValueError("in a cell")
    try:
        launcher.launch(fail, LaunchJob(2))
    except Exception as error:
        print(type(error).__name__)
    launcher.launch(partial(work, 8), LaunchJob(2)).tolist(), "RANK" in os.environ
    """,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook client's own
def test_a_notebook_launches_a_function_of_its_own_again_and_again(tmp_path: Any) -> None:
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    texts = [
        "".join(str(o.get("text") or o["data"]["text/plain"]) for o in cell["outputs"])
        for cell in notebook.cells
    ]
    assert "[7, 7, 7]" in texts[1]
    assert {"rank 0 of 2", "rank 1 of 2"} <= set(re.findall(r"rank \d of 2", texts[1]))
    assert "RankFailedError" in texts[2]
    assert "([8, 8, 8], False)" in texts[2]


SCRIPT = """
import os, sys
from functools import partial
from fabric_backends.launchers.script import ScriptLauncher
from fabric_core.contracts.launcher import LaunchJob
if "FABRIC_LAUNCHED" not in os.environ:
    open(f"parent-{os.environ.get('NODE_RANK', 0)}", "w").close()
    ScriptLauncher().launch(print, LaunchJob(int(sys.argv[1]), int(sys.argv[2])))
    open("returned", "w").close()
names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR")
with open("said-" + os.environ["RANK"], "w") as file:
    print(*(os.environ[name] for name in names), *sys.argv[1:], file=file)
if sys.argv[3:] == ["fail"] and os.environ["RANK"] == "1":
    raise ValueError("no such luck")
"""


def said(programs: Any, rank: int) -> str:
    return (programs.folder / f"said-{rank}").read_text().strip()


def test_the_script_launcher_runs_the_script_again_and_ends_with_it(programs: Any) -> None:
    script = programs.write(SCRIPT, preamble="")
    finished = programs.run(str(script), "2", "1", "more")
    assert (finished.code, finished.err) == (0, "")
    assert said(programs, 0) == "0 0 0 2 127.0.0.1 2 1 more"
    assert said(programs, 1) == "1 1 0 2 127.0.0.1 2 1 more"
    assert not (programs.folder / "returned").exists()


def test_the_script_launcher_ends_with_the_exit_code_and_traceback_of_the_rank_that_failed(
    programs: Any,
) -> None:
    finished = programs.run(str(programs.write(SCRIPT, preamble="")), "2", "1", "fail")
    assert finished.code == 1
    assert "rank 1 failed: ValueError: no such luck" in finished.err
    assert finished.err.rstrip().endswith("ValueError: no such luck")


def test_the_script_launcher_joins_nodes_by_the_environment(programs: Any) -> None:
    script = programs.write(SCRIPT, preamble="")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [
        programs.start(str(script), "1", "2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for node in range(2)
    ]
    for node in nodes:
        finished = programs.finish(node)
        assert finished.code == 0, finished.err
    assert said(programs, 0) == "0 0 0 2 127.0.0.1 1 2"
    assert said(programs, 1) == "1 0 1 2 127.0.0.1 1 2"


def test_the_script_launcher_needs_a_script(programs: Any) -> None:
    code = (
        "from fabric_backends.launchers.script import ScriptLauncher as L; "
        "from fabric_core import LaunchJob; L().launch(print, LaunchJob(2))"
    )
    finished = programs.run("-c", code)
    assert finished.code == 1
    assert "choose a launcher that forks" in finished.err


def test_one_of_several_nodes_has_to_know_its_place() -> None:
    with pytest.raises(LaunchError, match="NODE_RANK and MASTER_ADDR are not set"):
        ScriptLauncher().launch(print, LaunchJob(2, 2))
    with pytest.raises(LaunchError, match="NODE_RANK='first'"):
        this_node(2, {"NODE_RANK": "first", "MASTER_ADDR": "a"})
    assert this_node(2, {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}) == Node(1, "a", 5)
    assert this_node(1, {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}) == Node()
