"""What the checks of strategies have in common: what the author states, and the jobs that are watched."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import pytest

from fabric_core.errors import FabricError
from fabric_core.plan import Plan, Request
from fabric_core.registry import default_registry
from fabric_core.requirements import missing_requirements
from fabric_core.resolve import resolve
from fabric_core.specs import LauncherSpec, StrategySpec
from fabric_core.testing.conformance import PartConformance
from fabric_core.testing.plain_loop import CASES, PRECISIONS, Build, Trained
from fabric_core.testing.programs.task import build_of, options_of
from fabric_core.testing.strategy_checks.jobs import Batch, Jobs

FEW = 3  # checks, for which starting a job each is quicker than going through everything


class StrategyChecks(PartConformance):
    """The attributes of `StrategyConformance`, and what its checks stand on."""

    kind = StrategySpec.kind

    accelerator: ClassVar[str] = "cpu"
    precisions: ClassVar[tuple[str, ...]] = ()
    processes: ClassVar[int | None] = None
    world_sizes: ClassVar[tuple[int, ...]] = ()
    master_weights: ClassVar[tuple[str, ...]] = ()
    program: ClassVar[str] = ""
    environ: ClassVar[Mapping[str, str]] = {}
    patience: ClassVar[float] = 60
    _few: ClassVar[bool] = False

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One check for each precision, or for each way between numbers of processes."""
        if "precision" in metafunc.fixturenames:
            metafunc.parametrize("precision", [_param(name) for name in self.claimed_precisions()])
        if "ways" in metafunc.fixturenames:
            ways = [
                pytest.param((a, b), id=f"{a}-to-{b}")
                for other in self.other_sizes()
                for a, b in ((self.size(), other), (other, self.size()))
            ]
            none = pytest.mark.skip(reason="world_sizes states no other number of processes")
            metafunc.parametrize("ways", ways or [pytest.param((1, 1), id="none", marks=none)])

    @pytest.fixture(autouse=True)
    def _note_how_many_checks_run(self, request: Any) -> None:
        """Whoever runs one check waits for what that needs only."""
        cls = type(self)
        cls._few = sum(getattr(item, "cls", None) is cls for item in request.session.items) <= FEW

    @classmethod
    def teardown_class(cls) -> None:
        """Remove what the jobs have written."""
        cls.jobs().close()
        cls.jobs.cache_clear()

    # -- what is claimed ------------------------------------------------------------------------------------------

    @classmethod
    def size(cls) -> int:
        """How many processes the jobs have."""
        if cls.processes is not None:
            return cls.processes
        spec: Any = cls.find().spec
        return 1 if spec.processes == "single" else min(2, spec.max_devices or 2)

    @classmethod
    def other_sizes(cls) -> list[int]:
        """The other numbers of processes between which checkpoints are carried."""
        return [size for size in cls.world_sizes if size != cls.size()]

    @classmethod
    def claimed_precisions(cls) -> list[str]:
        """Those that the class states, or the spec, or else every one that is there and resolves."""
        try:
            spec: Any = cls.find().spec
        except FabricError:  # that it is missing is told by the checks
            return [PRECISIONS[0]]
        return list(cls.precisions or spec.precisions or cls._resolving())

    @classmethod
    def _resolving(cls) -> list[str]:
        offered = [
            offer.spec.name
            for offer in default_registry().offers("precision")
            if not getattr(offer.spec, "specificity", 0)
        ]
        return [name for name in dict.fromkeys(offered) if cls.plan_or_error(precision=name)[1] is None]

    @classmethod
    def plan_or_error(cls, **flags: Any) -> tuple[Plan | None, FabricError | None]:
        """What the resolver makes of the strategy with other flags."""
        asked = {"accelerator": cls.accelerator, "devices": str(cls.size()), **flags}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FABRIC_")}
        request = Request(strategy=cls.name, environ=clean, **asked)
        try:
            return resolve(request, default_registry()), None
        except FabricError as error:
            return None, error

    def need(self) -> None:
        """Skip the check where a package is missing that the strategy requires."""
        missing = missing_requirements(self.spec)
        if missing:
            pytest.skip(f"it needs {', '.join(missing)}, which is not installed")

    def make(self, **options: Any) -> Any:
        """As `PartConformance.make`, with the options of `program`, too."""
        return super().make(**options_of(self.program, {}, self.size()), **options)

    def launcher(self) -> LauncherSpec | None:
        """The spec of the launcher, if it has one and that is installed."""
        if self.spec.launcher is None:
            return None
        return cast(LauncherSpec, default_registry().one(LauncherSpec.kind, self.spec.launcher).spec)

    # -- what was seen --------------------------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def jobs(cls) -> Jobs:
        """The jobs of this class."""
        size, names = cls.size(), cls._comparable()
        trainings = [
            f"train:{name}:{case}"
            for name in names
            for case in (CASES if name == "32-true" else ("plain", "everything"))
        ]
        resumed = [f"resume:{name}:{size}" for name in names]
        batches = [Batch(size, (*SECTIONS, *trainings, *resumed))]
        for other in cls.other_sizes():
            batches.append(Batch(other, (f"train:{names[0]}:everything", f"resume:{names[0]}:{size}")))
            batches.append(Batch(size, (f"resume:{names[0]}:{other}",)))
        return Jobs(
            batches,
            task={"accelerator": cls.accelerator, "options": dict(cls.options), "program": cls.program},
            flags={"strategy": cls.name, "accelerator": cls.accelerator},
            environ=cls.environ,
            patience=cls.patience,
            sparing=cls._few,
        )

    @classmethod
    def _comparable(cls) -> list[str]:
        return [name for name in cls.claimed_precisions() if name in PRECISIONS]

    def facts(self, section: str, size: int | None = None) -> list[Any]:
        """What every rank found in a section, in the order of ranks."""
        self.need()
        return self.jobs().facts(size or self.size(), section)

    def trained(self, precision: str, case: str) -> list[Any]:
        """What every rank found in a training."""
        return self.facts(f"train:{precision}:{case}")

    @property
    def build(self) -> Build:
        """Makes the model that is trained."""
        return build_of(self.program)


SECTIONS = (
    *("closing", "unused", "ranks", "gathered", "reduced", "sent", "waited", "grouped", "dealt"),
    *(
        "failing files",
        "written",
        "saved meanwhile",
        "weights",
        "gradients",
        "held",
        "norms",
        "failing backward",
    ),
)
"""What every strategy goes through, once."""


def outcome_of(facts: Mapping[str, Any]) -> Trained:
    """A training, as one rank saw it."""
    return Trained(
        facts["losses"], facts["parameters"], facts["norms"], facts.get("before_last", {}), facts["outputs"]
    )


def _param(precision: str) -> Any:
    known = precision in PRECISIONS
    unknown = pytest.mark.skip(reason=f"the kit's plain loop does not know the precision {precision!r}")
    return pytest.param(precision, marks=() if known else unknown)
