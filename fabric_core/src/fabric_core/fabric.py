"""The ``Fabric``: the object in the user's hand. It holds the plan and its parts, and each verb delegates to them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core import checkpoint as checkpoints
from fabric_core.accumulation import Accumulation, Window
from fabric_core.build import build
from fabric_core.collectives import each_tensor, reducible
from fabric_core.collectives import reduce_op as reduce_op_named
from fabric_core.consensus import check_same_plan
from fabric_core.contracts.accelerator import Accelerator
from fabric_core.contracts.launcher import Launcher
from fabric_core.contracts.strategy import Strategy
from fabric_core.data import seed as seeds
from fabric_core.data.collections import move_to_device, to_scalars
from fabric_core.data.iteration import LoaderTracker
from fabric_core.data.loader import wrap_loader
from fabric_core.errors import ConfigurationError, SetupError, WrongTypeError
from fabric_core.plan import AUTO, Plan
from fabric_core.registry import default_registry
from fabric_core.request import as_tuple, make_request, replace_deprecated
from fabric_core.resolve import resolve
from fabric_core.setting_up import check_model, check_not_wrapped, check_optimizer, without_compile
from fabric_core.specs import LauncherSpec
from fabric_core.wrappers.face import unwrap
from fabric_core.wrappers.guard import BackwardGuard, watch
from fabric_core.wrappers.module import FabricModule, wrap_module
from fabric_core.wrappers.optimizer import wrap_optimizer

T = TypeVar("T")
FOREVER = timedelta(days=365)
"""How long ranks wait for one that works alone (``rank_zero_first``); a rank that dies ends the job earlier."""


class Fabric:
    """Runs a plain PyTorch loop on any device, at any scale.

    Example:
        >>> fabric = Fabric(accelerator="cpu", devices=2)
        >>> fabric.launch()
        >>> model, optimizer = fabric.setup(model, optimizer)
        >>> loader = fabric.setup_dataloaders(loader)
        >>> for inputs, targets in loader:
        ...     loss = loss_function(model(inputs), targets)
        ...     fabric.backward(loss)
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Every part is asked for by name (``"name"``, ``"name@distribution"``, ``"package.module:Class"``), by class or by
    instance, and found among the installed distributions. Used as a context manager, it is closed at the end.

    Args:
        accelerator: The device: a name, a group (``"gpu"``), or ``"auto"`` for the best that is there.
        strategy: How training is spread over devices, or ``"auto"``.
        devices: Per node: a count (``2``, ``"2"``), all (``-1``), indices (``[1, 4]``, ``"1, 4"``), ``"auto"``, or
            ``None`` / ``0`` for one process on the CPU.
        num_nodes: How many nodes; ``"auto"`` follows the cluster environment.
        precision: The number formats: ``"32-true"``, ``"bf16-mixed"``, …, or ``64``, ``32``, ``16``, ``"bf16"``.
        plugins: Further parts, one or a list: a precision, a cluster environment, a launcher, a checkpoint io.
        callbacks: Objects whose methods `call` calls, one or a list.
        loggers: Sinks for `log`: names, loggers, or any object with ``log_metrics``; one or a list.
        strategy_options: Options of the strategy, by name.
        precision_options: Options of the precision, by name.
        gpus: Deprecated: ``accelerator="gpu", devices=…``.
        tpu_cores: Deprecated: the same for cores of that other kind.

    Raises:
        ConfigurationError: What was asked for makes no sense, or cannot be had here; the message says what there is.
        PluginError: An installed plugin is at fault.

    Attributes:
        plan: What was decided, with a reason for each choice.
        callbacks: The callbacks, in a list of our own.
        loggers: The loggers.
    """

    def __init__(
        self,
        *,
        accelerator: Any = AUTO,
        strategy: Any = AUTO,
        devices: Any = AUTO,
        num_nodes: int | str = AUTO,
        precision: Any = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
        strategy_options: Mapping[str, Any] | None = None,
        precision_options: Mapping[str, Any] | None = None,
        gpus: Any = None,
        tpu_cores: Any = None,
    ) -> None:
        flags = {
            "accelerator": accelerator,
            "strategy": strategy,
            "devices": devices,
            "num_nodes": num_nodes,
            "precision": precision,
        }
        old = {"gpus": gpus, "tpu_cores": tpu_cores}
        replace_deprecated(flags, {name: value for name, value in old.items() if value is not None})
        registry = default_registry()
        request = make_request(
            flags,
            plugins=plugins,
            loggers=loggers,
            options={"strategy": strategy_options or {}, "precision": precision_options or {}},
            environ=os.environ,
            registry=registry,
        )
        self.plan: Plan = resolve(request, registry)
        for sentence in self.plan.warnings:
            warnings.warn(sentence, UserWarning, stacklevel=2)
        self._parts = build(self.plan)
        self.callbacks: list[Any] = list(as_tuple(callbacks))
        self.loggers: list[Any] = list(self._parts.loggers)
        self._connected = False
        self._closed = False
        self._tracker = LoaderTracker()
        self._accumulation = Accumulation(self._tracker)
        self._guard = self._make_guard()
        self._warned_no_hold = False
        self._turns = 0

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
        return launcher.launch(
            _run_in_rank,
            self,
            function,
            *args,
            num_processes=self.plan.processes_per_node,
            num_nodes=self.plan.num_nodes,
            **kwargs,
        )

    def _launcher_to_use(self) -> Launcher | None:
        """The launcher, unless an environment that could not be detected turns out to have started the processes."""
        return None if self._parts.cluster_environment.creates_processes_externally else self._parts.launcher

    def _connect(self) -> None:
        if self._connected:
            return
        strategy, environment = self._parts.strategy, self._parts.cluster_environment
        environment.validate(self.plan.processes_per_node, self.plan.num_nodes)
        store = strategy.store
        if store is not None:
            check_same_plan(
                store,
                self.plan.fingerprint(),
                rank=strategy.global_rank,
                world_size=self.world_size,
                node_rank=strategy.node_rank,
            )
        strategy.connect()
        self._connected = True

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
        """Finish the loggers and give back what the parts hold. Called on every rank; a second call does nothing.

        Args:
            status: ``"success"`` or ``"failed"``, for the loggers.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            parts = self._parts
            for part in (parts.cluster_environment, parts.checkpoint_io, parts.precision, parts.accelerator):
                stack.callback(part.teardown)
            stack.callback(parts.strategy.teardown)
            if self._guard is not None:
                stack.callback(self._guard.release)
            if self.is_global_zero:
                for logger in self.loggers:
                    stack.callback(_finish_logger, logger, status)
        self._connected = False

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close("success" if kind is None else "failed")

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup(
        self,
        model: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Make a model and its optimizers ready. Called on every rank, in the same order.

        What comes back is an instance of the same classes, with the same attributes. A compiled model is compiled
        again around the strategy.

        Args:
            model: The model. Several models are set up one after the other.
            optimizers: Any number of optimizers of its parameters.
            scheduler: A learning-rate scheduler, for strategies that have to replace it.
            move_to_device: Move the parameters to `device`.

        Returns:
            The model; with optimizers a tuple (model, optimizers…), with a scheduler that at its end.

        Raises:
            SetupError: Not launched yet, or something was set up already.
        """
        self._require_launched("setup")
        check_model("setup", model)
        for optimizer in optimizers:
            check_optimizer("setup", optimizer)
        original, recompile = without_compile(model, _reapply_compile)
        original = self._parts.precision.convert_module(original)
        if move_to_device:
            self.strategy.move_module(original)
        forward_module, ready, scheduler = self.strategy.setup_module_and_optimizers(
            original, list(optimizers), scheduler
        )
        watch(original, self._guard)
        wrapped = wrap_module(original, forward_module, self._parts.precision, recompile)
        self.call("on_after_setup", fabric=self, module=wrapped)
        rest = [self._wrap_optimizer(optimizer) for optimizer in ready]
        rest += [] if scheduler is None else [scheduler]
        return (wrapped, *rest) if rest else wrapped

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule:
        """Make a model ready without an optimizer, for inference or with `setup_optimizers`. As `setup`."""
        self._refuse_apart("setup_module")
        wrapped: FabricModule = self.setup(
            module, move_to_device=move_to_device, _reapply_compile=_reapply_compile
        )
        return wrapped

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers ready apart from their model, after `setup_module`. Called on every rank.

        Returns:
            The optimizer, or a tuple of several.

        Raises:
            SetupError: Not launched yet, set up already, or the strategy needs model and optimizers together.
        """
        self._refuse_apart("setup_optimizers")
        self._require_launched("setup_optimizers")
        for optimizer in optimizers:
            check_optimizer("setup_optimizers", optimizer)
        wrapped = tuple(
            self._wrap_optimizer(self.strategy.setup_optimizer(optimizer)) for optimizer in optimizers
        )
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        replace_sampler: bool = True,
        use_distributed_sampler: bool | None = None,
        move_to_device: bool = True,
    ) -> Any:
        """Make data loaders ready: each rank sees its share, on its device. Called on every rank, in the same order.

        Args:
            dataloaders: ``DataLoader`` objects, or of a class derived from it.
            replace_sampler: Split the data between the ranks. Samplers and batch samplers of your own are kept, and
                what they yield is dealt out. The epoch is announced to samplers and dataset at each loop.
            use_distributed_sampler: The same, under the name that it has elsewhere.
            move_to_device: Move each batch to `device`: tensors in dictionaries, lists, tuples, dataclasses…

        Returns:
            The loader, or a list of several.

        Raises:
            SetupError: Not launched yet, or set up already.
            WrongTypeError: Not a ``DataLoader``.
        """
        self._require_launched("setup_dataloaders")
        check_not_wrapped("setup_dataloaders", *dataloaders)
        strategy = self.strategy
        wrapped = [
            wrap_loader(
                loader,
                device=strategy.loader_device if move_to_device else None,
                **strategy.sampler_arguments,
                seed=seeds.current_seed() or 0,
                tracker=self._tracker,
                shard=replace_sampler if use_distributed_sampler is None else use_distributed_sampler,
                seed_workers=seeds.workers_are_seeded(),
            )
            for loader in dataloaders
        ]
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """A context in which a model is created on `device`, in the dtype of the precision.

        Args:
            empty_init: Leave the weights uninitialised, because a checkpoint will be loaded. ``None`` leaves the
                choice to the strategy.
        """
        self._require_launched("init_module")
        return self._init_context(self.strategy.module_init_context(empty_init))

    def init_tensor(self) -> AbstractContextManager[None]:
        """A context in which tensors are created on `device`, in the dtype of the precision."""
        self._require_launched("init_tensor")
        return self._init_context(self.device)

    def to_device(self, obj: T) -> T:
        """Move a model (in place), a tensor or a collection of tensors to `device`, and return it."""
        self._require_launched("to_device")
        if isinstance(obj, nn.Module):
            self.strategy.move_module(unwrap(obj))
            return obj
        return move_to_device(obj, self.device)

    def _wrap_optimizer(self, optimizer: Optimizer) -> Any:
        return wrap_optimizer(optimizer, self.strategy, self._accumulation, self._after_step)

    def _refuse_apart(self, verb: str) -> None:
        if self.strategy.joint_setup:
            raise SetupError(
                f"The strategy {self.plan.strategy.name!r} sets up a model and its optimizers together; {verb}() does "
                "it apart. Call fabric.setup(model, *optimizers)."
            )

    @contextmanager
    def _init_context(self, outer: Any) -> Generator[None, None, None]:
        with outer, self._parts.precision.init_context():
            yield

    # -- the step -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compute gradients: ``loss.backward()``, in the way of precision and strategy. Called on every rank.

        Inside `accumulate`, the loss is divided by the number of micro-batches in the window.

        Args:
            loss: A scalar; any shape when ``gradient=`` is given.
            model: The set-up model that the loss comes from, where a strategy has to know it.
            args, kwargs: For ``torch.Tensor.backward``.
        """
        self._require_launched("backward")
        loss = self._parts.precision.scale_loss(self._accumulation.share(loss))
        module = model._fabric_forward_module if isinstance(model, FabricModule) else model
        guard = self._guard
        if guard is None:
            self.strategy.backward(loss, module, *args, **kwargs)
            return
        guard.inside = True
        try:
            self.strategy.backward(loss, module, *args, **kwargs)
        finally:
            guard.inside = False

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, in place, by value or by norm. Called on every rank.

        Gradients of a scaled loss are brought to their true size first. Inside a window of `accumulate` that is not
        full, nothing happens and ``None`` is returned.

        Args:
            module: The set-up model.
            optimizer: Whose parameters.
            clip_val: Clamp each element to ``[-clip_val, clip_val]``.
            max_norm: Scale all gradients so that their joint norm is at most this. Exactly one of the two.
            norm_type: The p of the p-norm; may be ``inf``.
            error_if_nonfinite: Raise when the norm is NaN or infinite. By default it raises, except where losses are
                scaled: there such a step is skipped anyway, and the scale lowered.

        Returns:
            With ``max_norm`` the norm before clipping, over all ranks: a 0-dimensional tensor.

        Raises:
            ConfigurationError: Not exactly one of ``clip_val`` and ``max_norm``.
            RuntimeError: The norm is not finite.
        """
        if (clip_val is None) == (max_norm is None):
            raise ConfigurationError(
                f"clip_gradients takes either clip_val or max_norm; got clip_val={clip_val}, max_norm={max_norm}."
            )
        self._require_launched("clip_gradients")
        if self._accumulation.is_open:
            return None
        precision, original = self._parts.precision, unwrap(optimizer)
        precision.unscale_gradients(original)
        parameters = [parameter for group in original.param_groups for parameter in group["params"]]
        forward_module = module._fabric_forward_module if isinstance(module, FabricModule) else module
        if max_norm is None:
            self.strategy.clip_gradients_value(forward_module, parameters, float(clip_val or 0.0))
            return None
        strict = not precision.scales_loss if error_if_nonfinite is None else error_if_nonfinite
        return self.strategy.clip_gradients_norm(forward_module, parameters, max_norm, norm_type, strict)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the precision's forward pass, for computations outside of a model."""
        return self._parts.precision.forward_context()

    @contextmanager
    def no_backward_sync(self, model: nn.Module, enabled: bool = True) -> Iterator[None]:
        """A context in which gradients are not synchronised between ranks. Called on every rank.

        Forward and backward pass both have to be inside. Where the strategy cannot hold the synchronisation back,
        this does nothing, with one warning.

        Args:
            model: A set-up model.
            enabled: ``False`` makes it do nothing.

        Raises:
            WrongTypeError: The model is not set up.
        """
        if not isinstance(model, FabricModule):
            raise WrongTypeError(
                f"no_backward_sync needs a model that setup() returned, not a {type(model).__qualname__}."
            )
        self._require_launched("no_backward_sync")
        held = self.strategy.hold_gradient_sync(model._fabric_forward_module) if enabled else None
        if enabled and held is None and not self._warned_no_hold:
            self._warned_no_hold = True
            warnings.warn(
                f"The strategy {self.plan.strategy.name!r} cannot hold back the synchronisation of gradients; they are "
                "synchronised in every backward pass. The result is the same.",
                UserWarning,
                stacklevel=3,
            )
        if held is None:
            yield
        else:
            with held:
                yield

    @contextmanager
    def accumulate(self, model: nn.Module | Iterable[nn.Module], every: int) -> Iterator[Window]:
        """Run one micro-batch of a window of ``every``: the optimizer steps once per window. Called on every rank.

        Inside, ``backward`` divides the loss by the number of micro-batches in the window, and gradients are
        synchronised, clipped, applied (``optimizer.step``) and dropped (``optimizer.zero_grad``) only with the last
        of them. The last batch of the loader that is being looped over (one that was set up) ends a window early;
        the losses are then divided by the number that there really are.

        Example:
            >>> for batch in loader:
            ...     with fabric.accumulate(model, every=8):
            ...         fabric.backward(loss_function(model(batch)))
            ...         optimizer.step()
            ...         optimizer.zero_grad()

        Args:
            model: A set-up model, or several that are trained in the same window.
            every: How many micro-batches make a window.

        Yields:
            The window; its ``is_full`` tells whether optimizers step in this micro-batch.
        """
        models = [model] if isinstance(model, nn.Module) else list(model)
        with (
            self._accumulation.enter([unwrap(m) for m in models], every) as window,
            ExitStack() as stack,
        ):
            for each in models:
                if window.correction != 1.0:
                    self.strategy.scale_gradients(unwrap(each), window.correction)
                stack.enter_context(self.no_backward_sync(each, enabled=not window.is_full))
            yield window

    def _after_step(self, optimizer: Optimizer) -> None:
        if self.callbacks:
            self.call("on_after_optimizer_step", strategy=self.strategy, optimizer=optimizer)

    # -- talking to the other ranks -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here. Called on every rank.

        Args:
            name: What is waited for, for messages.
        """
        self._require_launched("barrier")
        self.strategy.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Send an object from global rank ``src`` to all. Called on every rank.

        Args:
            obj: A tensor, or anything that can be pickled; the other ranks may pass anything.
            src: Whose object.

        Returns:
            The object of rank ``src``.
        """
        self._require_launched("broadcast")
        if not 0 <= src < self.world_size:
            raise ConfigurationError(f"broadcast(src={src}): there are ranks 0 to {self.world_size - 1}.")
        result: T = self.strategy.broadcast(obj, src)
        return result

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        r"""Collect tensors or numbers from every rank. Called on every rank (of ``group``).

        Args:
            data: A tensor of any shape S, the same on every rank, a number, or a collection of them.
            group: A ``torch.distributed`` process group; all ranks by default.
            sync_grads: Let gradients flow back to the ranks.

        Returns:
            The same collection, each tensor of shape (ranks, \*S), in rank order; with one rank too.
        """
        self._require_launched("all_gather")
        gather = self.strategy.all_gather
        return each_tensor(data, self.device, lambda tensor: gather(tensor, group, sync_grads))

    def all_reduce(self, data: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """Reduce tensors or numbers over every rank. Called on every rank (of ``group``).

        Args:
            data: A tensor of any shape, the same on every rank, a number, or a collection of them. It is not changed.
            group: A ``torch.distributed`` process group; all ranks by default.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or ``"product"``.

        Returns:
            The same collection, equal on every rank. Means of whole numbers are float64, sums of booleans int64.
        """
        self._require_launched("all_reduce")
        op, reduce = reduce_op_named(reduce_op), self.strategy.all_reduce
        return each_tensor(data, self.device, lambda tensor: reduce(reducible(tensor, op), op, group))

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """A block that rank 0 runs before all others, for a download or a cache. Called on every rank.

        When rank 0 fails in it, the others do not run it; they fail as well.

        Args:
            local: Let rank 0 of each node go first, for files that nodes do not share.

        Raises:
            SetupError: On the other ranks, when rank 0 has failed.
        """
        self._require_launched("rank_zero_first")
        store = self.strategy.store
        self._turns += 1
        key = f"fabric/first/{self._turns}/{self.node_rank if local else 0}"
        if store is None:
            yield
        elif (self.local_rank if local else self.global_rank) == 0:
            try:
                yield
            except BaseException as error:
                store.set(key, f"{type(error).__name__}: {error}")
                raise
            store.set(key, "")
        else:
            store.wait([key], FOREVER)
            failure = store.get(key).decode()
            if failure:
                raise SetupError(
                    f"rank_zero_first: rank 0 failed in the block, so it is not run here. {failure}"
                )
            yield

    # -- state ----------------------------------------------------------------------------------------------------

    def save(
        self,
        path: Any = None,
        state: Any = None,
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,  # noqa: A002
    ) -> None:
        """Write a checkpoint. Called on every rank; returns when it is on disk.

        A crash at any moment leaves the old file or the new one. The state of the precision (a loss scale) is saved
        along. ``path`` and ``state`` may be given in either order.

        Args:
            path: Where to.
            state: A dictionary of models, optimizers, objects with ``state_dict``, plain values, and of dictionaries
                of them.
            filter: For some keys, a function of a name and a value that says which entries of that state to keep.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """
        self._require_launched("save")
        where, what = checkpoints.path_and_state(path, state)
        collected = checkpoints.collect(what, self.strategy, self._parts.precision, filter)
        self.strategy.save_checkpoint(where, collected)

    def load(
        self,
        path: Any = None,
        state: Any = None,
        strict: bool = True,
        *,
        weights_only: bool = True,
    ) -> dict[str, Any]:
        """Read a checkpoint. Called on every rank.

        Args:
            path: What `save` was given. ``path`` and ``state`` may be given in either order.
            state: What to restore, in place: models, optimizers and stateful objects are loaded, plain values
                replaced. Without it, the whole checkpoint is returned, on the CPU.
            strict: Raise when the checkpoint lacks a key of ``state``, or a parameter.
            weights_only: ``False`` allows the file to execute code while it is read. Only for files that you trust.

        Returns:
            What of the checkpoint ``state`` did not ask for.

        Raises:
            CheckpointError: There is none, or it is damaged.
            CheckpointKeyError: It lacks something.
            UnsafeCheckpointError: It holds more than ``weights_only`` allows.
        """
        self._require_launched("load")
        if state is None:
            return self._read(path, weights_only)
        where, what = checkpoints.path_and_state(path, state)
        if not isinstance(what, MutableMapping):
            raise WrongTypeError(
                f"load restores a dictionary of things, not a {type(what).__name__}; for one bare state dict there is "
                "load_raw(path, obj)."
            )
        loaded = self.strategy.load_checkpoint(where, weights_only=weights_only)
        return checkpoints.restore(loaded, what, self.strategy, self._parts.precision, strict)

    def load_raw(
        self, path: Any, obj: nn.Module | Optimizer, strict: bool = True, *, weights_only: bool = True
    ) -> None:
        """Load a bare state dict, as ``torch.save(model.state_dict())`` writes it, into a model or an optimizer.

        Called on every rank. Arguments and errors as in `load`.
        """
        self._require_launched("load_raw")
        checkpoints.restore_raw(self._read(path, weights_only), obj, self.strategy, strict)

    def _read(self, path: Any, weights_only: bool) -> dict[str, Any]:
        return self.strategy.load_checkpoint(checkpoints.checked_path(path), weights_only=weights_only)

    # -- saying and calling ---------------------------------------------------------------------------------------

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool = True, verbose: bool = False) -> int:
        """Seed Python, NumPy and PyTorch, the same on every rank. See `fabric_core.seed_everything`.

        Args:
            seed: From 0 to 2**32 - 1; ``None`` takes ``FABRIC_SEED``, or 0.
            workers: Seed the workers of loaders that are set up afterwards as well, each differently.
            verbose: Print the seed.

        Returns:
            The seed.
        """
        return seeds.seed_everything(seed, workers, verbose)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on local rank 0 of each node only. Arguments as for ``print``."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201

    def call(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call a method on every callback that has it, in order. Runs on whichever ranks call it.

        Args:
            hook: The method's name.
            args: For the method.
            kwargs: For the method, as far as it takes them.
        """
        for callback in self.callbacks:
            method = getattr(callback, hook, None)
            if method is None:
                continue
            if not callable(method):
                warnings.warn(
                    f"The callback {type(callback).__name__} has an attribute {hook!r} that is not callable; skipped.",
                    UserWarning,
                    stacklevel=2,
                )
                continue
            method(*args, **_accepted(method, kwargs))

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Send one metric to every logger. Acts on global rank 0; may be called on every rank.

        Args:
            name: What it is called.
            value: A number, or a tensor of one element.
            step: The training step that it belongs to.
        """
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send several metrics to every logger. As `log`.

        Raises:
            ConfigurationError: A value has several elements.
        """
        if self.is_global_zero and self.loggers:
            numbers = to_scalars(metrics)
            for logger in self.loggers:
                logger.log_metrics(metrics=numbers, step=step)


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    """The ``run`` method of a subclass, which launches the job first when nothing has."""

    @wraps(run)
    def launched(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._connected:
            return run(self, *args, **kwargs)
        return self.launch(_call_run, *args, **kwargs)

    launched.launches = True  # type: ignore[attr-defined]
    return launched


def _call_run(fabric: Any, *args: Any, **kwargs: Any) -> Any:
    return fabric.run(*args, **kwargs)


def _run_in_rank(fabric: Fabric, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
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


def _accepted(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``kwargs`` that a method takes."""
    if not kwargs:
        return kwargs
    try:
        parameters = inspect.signature(method).parameters.values()
    except (ValueError, TypeError):  # a method written in C says nothing of its arguments
        return kwargs
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return kwargs
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in kwargs.items() if name in by_name}


def _finish_logger(logger: Any, status: str) -> None:
    for method, arguments in (("save", ()), ("finalize", (status,))):
        getattr(logger, method, _nothing)(*arguments)


def _nothing(*_: Any) -> None:
    """For a logger that has no such method."""
