"""Training under torchrun: a worker is killed, on one node and on two, and the restarted job goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fabric_core.orphans import die_with_parent

pytestmark = pytest.mark.engine

TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=1",
    "--nnodes=2",
    "--max_restarts=1",
)
PORT = 29511


@dataclass(frozen=True)
class Node:
    """A namespace of the network, which has one interface to the other node.

    Attributes:
        name, interface, address: What they are called.
    """

    name: str
    interface: str
    address: str


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two nodes that are joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("not run: two nodes want namespaces of the network (apt-get install iproute2)")
    found = [Node(f"fab{os.getpid()}n{i}", f"fab{i}", f"10.77.0.{i + 1}") for i in range(2)]
    first, second = found
    if subprocess.run(["ip", "netns", "add", first.name], capture_output=True).returncode:
        pytest.skip("not run: two nodes want namespaces of the network, which this user may not make")
    try:
        ip("netns", "add", second.name)
        ends = (first.interface, "netns", first.name), (second.interface, "netns", second.name)
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for node in found:
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            ip("-n", node.name, "link", "set", "lo", "up")
            ip("-n", node.name, "link", "set", node.interface, "up")
        yield found
    finally:
        for node in found:
            subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20)


def start(command: list[str], environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )


def finish(agents: list[subprocess.Popen[str]]) -> list[str]:
    """What the agents print; all must end well, and none outlives the test."""
    try:
        printed = [agent.communicate(timeout=100)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n".join(printed)
    return printed


def test_two_nodes_go_on_after_the_worker_of_one_was_killed(
    nodes: list[Node], job: Any, clean_environ: dict[str, str]
) -> None:
    agents = []
    for index, node in enumerate(nodes):
        meeting = (
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={nodes[0].address}:{PORT}",
            f"--local_addr={node.address}",
        )
        hosting = f"--rdzv_conf=is_host={1 - index}"
        command = [
            "ip",
            "netns",
            "exec",
            node.name,
            *TORCHRUN,
            *meeting,
            hosting,
            *job.command("--crash-at", 5)[1:],
        ]
        agents.append(start(command, {**clean_environ, "GLOO_SOCKET_IFNAME": node.interface}))
    printed = finish(agents)
    assert any("exitcode: -9" in text for text in printed)
    ranks = job.ranks()
    # Which of the agents becomes node 0 is theirs to decide, anew after each restart.
    job.check("torchelastic", ranks=[[0, 0, 0], [1, 0, 1]])
    assert [facts["began"] for facts in ranks] == [5, 5]
    assert ranks[0]["place"][0] in {node.address for node in nodes}


def test_one_node_goes_on_after_one_of_its_workers_was_killed(
    job: Any, clean_environ: dict[str, str]
) -> None:
    command = [*TORCHRUN[:3], "--nproc_per_node=2", "--standalone", "--max_restarts=1"]
    (printed,) = finish([start([*command, *job.command("--crash-at", 2)[1:]], clean_environ)])
    assert "exitcode: -9" in printed
    job.check("torchelastic", ranks=[[0, 0, 0], [1, 1, 0]])
    assert [(facts["began"], facts["restarts"]) for facts in job.ranks()] == [(2, 1)] * 2
