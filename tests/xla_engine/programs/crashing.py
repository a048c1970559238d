"""The training of the crash tests on two XLA devices, killed again and again: ``crashing.py CONFIG``, as ``server.py``.

With ``two_chips`` in ``PYTHONPATH``, torch_xla starts a process for each; they talk to each other as `by_host` says.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import server
from training import RANKS, Job, train

from fabric_core import LaunchJob
from fabric_xla.launcher import XLAForkLauncher


def launch(strategy: str, job: Job) -> None:
    """Train on the devices."""
    XLAForkLauncher().launch(partial(train_here, strategy, job), LaunchJob(RANKS))


def train_here(strategy: str, job: Job) -> None:
    import by_host  # which knows its rank from the first line

    by_host.talk_by_host()
    with by_host.opened(strategy) as fabric:
        train(fabric, job)


if __name__ == "__main__":
    print(json.dumps(server.main(json.loads(sys.argv[1]), launch)))
