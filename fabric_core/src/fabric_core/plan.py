"""What was asked for (`Request`) and what was decided (`Plan`): frozen data, free of PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fabric_core.specs import PartSpec, StrategySpec

__all__ = ["AUTO", "Choice", "OptionTable", "Plan", "Request"]

AUTO = "auto"
"""What a flag is when the core is to choose."""


class Late(str):
    """The path of an object (``"package.module:name"``) among options, as a text; imported when the part is made."""

    __slots__ = ()


@dataclass(frozen=True)
class OptionTable:
    """What a file says of the options of one part.

    Attributes:
        kind: The kind of the part, as in ``fabric_core.specs.KINDS``.
        name: The name or an alias of the part, in lower case.
        values: Its options.
        source: Which table of which file, for people.
    """

    kind: str
    name: str
    values: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Request:
    """The flags of a ``Fabric``, as they were given.

    A part is asked for by name (``"name"``, ``"name@distribution"``, ``"package.module:Class"``), by class or by
    instance.

    Attributes:
        accelerator: The device.
        strategy: How training is spread over the devices.
        devices: How many of them, or which, per node.
        num_nodes: How many nodes.
        precision: The number formats; ``None`` for plain float32.
        plugins: Further parts: a precision, a cluster environment, a launcher, a checkpoint io.
        loggers: Where metrics go.
        options: Options of chosen parts from the code, by kind (``{"strategy": {"find_unused_parameters": True}}``).
        texts: Options of chosen parts from the command line, by kind: texts that the part's declaration reads.
        tables: Options of parts from a file, chosen or not.
        environ: The environment variables, for detection.
        interactive: Whether there is no script that could be started again (a notebook, a prompt).
    """

    accelerator: Any = AUTO
    strategy: Any = AUTO
    devices: Any = AUTO
    num_nodes: Any = AUTO
    precision: Any = None
    plugins: tuple[Any, ...] = ()
    loggers: tuple[Any, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    texts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tables: tuple[OptionTable, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    interactive: bool = False


@dataclass(frozen=True)
class Choice:
    """One part of a plan.

    Attributes:
        spec: The part's description.
        distribution: The distribution that offers it (``"passed in code"`` for the caller's own classes).
        version: That distribution's version.
        reason: One sentence: why this part.
        lost: What else there was, each with the reason why not.
        instance: The ready object, when the caller passed one.
        options: What the class is called with: the spec's options and the user's over them.
        origins: Who states each of these, for people.
    """

    spec: PartSpec
    distribution: str
    version: str
    reason: str
    lost: tuple[tuple[str, str], ...] = ()
    instance: Any = field(default=None, compare=False, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of the part, as in ``fabric_core.specs.KINDS``."""
        return self.spec.kind

    @property
    def name(self) -> str:
        """The part's own name, also when it was asked for by an alias or a group."""
        return self.spec.name

    @property
    def identity(self) -> str:
        """Name, distribution and version: what has to be the same on every rank."""
        origin = f"from {self.distribution} {self.version}" if self.version else self.distribution
        return f"{self.name} ({origin})"


@dataclass(frozen=True)
class Plan:
    """What was decided: for every kind the chosen part, and the devices.

    Attributes:
        accelerator, strategy, precision, cluster_environment, checkpoint_io: One part each.
        launcher: What starts the processes; ``None`` when one process is enough or others have started them.
        loggers: Any number of parts.
        devices: Device indices on this node.
        num_nodes: How many nodes.
        device_reason: One sentence: why these devices.
        warnings: What the user should hear once, when the plan is built.
    """

    accelerator: Choice
    strategy: Choice
    precision: Choice
    cluster_environment: Choice
    checkpoint_io: Choice
    launcher: Choice | None
    loggers: tuple[Choice, ...]
    devices: tuple[int, ...]
    num_nodes: int
    device_reason: str
    warnings: tuple[str, ...] = ()

    @property
    def processes_per_node(self) -> int:
        """How many processes of the job run on each node."""
        return len(self.devices) if self.strategy_spec.processes == "per_device" else 1

    @property
    def world_size(self) -> int:
        """How many processes the job has in all."""
        return self.processes_per_node * self.num_nodes

    @property
    def strategy_spec(self) -> StrategySpec:
        """The chosen strategy's description."""
        spec = self.strategy.spec
        if not isinstance(spec, StrategySpec):
            raise TypeError(f"The strategy of a plan needs a StrategySpec, not a {type(spec).__name__}.")
        return spec

    def __iter__(self) -> Iterator[Choice]:
        """Every chosen part, in the order of the kinds."""
        yield from (self.accelerator, self.strategy, self.precision, self.cluster_environment)
        if self.launcher is not None:
            yield self.launcher
        yield self.checkpoint_io
        yield from self.loggers

    def fingerprint(self) -> dict[str, str]:
        """What has to be the same on every rank, each as a line that people can read.

        The device indices are left out, because the nodes of a cluster may number them differently; so are the
        launcher and the loggers, which are each rank's own business.
        """
        shared = (
            self.accelerator,
            self.strategy,
            self.precision,
            self.cluster_environment,
            self.checkpoint_io,
        )
        options = {
            f"{part.kind} options": json.dumps(plain(part.options), sort_keys=True)
            for part in shared
            if part.options
        }
        sizes = {"processes per node": str(self.processes_per_node), "number of nodes": str(self.num_nodes)}
        return {part.kind: part.identity for part in shared} | options | sizes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return {
            "parts": [
                {
                    "kind": part.kind,
                    "name": part.name,
                    "target": part.spec.target_name,
                    "distribution": part.distribution,
                    "version": part.version,
                    "options": plain(part.options),
                    "origins": dict(part.origins),
                    "reason": part.reason,
                    "lost": [{"name": name, "reason": reason} for name, reason in part.lost],
                }
                for part in self
            ],
            "devices": list(self.devices),
            "device_reason": self.device_reason,
            "num_nodes": self.num_nodes,
            "processes_per_node": self.processes_per_node,
            "world_size": self.world_size,
            "warnings": list(self.warnings),
        }


def plain(value: Any) -> Any:
    """A value as plain data. Objects are told apart by type alone: an address would differ on every rank."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=str)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"<{named.__module__}.{named.__qualname__}>"
