"""Starting the running script again, once per process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

from fabric_backends.hooks import SCRIPT
from fabric_backends.launchers.nodes import this_node
from fabric_core.contracts.launcher import Launcher, LaunchJob
from fabric_core.supervisor import current_command, run_ranks


class ScriptLauncher(Launcher):
    """Runs the script again in ``num_processes`` new processes, and ends with them.

    The parent becomes a mere supervisor, so that every rank, rank 0 included, is watched over alike: when one fails,
    the others are ended. In the ranks the script comes to the same ``launch``, which then finds the processes started
    and goes on; what stands before it in the script is run by the parent as well.
    """

    spec = SCRIPT

    def launch(self, function: Callable[[], Any], job: LaunchJob) -> NoReturn:
        """Start the script again, wait for its end, and end this process with the same exit code.

        Args:
            function: Not used here: the ranks come to it by themselves.
            job: How many processes to start, and how. With several nodes, ``NODE_RANK``, ``MASTER_ADDR`` and
                ``MASTER_PORT`` in the environment tell the place of this one.

        Raises:
            LaunchError: There is no script (a notebook, a prompt), or this node does not know its place.
            SystemExit: All processes have ended; with the exit code of the first that failed, or 0.
        """
        node = this_node(job.num_nodes, os.environ)
        code = run_ranks(
            current_command(),
            num_processes=job.num_processes,
            node_rank=node.rank,
            num_nodes=job.num_nodes,
            main_address=node.main_address,
            main_port=node.main_port,
            warm=job.warm,
        )
        raise SystemExit(code)
