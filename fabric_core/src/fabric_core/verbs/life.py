"""The state of a ``Fabric`` and its life: plan, parts, launching, joining the other ranks, closing."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, update_wrapper, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fabric_core.consensus import check_same_plan
from fabric_core.contracts.launcher import LaunchJob
from fabric_core.errors import CheckpointError, SetupError, WrongTypeError
from fabric_core.specs import LauncherSpec
from fabric_core.supervisor import Milestone, mark_failure, tell_supervisor
from fabric_core.wrappers.guard import BackwardGuard

if TYPE_CHECKING:
    from fabric_core.accumulation import Accumulation
    from fabric_core.build import Parts
    from fabric_core.contracts.accelerator import Accelerator
    from fabric_core.contracts.cluster_environment import ClusterEnvironment
    from fabric_core.contracts.launcher import Launcher
    from fabric_core.contracts.strategy import Strategy
    from fabric_core.data.iteration import LoaderTracker
    from fabric_core.plan import Plan
    from fabric_core.preemption import Preemption
    from fabric_core.saving import Saving
    from fabric_core.setting_up import SetUp

T = TypeVar("T")


class Life:
    """What every group of verbs stands on. Users see it as ``Fabric``, where the arguments are described."""

    plan: Plan
    callbacks: list[Any]
    loggers: list[Any]
    _parts: Parts
    _preemption: Preemption | None
    _connected: bool
    _closed: bool
    _tracker: LoaderTracker
    _set_up: SetUp
    _accumulation: Accumulation
    _guard: BackwardGuard | None
    _saving: Saving
    _warned_no_hold: bool
    _warned_no_background: bool
    _turns: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """In the style ``class Trainer(Fabric): def run(self): …``, calling ``run`` launches first."""
        super().__init_subclass__(**kwargs)
        run = inspect.getattr_static(cls, "run", None)
        if inspect.isfunction(run) and not hasattr(run, "launches"):
            cls.run = _launching(run)  # type: ignore[attr-defined]

    def _make_guard(self) -> BackwardGuard | None:
        if self._parts.precision.scales_loss:
            return BackwardGuard(f"the precision {self.plan.precision.name!r} scales losses")
        if self._parts.strategy.owns_backward:
            return BackwardGuard(f"the strategy {self.plan.strategy.name!r} has a backward pass of its own")
        return None

    # -- who and where --------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator that was chosen."""
        return self._parts.accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy that was chosen."""
        return self._parts.strategy

    @property
    def cluster_environment(self) -> ClusterEnvironment:
        """The cluster environment that was chosen."""
        return self._parts.cluster_environment

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._parts.strategy.root_device

    @property
    def world_size(self) -> int:
        """How many processes the job has, also before `launch`."""
        return self.plan.world_size

    @property
    def global_rank(self) -> int:
        """The number of this process among all, from 0."""
        return self._parts.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process among those of its node, from 0."""
        return self._parts.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this node, from 0."""
        return self._parts.strategy.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is global rank 0."""
        return self.global_rank == 0

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            SetupError: There is none.
        """
        if not self.loggers:
            raise SetupError("This Fabric has no logger. Pass one: Fabric(loggers=…).")
        return self.loggers[0]

    # -- coming and going -----------------------------------------------------------------------------------------

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Start the processes of the job. Called once, before anything is set up.

        Where the processes are there already (``fabric run``, torchrun, a cluster), or one is enough, nothing is
        started. Otherwise, depending on the strategy, the script is started again in every process and this one only
        watches over them and ends with them; or ``function`` runs in new processes, and this one goes on afterwards.

        Args:
            function: What the processes run, called with this ``Fabric`` first: ``function(fabric, *args, **kwargs)``.
            args, kwargs: What else it is called with.

        Returns:
            What ``function`` returned, on rank 0 of this node where several processes ran it; ``None`` without one.

        Raises:
            SetupError: The strategy needs a function, and none was given.
            WrongTypeError: The function cannot be called with a ``Fabric``.
            RankFailedError: A process failed.
        """
        _check_function(function)
        self._require_open("launch")
        launcher = self._launcher_to_use()
        if self._connected or launcher is None:
            self._connect()
            return None if function is None else function(self, *args, **kwargs)
        choice = self.plan.launcher
        if choice is not None and isinstance(choice.spec, LauncherSpec) and choice.spec.needs_function:
            _require_function(function, self.plan.strategy.name)
        call = partial(_run_in_rank, self, function, args, kwargs)
        if function is not None:
            update_wrapper(call, function)  # messages speak of the user's function
        from fabric_core.starting import way_to_start  # where nothing is started, it is not needed

        warm = way_to_start(self.plan, os.environ).warm
        return launcher.launch(call, LaunchJob(self.plan.processes_per_node, self.plan.num_nodes, warm))

    def _launcher_to_use(self) -> Launcher | None:
        """The launcher, unless an environment that could not be detected turns out to have started the processes."""
        return None if self._parts.cluster_environment.creates_processes_externally else self._parts.launcher

    def _connect(self) -> None:
        if self._connected:
            return
        strategy, environment = self._parts.strategy, self._parts.cluster_environment
        environment.validate(self.plan.processes_per_node, self.plan.num_nodes)
        environment.join()
        store = strategy.store
        if store is not None:
            check_same_plan(
                store,
                self.plan.fingerprint(),
                rank=strategy.global_rank,
                world_size=self.world_size,
                node_rank=strategy.node_rank,
            )
        self._parts.precision.attach(strategy.root_device)
        strategy.connect()
        self._connected = True
        tell_supervisor(Milestone.JOINED)

    def _require_launched(self, verb: str) -> None:
        """Where the processes are there already, the first verb joins them; otherwise somebody has to start them."""
        if self._connected:
            return
        self._require_open(verb)
        if self._launcher_to_use() is not None:
            raise SetupError(
                f"fabric.{verb}() was called before fabric.launch(): the strategy {self.plan.strategy.name!r} needs "
                f"{self.plan.processes_per_node} process(es) on this node, and they are not started yet. Call "
                "fabric.launch() first, or start the script with 'fabric run'."
            )
        self._connect()

    def _require_open(self, verb: str) -> None:
        if self._closed:
            raise SetupError(f"fabric.{verb}() was called after fabric.close(). Make a new Fabric.")

    def close(self, status: str = "success") -> None:
        """Wait for the last save, finish the loggers and give back what the parts hold.

        Called on every rank; a second call does nothing.

        Args:
            status: ``"success"`` or ``"failed"``, for the loggers.

        Raises:
            CheckpointError: A save with ``wait=False`` has failed. All else is done nevertheless.
        """
        if self._closed:
            return
        self._closed = True
        only_launched = not self._connected and self._launcher_to_use() is not None
        self._connected = False
        with ExitStack() as stack:
            parts = self._parts
            for part in (parts.cluster_environment, parts.checkpoint_io, parts.precision, parts.accelerator):
                stack.callback(part.teardown)
            stack.callback(parts.strategy.teardown)
            if self._preemption is not None:
                stack.callback(self._preemption.close)
            if self._guard is not None:
                stack.callback(self._guard.release)
            if self.is_global_zero and not only_launched:
                for logger in self.loggers:
                    stack.callback(_finish_logger, logger, status)
            self._saving.wait()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.close()
            return
        mark_failure(error)  # before leaving the group, which makes the other ranks fail in their turn
        try:
            self.close("failed")
        except CheckpointError as lost:  # of the two, it is not what the program ends with
            warnings.warn(str(lost), UserWarning, stacklevel=2)


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    """The ``run`` method of a subclass, which launches the job first when nothing has."""

    @wraps(run)
    def launched(self: Life, *args: Any, **kwargs: Any) -> Any:
        if self._connected:
            return run(self, *args, **kwargs)
        return self.launch(_call_run, *args, **kwargs)

    launched.launches = True  # type: ignore[attr-defined]
    return launched


def _call_run(fabric: Any, *args: Any, **kwargs: Any) -> Any:
    return fabric.run(*args, **kwargs)


def _run_in_rank(
    fabric: Life, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a launcher runs in each process."""
    with fabric:
        fabric._connect()
        return None if function is None else function(fabric, *args, **kwargs)


def _check_function(function: Any) -> None:
    if function is None:
        return
    if not callable(function):
        raise WrongTypeError(f"fabric.launch takes a function, not a {type(function).__qualname__}.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a function written in C says nothing of its arguments
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not any(p.kind in (*positional, inspect.Parameter.VAR_POSITIONAL) for p in parameters):
        raise WrongTypeError(
            f"fabric.launch({getattr(function, '__name__', function)!s}) calls the function with the Fabric as its "
            "first argument, and it takes none. Write: def function(fabric): …"
        )


def _require_function(function: Any, strategy: str) -> None:
    if function is None:
        raise SetupError(
            f"The strategy {strategy!r} runs a function in new processes, and fabric.launch() was given none. "
            "Put the training into a function and call fabric.launch(function); it gets the Fabric as its argument."
        )


def _finish_logger(logger: Any, status: str) -> None:
    for method, arguments in (("save", ()), ("finalize", (status,))):
        getattr(logger, method, _nothing)(*arguments)


def _nothing(*_: Any) -> None:
    """For a logger that has no such method."""
