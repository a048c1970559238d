"""Starting the ranks of one node and watching over them until the last has ended. Standard library only.

Design, in the order of the files:

- `failures`: how a rank tells why it failed: one file per rank in a private directory, stamped with the
  system-wide monotonic clock, so that the *first* failure is known even when several are found at once.
- `milestones`: what a rank tells while it lives: that it has met the others, that it stops before the end.
- `tracebacks`, `signals`, `entry`, `program`: what runs inside a rank. `enter_rank` ties its life to the
  supervisor's and records how it ends; `program` runs the user's script as the real ``__main__``.
- `children`, `outcome`, `watch`: the one supervision loop, for anything that is a `Child`.
- `variables`, `network`, `restarts`, `launch`: the environment of a rank, the meeting point, what follows a failure,
  and `run_ranks` over it all.

The ranks stay in the supervisor's process group, so that the terminal's Ctrl-C and Ctrl-Z reach all of them, and
they may read from it. The supervisor passes an interrupt on as well, in case it alone was interrupted; a rank
therefore heeds the first and ignores the second. What is sent, and when:

    a rank failed      to the others: after 0.25 s SIGTERM, after the grace period SIGKILL; instead of SIGTERM at once
                       SIGKILL to those that would take it for the announcement of an end
    SIGTERM, SIGHUP    passed on, after the grace period SIGKILL; passed on again when it comes again
    SIGUSR1, SIGUSR2   passed on; they announce an end, and whoever sends them sees to it
    Ctrl-C             SIGINT, after 1 s SIGTERM, after 2 s SIGKILL; a second Ctrl-C: SIGKILL at once

``kill -9`` of the supervisor needs no code here: the ranks have asked the kernel to die with it
(`fabric_core.orphans`), as loader workers should with their rank. The kernel means the *thread* that started
them, which is why `supervise` both starts the children and waits for them.
"""

from __future__ import annotations

from fabric_core.supervisor.children import Child, ProcessChild
from fabric_core.supervisor.entry import enter_rank
from fabric_core.supervisor.failures import (
    Failure,
    error_directory,
    failed_at,
    mark_failure,
    read_failure,
    write_failure,
)
from fabric_core.supervisor.launch import DEFAULT_MAIN_PORT, RankCommand, current_command, run_ranks
from fabric_core.supervisor.milestones import Milestone, tell_supervisor
from fabric_core.supervisor.network import listening_socket, meeting_point
from fabric_core.supervisor.outcome import PREEMPTED, Outcome, raise_for_outcome, report
from fabric_core.supervisor.tracebacks import strip_plumbing, summary_of, text_of
from fabric_core.supervisor.variables import ERROR_DIR, LISTEN_FD, rank_variables
from fabric_core.supervisor.watch import supervise

__all__ = [
    "Child",
    "DEFAULT_MAIN_PORT",
    "ERROR_DIR",
    "Failure",
    "LISTEN_FD",
    "Milestone",
    "Outcome",
    "PREEMPTED",
    "ProcessChild",
    "RankCommand",
    "current_command",
    "enter_rank",
    "error_directory",
    "failed_at",
    "listening_socket",
    "mark_failure",
    "meeting_point",
    "raise_for_outcome",
    "rank_variables",
    "read_failure",
    "report",
    "run_ranks",
    "strip_plumbing",
    "summary_of",
    "supervise",
    "tell_supervisor",
    "text_of",
    "write_failure",
]
