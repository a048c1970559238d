"""``fabric doctor``: what is here, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from fabric_core.cli.show import show_json, show_table
from fabric_core.cli.states import state_of
from fabric_core.contract_versions import CURRENT, oldest
from fabric_core.errors import FabricError, listing
from fabric_core.registry import Registry, default_registry
from fabric_core.registry.discovery import find_plugins, installed_version
from fabric_core.requirements import unmet_dependencies


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool) -> None:
    """Show versions, devices and the cluster environment, and what is broken and why.

    The exit code is 1 when something is broken.
    """
    registry = default_registry()
    devices, environments = _devices(registry), _environments(registry)
    report: dict[str, Any] = {
        "versions": _versions(),
        "contracts": {kind: [oldest(kind), version] for kind, version in CURRENT.items()},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("FABRIC_")
        },
        "devices": devices,
        "cluster_environments": environments,
        "problems": [
            *_problems(registry),
            *_unmet(registry),
            *_unusable(registry),
            *_silent((*devices, *environments)),
        ],
        "blocked": [{"distribution": f.distribution, "version": f.version} for f in registry.blocked],
    }
    if as_json:
        show_json(report)
    else:
        _show(report)
    sys.exit(any(problem["broken"] for problem in report["problems"]))


def _versions() -> dict[str, str]:
    """Of what matters, by name. Read from metadata: nothing is imported."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = installed_version("torch") or "not installed"
    return found | {entry.distribution: entry.version for entry in find_plugins()}


def _devices(registry: Registry) -> list[dict[str, Any]]:
    """What every probe answers."""
    from fabric_core.resolve.hardware import probed
    from fabric_core.starting import way_on

    found = []
    for offer in registry.offers("accelerator"):
        answer, way = probed(offer), way_on(offer.spec, os.environ)
        found.append(
            {
                "name": offer.spec.name,
                "distribution": offer.distribution,
                "available": answer.inventory.available,
                "devices": list(answer.inventory.indices),
                "note": answer.inventory.note,
                "error": str(answer.broken or ""),
                "start": way.name,
                "start_reason": way.reason,
            }
        )
    return found


def _environments(registry: Registry) -> list[dict[str, Any]]:
    """What every detection answers."""
    from fabric_core.resolve.hardware import detection

    found = []
    for offer in registry.offers("cluster environment"):
        answer, error = None, ""
        try:
            answer = detection(offer.spec, os.environ)
        except FabricError as failure:
            error = str(failure)
        found.append(
            {
                "name": offer.spec.name,
                "distribution": offer.distribution,
                "detected": answer is not None,
                "note": answer.note if answer is not None else error and "failed: see below",
                "error": error,
            }
        )
    return found


def _problems(registry: Registry) -> list[dict[str, Any]]:
    """What was wrong with plugins when they were loaded."""
    return [
        _problem(problem.distribution, problem.message, broken=problem.fatal, cause=problem.cause)
        for problem in registry.problems
    ]


def _unmet(registry: Registry) -> Iterator[dict[str, Any]]:
    """Distributions that were installed beside a version of something that they do not work with."""
    blocked = {found.distribution for found in registry.blocked}
    for distribution in dict.fromkeys(found.distribution for found in find_plugins()):
        unmet = [] if distribution in blocked else unmet_dependencies(distribution)
        if unmet:
            told = (
                f"it needs {listing(unmet)}, which is not installed. Install it: pip install {distribution}"
            )
            yield _problem(distribution, told, broken=True)


def _unusable(registry: Registry) -> list[dict[str, Any]]:
    """Parts that would be refused. One whose package is missing is not broken: nobody has asked for it."""
    states = [(offer, state_of(offer, registry)) for offer in registry.offers()]
    return [
        _problem(
            offer.distribution,
            f"{offer.spec.kind} {offer.spec.name!r}: {state}",
            broken=state.startswith(("wrong contract version", "broken")),
        )
        for offer, state in states
        if state != "ok"
    ]


def _silent(answers: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Probes and detections that failed to answer."""
    return [_problem(a["distribution"], a["error"], broken=True) for a in answers if a["error"]]


def _problem(
    distribution: str, message: str, *, broken: bool, cause: BaseException | None = None
) -> dict[str, Any]:
    frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return {"distribution": distribution, "message": message, "broken": broken, "where": where}


def _show(report: dict[str, Any]) -> None:
    show_table(("what", "version"), list(report["versions"].items()))
    show_table(("variable", "value"), list(report["variables"].items()))
    show_table(
        ("device", "from", "here", "note"),
        [(d["name"], d["distribution"], _yes(d["available"]), d["note"]) for d in report["devices"]],
    )
    show_table(
        ("ranks on", "start", "because"),
        [(d["name"], d["start"], d["start_reason"]) for d in report["devices"] if d["available"]],
    )
    show_table(
        ("cluster environment", "from", "here", "note"),
        [
            (e["name"], e["distribution"], _yes(e["detected"]), e["note"])
            for e in report["cluster_environments"]
        ],
    )
    show_table(
        ("problem of", "broken", "what"),
        [
            (
                p["distribution"],
                _yes(p["broken"]),
                p["message"] + (f" (at {p['where']})" if p["where"] else ""),
            )
            for p in report["problems"]
        ],
    )
    show_table(("blocked by FABRIC_PLUGINS_*", "version"), [tuple(b.values()) for b in report["blocked"]])
    if not report["problems"]:
        click.echo("No problem was found.")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
