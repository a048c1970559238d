"""What a cluster environment may do for a job besides naming its ranks: join it, and announce its end."""

from __future__ import annotations

from typing import Any

from fabric_core import Fabric
from fabric_core.parts.local import LocalEnvironment
from fabric_core.supervisor import PREEMPTED


class Noting(LocalEnvironment):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def validate(self, processes_per_node: int, num_nodes: int) -> None:
        self.calls.append("validate")

    def join(self) -> None:
        self.calls.append("join")

    def accept_requeue(self) -> None:
        self.calls.append("accept_requeue")

    def teardown(self) -> None:
        self.calls.append("teardown")


def test_an_environment_joins_once_it_has_agreed_to_the_plan_and_ends_with_the_fabric() -> None:
    environment = Noting()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[environment])
    assert fabric.cluster_environment is environment
    assert environment.calls == []
    fabric.launch()
    fabric.barrier()
    assert not fabric.preempted
    fabric.close()
    assert environment.calls == ["validate", "join", "teardown"]


AGREEING = """
from fabric_core import Fabric

class Announcing(LocalEnvironment):
    step, accepted = 0, False

    @property
    def requeue_requested(self):
        return self.global_rank() == 1 and self.step >= 3

    def accept_requeue(self):
        self.accepted = True

environment = Announcing()
with Fabric(accelerator="cpu", strategy="ddp", plugins=[environment]) as fabric:
    fabric.launch()
    for environment.step in range(200):
        if fabric.preempted:
            break
    answer((environment.step, environment.accepted))
"""


def test_what_one_rank_has_heard_ends_all_at_the_same_step(programs: Any) -> None:
    finished = programs.on_ranks(AGREEING)
    assert finished.code == PREEMPTED, finished.err
    (step, accepted), other = (finished.answers[rank] for rank in range(2))
    assert accepted
    assert other == (step, accepted)
    assert 3 <= step < 3 + 64
