"""Starting the ranks of one node and watching over them until the last has ended. Standard library only.

Design, in the order of the files:

- `failures`: how a rank tells why it failed: one file per rank in a private directory, stamped with the
  system-wide monotonic clock, so that the *first* failure is known even when several are found at once.
- `milestones`: what a rank tells while it lives: that it has met the others, that it stops before the end.
- `tracebacks`, `signals`, `entry`, `program`: what runs inside a rank. `enter_rank` ties its life to the
  supervisor's and records how it ends; `program` runs the user's script as the real ``__main__``.
- `children`, `outcome`, `watch`: the one supervision loop, for anything that is a `Child`.
- `command`, `messages`, `copies`, `starters`: the program, and how a process comes to run it as a rank: a fresh
  interpreter, or a copy of one that has imported PyTorch already.
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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_core.supervisor.children import Child as Child
    from fabric_core.supervisor.children import ProcessChild as ProcessChild
    from fabric_core.supervisor.children import exit_code_of as exit_code_of
    from fabric_core.supervisor.command import RankCommand as RankCommand
    from fabric_core.supervisor.command import current_command as current_command
    from fabric_core.supervisor.entry import enter_rank as enter_rank
    from fabric_core.supervisor.failures import Failure as Failure
    from fabric_core.supervisor.failures import error_directory as error_directory
    from fabric_core.supervisor.failures import failed_at as failed_at
    from fabric_core.supervisor.failures import mark_failure as mark_failure
    from fabric_core.supervisor.failures import read_failure as read_failure
    from fabric_core.supervisor.failures import write_failure as write_failure
    from fabric_core.supervisor.launch import DEFAULT_MAIN_PORT as DEFAULT_MAIN_PORT
    from fabric_core.supervisor.launch import run_ranks as run_ranks
    from fabric_core.supervisor.milestones import Milestone as Milestone
    from fabric_core.supervisor.milestones import tell_supervisor as tell_supervisor
    from fabric_core.supervisor.network import listening_socket as listening_socket
    from fabric_core.supervisor.network import meeting_point as meeting_point
    from fabric_core.supervisor.network import reserved_socket as reserved_socket
    from fabric_core.supervisor.outcome import PREEMPTED as PREEMPTED
    from fabric_core.supervisor.outcome import Outcome as Outcome
    from fabric_core.supervisor.outcome import died_of as died_of
    from fabric_core.supervisor.outcome import raise_for_outcome as raise_for_outcome
    from fabric_core.supervisor.outcome import report as report
    from fabric_core.supervisor.starters import WarmStart as WarmStart
    from fabric_core.supervisor.starters import read_early as read_early
    from fabric_core.supervisor.tracebacks import strip_plumbing as strip_plumbing
    from fabric_core.supervisor.tracebacks import summary_of as summary_of
    from fabric_core.supervisor.tracebacks import text_of as text_of
    from fabric_core.supervisor.variables import ERROR_DIR as ERROR_DIR
    from fabric_core.supervisor.variables import LISTEN_FD as LISTEN_FD
    from fabric_core.supervisor.variables import rank_variables as rank_variables
    from fabric_core.supervisor.watch import supervise as supervise

_HOME = {
    "children": ("Child", "ProcessChild", "exit_code_of"),
    "command": ("RankCommand", "current_command"),
    "entry": ("enter_rank",),
    "failures": ("Failure", "error_directory", "failed_at", "mark_failure", "read_failure", "write_failure"),
    "launch": ("DEFAULT_MAIN_PORT", "run_ranks"),
    "milestones": ("Milestone", "tell_supervisor"),
    "network": ("listening_socket", "meeting_point", "reserved_socket"),
    "outcome": ("PREEMPTED", "Outcome", "died_of", "raise_for_outcome", "report"),
    "starters": ("WarmStart", "read_early"),
    "tracebacks": ("strip_plumbing", "summary_of", "text_of"),
    "variables": ("ERROR_DIR", "LISTEN_FD", "rank_variables"),
    "watch": ("supervise",),
}
"""Where each name is. Its module is imported when it is first used: a rank needs other ones than a supervisor."""

_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
