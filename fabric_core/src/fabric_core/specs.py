"""What a plugin says of its parts: plain, frozen data that is read without importing the parts themselves.

A spec is a description; the class that it points to (``target``) is imported only when the part was chosen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from fabric_core.errors import ConfigurationError

__all__ = [
    "KINDS",
    "SITUATIONS",
    "SPEC_TYPES",
    "AcceleratorSpec",
    "CheckpointIOSpec",
    "ClusterEnvironmentSpec",
    "CommandSpec",
    "Detection",
    "Inventory",
    "LauncherSpec",
    "LoggerSpec",
    "NoOptions",
    "PartSpec",
    "PrecisionSpec",
    "Situation",
    "StrategySpec",
]

Situation = Literal["one", "many", "many_nodes", "notebook"]
"""Where a strategy is chosen for: one device, several devices, several nodes, several devices in a notebook."""

SITUATIONS: tuple[str, ...] = get_args(Situation)
"""Every `Situation`."""

WORD = "a word without spaces, '@', ':' or ',', and not 'auto'"
"""What a name has to be, because the other forms in which a part is asked for use those characters."""


@dataclass(frozen=True)
class Inventory:
    """What a probe found: the devices of one kind on this node.

    Attributes:
        indices: The device indices that exist, in the device's own numbering.
        virtual: True when indices are no hardware but processes, so that any number may be asked for.
        default: How many of them ``devices="auto"`` takes; ``None`` means all.
        note: One sentence for people: what was found, or why there is nothing.
        names: Other names of devices, such as serial numbers, and the index of each. Users may write them in place of
            the index, in any case, and leave out the end as long as only one device is meant.
        only_by_name: True when these stand in for the real devices, for trying out, so that ``accelerator="auto"``
            passes them over.
    """

    indices: tuple[int, ...] = ()
    virtual: bool = False
    default: int | None = None
    note: str = ""
    names: Mapping[str, int] = field(default_factory=dict)
    only_by_name: bool = False

    @property
    def available(self) -> bool:
        """Whether there is at least one device."""
        return bool(self.indices) or self.virtual


@dataclass(frozen=True)
class Detection:
    """What a cluster environment tells of the job that this process belongs to.

    Attributes:
        processes_per_node: How many processes run on this node; ``None`` when the environment does not say.
        num_nodes: How many nodes the job has; ``None`` when the environment does not say.
        note: One sentence for people: by what it was recognised.
        own_devices: Whether each process sees its own device and none of the others, so that all of them call it the
            first one.
    """

    processes_per_node: int | None = None
    num_nodes: int | None = None
    note: str = ""
    own_devices: bool = False


@dataclass(frozen=True)
class NoOptions:
    """The ``options_type`` of a part that takes no options."""


@dataclass(frozen=True)
class PartSpec:
    """What the specs of all kinds have in common.

    A spec is checked when it is made, so that a slip in a plugin shows in that plugin's own line, and not in the
    look-ups of everybody else: a part called ``None`` or a text where a tuple belongs is a `ConfigurationError`.

    Attributes:
        name: What users write. Case does not matter.
        target: ``"package.module:Class"``; imported only when the part is built.
        aliases: Other names for the same part.
        options: Keyword arguments that this preset passes to the class. The user's options win.
        options_type: A dataclass, or its ``"package.module:Class"`` in a module without PyTorch: its fields are the
            options that users may give, named, typed and with the defaults as in the class's constructor
            (`fabric_core.resolve.declared`). ``None``: any option is handed to the constructor, unread.
        requires: Requirement strings (PEP 508) of packages that the part needs at run time.
        api: The version of the kind's contract that the part was written for (``fabric_core.contract_versions``).
        description: One line for people, shown by ``fabric plugins``.
    """

    kind: ClassVar[str] = ""
    tuples: ClassVar[tuple[str, ...]] = ("aliases", "requires")
    """The fields that hold several texts; a single text there would be read letter by letter."""

    name: str
    target: str | type
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    options_type: str | type | None = field(default=None, kw_only=True)
    requires: tuple[str, ...] = field(default=(), kw_only=True)
    api: int = field(default=1, kw_only=True)
    description: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _demand(self, "name", _is_word(self.name), WORD)
        _demand(self, "target", isinstance(self.target, str | type), "'package.module:Class' or a class")
        for name in self.tuples:
            value = getattr(self, name)
            right = isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)
            _demand(self, name, right, "a tuple of texts, such as ('one', 'two')")
        _demand(self, "aliases", all(map(_is_word, self.aliases)), WORD)
        _demand(self, "options", isinstance(self.options, Mapping), "a dictionary")
        right = self.options_type is None or isinstance(self.options_type, str | type)
        _demand(self, "options_type", right, "'package.module:Class' or a dataclass")
        _demand(self, "api", _is_number(self.api), "a whole number")

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name and every alias, in lower case."""
        return tuple(name.lower() for name in (self.name, *self.aliases))

    @property
    def target_name(self) -> str:
        """The target as ``"package.module:Class"``, also when it is a class already."""
        return (
            self.target
            if isinstance(self.target, str)
            else f"{self.target.__module__}:{self.target.__qualname__}"
        )


@dataclass(frozen=True)
class AcceleratorSpec(PartSpec):
    """A kind of device.

    Attributes:
        probe: Finds the devices: a function without arguments that returns an `Inventory`, or its
            ``"package.module:function"``. It must not initialise the device (a fork afterwards has to work), and
            absent hardware is an answer, not an exception.
        priority: ``accelerator="auto"`` takes the available accelerator of the highest priority.
        groups: Names that several accelerators share (``"gpu"``); resolved among those that are available.
        strategies: Which strategy this device wants in a situation, by name. What is not listed here is left to the
            strategies that volunteer.
        max_devices: How many devices one job can use on a node; ``None`` for no limit.
        forkable: Whether copies (forks) of a process that has imported PyTorch, but has not touched a device, can use
            these devices as any process can. Then the ranks of a job may be started as such copies, in less time and
            memory. State it only where it is known.
    """

    kind = "accelerator"
    tuples = (*PartSpec.tuples, "groups")

    probe: str | Callable[[], Inventory] = field(kw_only=True)
    priority: int = field(default=0, kw_only=True)
    groups: tuple[str, ...] = field(default=(), kw_only=True)
    strategies: Mapping[Situation, str] = field(default_factory=dict, kw_only=True)
    max_devices: int | None = field(default=None, kw_only=True)
    forkable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        right = isinstance(self.probe, str) or callable(self.probe)
        _demand(self, "probe", right, "'package.module:function' or a function")
        _demand(self, "priority", _is_number(self.priority), "a whole number")
        _demand(self, "forkable", isinstance(self.forkable, bool), "True or False")
        _demand(
            self,
            "strategies",
            set(self.strategies) <= set(SITUATIONS),
            f"a dictionary with keys of {SITUATIONS}",
        )


@dataclass(frozen=True)
class StrategySpec(PartSpec):
    """A way to spread training over devices.

    Attributes:
        supports: Accelerators (names or groups) that it vouches for; ``("*",)`` for every one.
        rejects: Accelerators (names or groups) that it cannot work with.
        precisions: The precisions that it can work with, by name; empty for any. One whose own spec is scoped to this
            strategy is welcome without being listed.
        volunteers_for: Situations in which ``strategy="auto"`` may choose it.
        priority: Among several volunteers the highest wins.
        processes: ``"per_device"``: one process drives one device. ``"single"``: one process drives all.
        max_devices: How many devices it can use in all, over all nodes; ``None`` for no limit.
        launcher: The launcher, by name, that starts its processes when nothing else has; ``None`` when it needs none.
    """

    kind = "strategy"
    tuples = (*PartSpec.tuples, "supports", "rejects", "precisions", "volunteers_for")

    supports: tuple[str, ...] = field(default=(), kw_only=True)
    rejects: tuple[str, ...] = field(default=(), kw_only=True)
    precisions: tuple[str, ...] = field(default=(), kw_only=True)
    volunteers_for: tuple[Situation, ...] = field(default=(), kw_only=True)
    priority: int = field(default=0, kw_only=True)
    processes: Literal["per_device", "single"] = field(default="per_device", kw_only=True)
    max_devices: int | None = field(default=None, kw_only=True)
    launcher: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(
            self,
            "volunteers_for",
            set(self.volunteers_for) <= set(SITUATIONS),
            f"a tuple of some of {SITUATIONS}",
        )
        _demand(self, "priority", _is_number(self.priority), "a whole number")
        _demand(self, "processes", self.processes in ("per_device", "single"), "'per_device' or 'single'")


@dataclass(frozen=True)
class PrecisionSpec(PartSpec):
    """A way to treat number formats.

    Several specs may share a name when their scopes differ; the one with the most specific scope wins.

    Attributes:
        strategies: The strategies that it is for, by name; empty for any.
        accelerators: The accelerators (names or groups) that it is for; empty for any.
    """

    kind = "precision"
    tuples = (*PartSpec.tuples, "strategies", "accelerators")

    strategies: tuple[str, ...] = field(default=(), kw_only=True)
    accelerators: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def specificity(self) -> int:
        """How many scopes it states: 0, 1 or 2."""
        return bool(self.strategies) + bool(self.accelerators)


@dataclass(frozen=True)
class ClusterEnvironmentSpec(PartSpec):
    """Where the ranks of a job come from.

    Attributes:
        detect: Tells whether this process runs in such an environment: a function that takes the environment
            variables (a mapping) and returns a `Detection` or ``None``, or its ``"package.module:function"``. It
            must be quick, import nothing heavy and change nothing. ``None`` when the environment is only ever
            asked for by name.
        priority: Among several detected environments the highest wins.
    """

    kind = "cluster environment"

    detect: str | Callable[[Mapping[str, str]], Detection | None] | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        right = self.detect is None or isinstance(self.detect, str) or callable(self.detect)
        _demand(self, "detect", right, "'package.module:function' or a function")
        _demand(self, "priority", _is_number(self.priority), "a whole number")


@dataclass(frozen=True)
class LauncherSpec(PartSpec):
    """A way to start the processes of a job on this node.

    Attributes:
        interactive: Whether it works where there is no script to start again (a notebook, a prompt).
        needs_function: Whether ``launch`` must be given the function that the processes run.
    """

    kind = "launcher"

    interactive: bool = field(default=False, kw_only=True)
    needs_function: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class CheckpointIOSpec(PartSpec):
    """A way to write and read one checkpoint file."""

    kind = "checkpoint io"


@dataclass(frozen=True)
class LoggerSpec(PartSpec):
    """A sink for metrics."""

    kind = "logger"


@dataclass(frozen=True)
class CommandSpec:
    """A command that a distribution adds to the command line.

    Attributes:
        name: The word after ``fabric``.
        target: ``"package.module:command"``, a click command; imported only when it is called.
        help: One line for ``fabric --help``.
    """

    kind: ClassVar[str] = "command"

    name: str
    target: str
    help: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _demand(self, "name", _is_word(self.name), WORD)
        _demand(self, "target", isinstance(self.target, str), "'package.module:command'")


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[^\s@:,]+", name)) and name.lower() != "auto"


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _demand(spec: PartSpec | CommandSpec, name: str, right: bool, wanted: str) -> None:
    if not right:
        raise ConfigurationError(f"{type(spec).__name__}: {name}={getattr(spec, name)!r} has to be {wanted}.")


SPEC_TYPES: tuple[type[PartSpec], ...] = (
    AcceleratorSpec,
    StrategySpec,
    PrecisionSpec,
    ClusterEnvironmentSpec,
    LauncherSpec,
    CheckpointIOSpec,
    LoggerSpec,
)
"""One spec type per kind of part, in the order in which a plan names them."""

KINDS: tuple[str, ...] = tuple(spec.kind for spec in SPEC_TYPES)
"""The kinds of parts, in the same order."""
