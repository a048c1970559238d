"""From samples to what is shown of them, and what is held against the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.figure import PLAIN, Against, Figure, Measure, Runs, Sample, Target
from harness.statistics import paired_difference, paired_ratio


@dataclass(frozen=True)
class Number:
    """One measure of one contender, over all rounds.

    Attributes:
        median: The median.
        best: The least; of a rate the largest.
        ratio: The median of the ratios to plain, round by round; ``None`` where there is no plain, or it is zero.
        over: The median of the differences to plain, likewise.
    """

    median: float
    best: float
    ratio: float | None
    over: float | None

    def against(self, what: Against) -> float | None:
        """What a target limits."""
        return {Against.RATIO: self.ratio, Against.OVER: self.over, Against.VALUE: self.median}[what]


@dataclass(frozen=True)
class Row:
    """One contender in one case; its numbers by the keys of the measures."""

    case: str
    contender: str
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class Verdict:
    """A target, and what was found. ``found`` is ``None`` where it was not measured."""

    target: Target
    found: float | None

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        if self.found is None:
            return False
        return self.found >= self.target.limit if self.target.at_least else self.found <= self.target.limit


def summarise(figure: Figure, runs: Runs) -> list[Row]:
    """One row for each case and contender, in the order of the figure."""
    return [
        Row(case, contender, _numbers(figure.measures, samples, of_all.get(PLAIN)))
        for case, of_all in runs.items()
        for contender, samples in of_all.items()
    ]


def _numbers(
    measures: Sequence[Measure], samples: Sequence[Sample], plain: Sequence[Sample] | None
) -> dict[str, Number]:
    shown = [measure for measure in measures if all(measure.is_in(sample) for sample in samples)]
    return {measure.key: _number(measure, samples, plain) for measure in shown}


def _number(measure: Measure, samples: Sequence[Sample], plain: Sequence[Sample] | None) -> Number:
    values = [measure.of(sample) for sample in samples]
    best = max(values) if measure.more_is_better else min(values)
    ratio = over = None
    if plain is not None and all(measure.is_in(sample) for sample in plain):
        bases = [measure.of(sample) for sample in plain]
        ratio = paired_ratio(values, bases) if all(bases) else None
        over = paired_difference(values, bases)
    return Number(median(values), best, ratio, over)


def verdicts(figure: Figure, rows: Sequence[Row]) -> list[Verdict]:
    """What became of each target."""
    found = {(row.case, row.contender): row.numbers for row in rows}
    return [
        Verdict(target, value_of(target, found.get((target.case, target.contender))))
        for target in figure.targets
    ]


def value_of(target: Target, numbers: Mapping[str, Number] | None) -> float | None:
    """What the target limits, of a contender that has these numbers."""
    number = (numbers or {}).get(target.measure)
    return None if number is None else number.against(target.against)
