"""What shows only in a fresh process: the cost of an import, whether hooks are steady, what specs point at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric_core.authoring.findings import Finding
from fabric_core.authoring.subject import Entry, Subject
from fabric_core.registry.installed import canonical

CPU_LIMIT = 0.050
"""CPU seconds that importing a hooks module may take."""

TRIES = 4
"""How often an import is measured before it counts as slow: what else happens on a machine only adds to it."""

PATIENCE = 120.0
"""Seconds that a process may take to answer."""

START = "import sys; sys.path[:1] = {path}; from fabric_core.authoring.child import main; main()"


@dataclass(frozen=True)
class Offered:
    """A spec as plain data, and the author's line that made it."""

    spec: dict[str, Any]
    file: Path
    line: int

    @property
    def title(self) -> str:
        """What it is called, as the beginning of a sentence."""
        return f"The {self.spec['kind']} {self.spec['name']!r}"

    def finding(self, check: str, message: str, severity: Any = "error") -> Finding:
        """Something about it."""
        return Finding(self.file, self.line, check, message, severity)


def read_entry(subject: Subject, entry: Entry) -> tuple[list[Offered], list[Finding]]:
    """Import a hooks module in two fresh processes. The second hashes otherwise, and loads what the specs point at.

    Returns:
        What it offers, and what is wrong.
    """
    first = _ask(subject, entry, seed=0)
    if isinstance(first, Finding):
        return [], [first]
    second = _ask(subject, entry, seed=1, load=True)
    findings = [*_told(first), *_light(subject, entry, first)]
    if isinstance(second, Finding):
        findings.append(second)
    else:
        findings += [*_told(second), *_steady(entry, first, second)]
    offered = [Offered(one["spec"], Path(one["file"]), one["line"]) for one in first["specs"]]
    return offered, list(dict.fromkeys(findings))


def _told(answer: dict[str, Any]) -> list[Finding]:
    return [
        Finding(Path(file), line, check, message, severity)
        for check, message, (file, line), severity in answer["faults"]
    ]


def _light(subject: Subject, entry: Entry, answer: dict[str, Any]) -> Iterator[Finding]:
    for package, (what, (file, line)) in answer["heavy"].items():
        message = (
            f"Importing {what} brings in {package}, through this line. Import it where the part itself is."
        )
        yield Finding(Path(file), line, "light", message)
    if answer["heavy"] or answer["faults"]:
        return
    seconds, tries = answer["seconds"], TRIES
    while seconds >= CPU_LIMIT and (tries := tries - 1):
        again = _ask(subject, entry, seed=0)
        seconds = seconds if isinstance(again, Finding) else min(seconds, again["seconds"])
    if seconds >= CPU_LIMIT:
        message = (
            f"Importing it takes {seconds * 1000:.0f} ms of CPU time, and may take {CPU_LIMIT * 1000:.0f}: every "
            "'fabric' command and every training imports it."
        )
        yield Finding(entry.file, 0, "light", message)


def _steady(entry: Entry, one: dict[str, Any], other: dict[str, Any]) -> Iterator[Finding]:
    if not (one["same"] and other["same"]):
        message = "Its hooks yield other specs when they are called again."
        yield Finding(entry.file, 0, "deterministic", message)
    elif one["specs"] != other["specs"]:
        pairs = zip(one["specs"], other["specs"], strict=False)
        line = next((mine["line"] for mine, its in pairs if mine != its), 0)
        message = (
            "Its hooks yield other specs, or in another order, in another process: on two ranks the same name would "
            "mean different parts. A set has no order that lasts; sort it."
        )
        yield Finding(entry.file, line, "deterministic", message)


def _ask(subject: Subject, entry: Entry, *, seed: int, load: bool = False) -> dict[str, Any] | Finding:
    """The answer of a fresh process, or why there is none."""
    order = {
        "module": entry.module,
        "file": str(entry.file),
        "own": str(entry.package or entry.file),
        "load": load,
        "stated": [canonical(stated.name) for stated in subject.dependencies or ()],
    }
    path = [] if subject.root is None else [str(subject.root)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", START.format(path=path), json.dumps(order)]
    try:
        ended = subprocess.run(
            command,
            env={**environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Finding(entry.file, 0, "import", f"Importing it did not end within {PATIENCE:.0f} seconds.")
    try:
        answer: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        what = "Loading its parts" if load else "Importing it"
        return Finding(
            entry.file, 0, "import", f"{what} ended the process with code {ended.returncode}: {last}"
        )
    return answer
