"""Jobs that torchrun has started: recognised by their variables, and run for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from fabric_backends.environments.torchelastic import TorchElasticEnvironment, detect
from fabric_core.errors import ConfigurationError
from fabric_core.specs import Detection

VARIABLES = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "2",
    "WORLD_SIZE": "6",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
}


def test_a_job_of_torchrun_is_recognised_by_its_run_id() -> None:
    found = detect(VARIABLES)
    assert found == Detection(2, 3, "TORCHELASTIC_RUN_ID is set")
    assert detect({name: VARIABLES[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}) is None


def test_what_torchrun_leaves_open_is_not_guessed() -> None:
    unequal = detect({**VARIABLES, "WORLD_SIZE": "5"})
    assert unequal is not None
    assert (unequal.processes_per_node, unequal.num_nodes) == (None, None)
    assert "unequal" in unequal.note
    assert detect({"TORCHELASTIC_RUN_ID": "x"}) == Detection(note="TORCHELASTIC_RUN_ID is set")


def test_detection_imports_no_pytorch() -> None:
    code = (
        "import sys; from fabric_backends.environments.torchelastic import detect;"
        "detect({'TORCHELASTIC_RUN_ID': '1'}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_ranks_come_from_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        if name != "TORCHELASTIC_RUN_ID":  # which would tie this process to its parent
            monkeypatch.setenv(name, value)
    environment = TorchElasticEnvironment()
    assert environment.creates_processes_externally
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (5, 1, 2)
    assert (environment.world_size(), environment.single_node) == (6, False)
    assert (environment.main_address, environment.main_port) == ("node0", 29400)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.single_node


def test_a_variable_that_is_missing_or_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    environment = TorchElasticEnvironment()
    with pytest.raises(ConfigurationError, match="needs the environment variable RANK, which is not set"):
        environment.global_rank()
    with pytest.raises(ConfigurationError, match="WORLD_SIZE is 'two', which is no number"):
        environment.world_size()


RESTARTED = """
from fabric_backends.environments.torchelastic import TorchElasticEnvironment
environment = TorchElasticEnvironment()
strategy = connected(environment, init_timeout=30)
found = {
    "ranks": (strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank),
    "sum": strategy.all_reduce(torch.tensor(rank + 1), "sum").item(),
    "agent's store": os.environ["TORCHELASTIC_USE_AGENT_STORE"],
    "attempt": os.environ["TORCHELASTIC_RESTART_COUNT"],
    "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
}
strategy.teardown()
strategy = connected(environment)  # again, in the same store
found["again"] = strategy.all_reduce(torch.tensor(rank + 1), "sum").item()
if found["attempt"] == "0":
    strategy.barrier()
    os._exit(3)  # leaving everything in the store
strategy.teardown()
answer(found)
"""

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


def test_the_ranks_of_torchrun_meet_again_after_a_restart_in_the_same_store(programs: Any) -> None:
    script = programs.write(RESTARTED)
    finished = programs.run(*TORCHRUN, "--max-restarts=1", str(script), timeout=100)
    assert finished.code == 0, finished.err
    for rank in range(2):
        found = finished.answers[rank]
        assert found["ranks"] == (2, rank, rank, 0)
        assert (found["agent's store"], found["attempt"]) == ("True", "1")
        assert (found["sum"], found["again"]) == (3, 3)
        assert found["interface"] == "lo"


def test_workers_do_not_outlive_a_torchrun_that_is_killed(programs: Any, gone: Any) -> None:
    script = programs.write(
        """
from fabric_backends.environments.torchelastic import TorchElasticEnvironment
strategy = connected(TorchElasticEnvironment())
answer((os.getpid(), strategy.all_reduce(torch.tensor(rank + 1), "sum").item()))
time.sleep(60)
"""
    )
    # Here rank 0 serves the store, not torchrun.
    torchrun = programs.start(*TORCHRUN, str(script), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    programs.wait_for("answer-0", "answer-1", timeout=60)
    os.kill(torchrun.pid, signal.SIGKILL)
    finished = programs.finish(torchrun)
    pids, sums = zip(*finished.answers.values(), strict=True)
    assert sums == (3, 3)
    assert gone(*pids) < 30
