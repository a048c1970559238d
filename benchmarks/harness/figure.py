"""What a figure is: contenders that do the same work, what is measured of each, and what is promised of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

PLAIN, AGAIN, LIGHTNING, ACCELERATE, OURS = "plain", "plain again", "lightning-fabric", "accelerate", "fabric"
"""The contenders' names. ``plain`` takes part twice: how far the second is from the first is the noise."""

Sample = Mapping[str, float]
"""What one block, or one run of a command, gave: seconds, bytes and counts, by name."""

Runs = Mapping[str, Mapping[str, Sequence[Sample]]]
"""Samples by case and contender, one per round: samples of the same number were taken in turn."""

SCALES = {"s": 1.0, "ms": 1e3, "µs": 1e6, "MB": 1e-6, "": 1.0}


@dataclass(frozen=True)
class Measure:
    """One number of a sample, and how it is shown.

    Attributes:
        key: Which number of the sample; its own name where there is a ``source``.
        unit: A key of `SCALES`; of a rate any.
        title: What heads its column.
        source: Of a rate: the number of the sample that holds the seconds.
        amount: Of a rate: how many units are done in them.
    """

    key: str
    unit: str
    title: str
    source: str = ""
    amount: float = 0.0

    @property
    def name(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def more_is_better(self) -> bool:
        """Whether it is a rate."""
        return bool(self.source)

    def is_in(self, sample: Sample) -> bool:
        """Whether the sample has it."""
        return (self.source or self.key) in sample

    def of(self, sample: Sample) -> float:
        """The number of one sample, in its unit."""
        return self.amount / sample[self.source] if self.source else sample[self.key] * SCALES[self.unit]


class Against(Enum):
    """What a target is a limit of."""

    RATIO = "× plain"
    """The median, over the rounds, of the ratio to plain of the same round."""
    OVER = "over plain"
    """The median, over the rounds, of the difference to plain of the same round."""
    VALUE = ""
    """The median itself."""


@dataclass(frozen=True)
class Target:
    """A promise.

    Attributes:
        case: Of which case.
        measure: The key of the measure.
        limit: In the measure's unit, or as a ratio.
        against: What has to be within the limit.
        at_least: Whether the limit is the least, rather than the most.
        contender: Of whom.
        why: Shown where the target is missed: what a profile says.
    """

    case: str
    measure: str
    limit: float
    against: Against = Against.RATIO
    at_least: bool = False
    contender: str = OURS
    why: str = ""


@dataclass(frozen=True)
class Case:
    """One variant of a figure's work.

    Attributes:
        name: What distinguishes it.
        calls: How many operations make a block.
        rounds: How many blocks of each contender.
        per: How many of what is counted one operation does: numbers are per one of these.
        contenders: Who can do it; all where empty.
    """

    name: str
    calls: int = 1
    rounds: int = 60
    per: int = 1
    contenders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which part of a figure to run.

    Attributes:
        quick: Two short rounds: shows that it runs, and measures nothing.
        only: The contenders that take part; all where empty.
        cases: The cases; all where empty.
        rounds: Instead of the figure's own numbers of rounds.
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    rounds: int | None = None

    def rounds_of(self, case: Case) -> int:
        """How many rounds."""
        return 2 if self.quick else self.rounds or case.rounds

    def calls_of(self, case: Case) -> int:
        """How many operations a block has."""
        return max(1, case.calls // 20) if self.quick else case.calls

    def takes(self, case: Case) -> bool:
        """Whether the case is run."""
        return not self.cases or case.name in self.cases

    def contenders(self, names: Sequence[str], cases: Sequence[Case]) -> list[str]:
        """Who takes part, plain a second time unless this is quick."""
        able = [name for name in names if any(name in (case.contenders or names) for case in cases)]
        found = [name for name in able if not self.only or name in self.only]
        return [*found, AGAIN] if PLAIN in found and not self.quick else found


@dataclass(frozen=True, kw_only=True)
class Figure(ABC):
    """One figure.

    Attributes:
        name: Of the script, without its ending.
        about: The script's docstring: its first line is the title.
        cases: What is measured.
        measures: What is shown; ratios are of the first.
        targets: What is promised.
        notes: Sentences below the table.
    """

    name: str
    about: str
    cases: tuple[Case, ...]
    measures: tuple[Measure, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """The first line of the docstring, without its full stop."""
        return self.about.splitlines()[0].rstrip(".")

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The contenders, in the order of the table."""

    @abstractmethod
    def run(self, choice: Choice) -> Runs:
        """Measure. The contenders take turns."""

    def measure(self, key: str) -> Measure:
        """The measure of that key."""
        return next(measure for measure in self.measures if measure.key == key)
