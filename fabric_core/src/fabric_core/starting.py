"""Whether the ranks of a job are started afresh, or as copies of one process that has imported PyTorch.

Decided from the plan, the system and what the user says; the imports themselves may still speak against it. See
[Note: warm starts].
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fabric_core.errors import ConfigurationError, did_you_mean
from fabric_core.orphans import can_adopt
from fabric_core.plan import Plan
from fabric_core.specs import AcceleratorSpec, PartSpec
from fabric_core.supervisor import WarmStart

__all__ = ["START", "STARTS", "Way", "way_on", "way_to_start"]

START = "FABRIC_START"
"""The environment variable that says how ranks are started, unless ``fabric run --start`` does."""

STARTS: Mapping[str, str] = {
    "auto": "as copies where that is safe, else afresh",
    "warm": "as copies, or not at all",
    "fresh": "afresh",
}
"""What the user may say."""

_EVERY_RANK = ("torch", "fabric_core.fabric", "fabric_core.registry:default_registry")


@dataclass(frozen=True)
class Way:
    """How ranks are started.

    Attributes:
        warm: What the process does that is copied for every rank; ``None`` when each is started afresh.
        reason: One sentence: why so.
    """

    warm: WarmStart | None
    reason: str

    @property
    def name(self) -> str:
        """``"warm"`` or ``"fresh"``."""
        return "fresh" if self.warm is None else "warm"


def way_to_start(plan: Plan, environ: Mapping[str, str], asked: str | None = None) -> Way:
    """How the ranks of a job are started on this node.

    Args:
        plan: What they will run with, as far as it is known before the script runs.
        environ: The environment variables.
        asked: What the user asks for, one of `STARTS` (default: what ``FABRIC_START`` says, else ``"auto"``).

    Raises:
        ConfigurationError: There is no such way, or not on this system.
    """
    way = way_on(plan.accelerator.spec, environ, asked)
    if way.warm is None:
        return way
    if plan.processes_per_node == 1 and not way.warm.required:
        return Way(None, "a single process on this node has nobody to share its imports with")
    # Parts that are passed in code have no version; their modules may lie beside the script, which finds them itself.
    parts = dict.fromkeys(part.spec.target_name.partition(":")[0] for part in plan if part.version)
    return Way(replace(way.warm, steps=(*_EVERY_RANK, *parts)), way.reason)


def way_on(accelerator: PartSpec, environ: Mapping[str, str], asked: str | None = None) -> Way:
    """The same for any job of several ranks on an accelerator."""
    start, said = _asked(environ, asked)
    if start == "fresh":
        return Way(None, f"{said} asks for it")
    if start == "warm" and not can_adopt():
        raise ConfigurationError(
            f"{said} asks for ranks that are copied from a warm process. That takes Linux, and this is {sys.platform}. "
            "Leave it out."
        )
    if start == "warm":
        return Way(WarmStart(_EVERY_RANK, required=True), f"{said} asks for it")
    if not can_adopt():
        return Way(None, f"copying a process for every rank takes Linux, and this is {sys.platform}")
    name = f"the accelerator {accelerator.name!r}"
    if isinstance(accelerator, AcceleratorSpec) and accelerator.forkable:
        return Way(WarmStart(_EVERY_RANK), f"{name} works in copies of a process that has imported PyTorch")
    return Way(None, f"{name} does not say that it works in copies of a process (forkable)")


def _asked(environ: Mapping[str, str], asked: str | None) -> tuple[str, str]:
    """What is asked for, and where that is said."""
    said = START if asked is None else "--start"
    word = environ.get(START) or "auto" if asked is None else asked
    start = word.strip().lower()
    if start not in STARTS:
        raise ConfigurationError(
            f"{said} is {word!r}, which is none of {', '.join(STARTS)}.{did_you_mean(start, STARTS)}"
        )
    return start, f"{said}={start}"
