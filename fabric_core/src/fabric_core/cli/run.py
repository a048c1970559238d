"""``fabric run``: the script, on as many processes as the flags say.

The flags reach the script's ``Fabric`` in one environment variable. Where they ask for processes, the ranks are started
and supervised here. Where they do not, or something else (a cluster's own starter) has started this process as one of
a job already, this process becomes the script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from fabric_core.cli import words
from fabric_core.cli.flags import FLAGS, given, import_from, option_name, options
from fabric_core.cli.named import check_named, decided
from fabric_core.cli.parts_help import PartsCommand
from fabric_core.cli.words import Call
from fabric_core.errors import ConfigurationError, listing
from fabric_core.plan import Plan, Request
from fabric_core.registry import Registry, default_registry
from fabric_core.settings import find_tables, flag

STARTING: Mapping[str, tuple[str, str]] = {
    "node_rank": ("NUMBER", "The number of this node, from 0."),
    "main_address": ("HOST", "Where node 0 is, as all nodes see it."),
    "main_port": ("PORT", "Where global rank 0 listens; any free port on a single node."),
    "max_restarts": ("NUMBER", "How often all ranks are started again when one has failed; 0 by default."),
    "start": ("HOW", "Copy the ranks from one 'warm' process, start them 'fresh', or 'auto'."),
    "grace": ("SECONDS", "How long ranks have from SIGTERM to their end; 30 by default."),
}
"""The flags that say how the ranks are started and watched."""


class RunCommand(PartsCommand):
    """A command whose options stand before or after the script, among the script's own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Sort the words; click's own parser would take the script's options for ours."""
        ctx.params["call"] = words.sort(args, (*FLAGS, *STARTING), ctx)
        return []

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What follows ``fabric run`` in the usage line."""
        return ["[OPTIONS]", "SCRIPT | -m MODULE", "[SCRIPT OPTIONS]"]


@click.command(cls=RunCommand, params=[*options(), *options(STARTING)])
def run(call: Call) -> None:
    """Run a script, on as many processes as the flags say.

    Our options may stand before or after the script; all others go to the script, and so does everything after "--".
    They need not be repeated in the script: its Fabric hears of them. What the script states itself must agree.

    --KIND.OPTION=VALUE sets an option of the strategy, precision, accelerator, cluster-environment, launcher or
    checkpoint-io. With --strategy=NAME, this help lists the options of that strategy, and so for the others.

    With --devices or --num-nodes the processes of this node are started and watched here: when one fails, the others
    are ended, and its traceback and exit code are what remains; or all are started again, with --max-restarts. Exit
    code 75 means that the script has stopped before its end, as fabric.preempted told it to. Under torchrun, srun and
    the like, the processes are there already, and the script runs in place.
    """
    words.check_target(call)
    for theirs, meant in call.near.items():
        click.echo(
            f"fabric run: {theirs!r} is not an option of ours and goes to the script; did you mean {meant!r}?",
            err=True,
        )
    flags = given(call.flags)
    registry = default_registry()
    started_by = _started_by(registry)
    starts_here = not started_by and bool({"devices", "num_nodes"} & set(flags))
    if not starts_here:
        _refuse_starting(call, started_by)
    _refuse_launcher(call, started_by or ("fabric run" if starts_here else ""))
    check_named(flags, call.options, registry)
    message = _message(flags, call)
    if not starts_here:
        _become(call, message)
    import_from(os.getcwd() if call.is_module else os.path.dirname(os.path.realpath(call.target)), flags)
    sys.exit(_start(call, message, _plan(flags, call, registry)))


def _message(flags: Mapping[str, Any], call: Call) -> dict[str, str]:
    """What the script's processes are told, as environment variables; nothing where nothing was said."""
    from fabric_core.request import OPTIONS, RUN_VARIABLE

    said = {**flags, OPTIONS: call.options} if call.options else flags
    return {RUN_VARIABLE: json.dumps(said)} if said else {}


def _started_by(registry: Registry) -> str:
    """What has started this process as one of a job; empty when nothing has."""
    from fabric_core.resolve.hardware import choose_environment

    environment, detected, warnings = choose_environment(None, registry, os.environ)
    for warning in warnings:
        click.echo(f"fabric: warning: {warning}", err=True)
    return environment.name if detected is not None else ""


def _plan(flags: Mapping[str, Any], call: Call, registry: Registry) -> Plan:
    from fabric_core.resolve import resolve

    request = Request(**flags, texts=decided(flags, call.options), tables=find_tables(), environ=os.environ)
    return resolve(request, registry)


def _refuse_launcher(call: Call, started_by: str) -> None:
    useless = [flag("launcher", name) for name in call.options.get("launcher", {})]
    if useless and started_by:
        raise ConfigurationError(
            f"{listing(useless)} cannot be given here: {started_by!r} starts the processes, and no launcher does."
        )


def _refuse_starting(call: Call, started_by: str) -> None:
    useless = [option_name(name) for name in STARTING if name in call.flags]
    if useless and started_by:
        raise ConfigurationError(
            f"{listing(useless)} cannot be given here: {started_by!r} has started the processes, and watches them."
        )
    if useless:
        raise ConfigurationError(
            f"{listing(useless)} without --devices and --num-nodes has no meaning: no process is started here."
        )


def _become(call: Call, message: dict[str, str]) -> NoReturn:
    """Turn this process into the script, so that signals, exit code and terminal are the script's own."""
    from fabric_core.request import RUN_VARIABLE

    interpreter: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    target = ["-m", call.target] if call.is_module else [call.target]
    argv = [sys.executable, *interpreter, *target, *call.args]
    inherited = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}
    environ = inherited | message
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(sys.executable, argv, environ)
    sys.exit(subprocess.call(argv, env=environ))


def _start(call: Call, message: dict[str, str], plan: Plan) -> int:
    """Run the ranks of this node to their end; their exit code."""
    from fabric_core.starting import way_to_start
    from fabric_core.supervisor import RankCommand, run_ranks

    node_rank = _number(call, "node_rank", 0, plan.num_nodes - 1) or 0
    main_address = call.flags.get("main_address")
    if plan.num_nodes > 1 and main_address is None:
        raise ConfigurationError(
            f"--num-nodes={plan.num_nodes} needs --main-address: the host name or IP address of node 0, as all nodes "
            "see it."
        )
    return run_ranks(
        RankCommand(call.target, call.is_module, call.args),
        num_processes=plan.processes_per_node,
        node_rank=node_rank,
        num_nodes=plan.num_nodes,
        main_address=main_address or "127.0.0.1",
        main_port=_number(call, "main_port", 1, 65535),
        env=message,
        grace=call.flags.get("grace"),
        max_restarts=_number(call, "max_restarts", 0, 1_000_000) or 0,
        warm=way_to_start(plan, os.environ, call.flags.get("start")).warm,
    )


def _number(call: Call, name: str, lowest: int, highest: int) -> int | None:
    text = call.flags.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and lowest <= int(text) <= highest):
        raise ConfigurationError(
            f"{option_name(name)}={text} has to be a whole number from {lowest} to {highest}"
            f"{' (--num-nodes minus 1)' if name == 'node_rank' else ''}."
        )
    return int(text)
