"""The ``Fabric``: the object in the user's hand. It holds the plan and its parts, and each verb delegates to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from fabric_core.accumulation import Accumulation
from fabric_core.data.iteration import LoaderTracker
from fabric_core.plan import AUTO, Plan
from fabric_core.saving import Saving
from fabric_core.setting_up import SetUp
from fabric_core.verbs.managing import Managing
from fabric_core.verbs.setting_up import SettingUp
from fabric_core.verbs.step import Step
from fabric_core.verbs.stopping import Stopping
from fabric_core.without_dynamo import keep_dynamo_out

keep_dynamo_out()  # at the import, because optimizers are often made before the Fabric


class Fabric(SettingUp, Step, Managing, Stopping):
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
        strategy_options: Options of the strategy, by name. They lie over those of ``fabric.toml``, and have to agree
            with those of the command line.
        precision_options: Options of the precision, by name; likewise.
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
        # Here, because a program that only derives a class, or is asked for its help, makes no Fabric.
        from fabric_core.build import build
        from fabric_core.registry import default_registry
        from fabric_core.request import as_tuple, make_request, replace_deprecated
        from fabric_core.resolve import resolve
        from fabric_core.settings import find_tables

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
            tables=find_tables(),
            environ=os.environ,
            registry=registry,
        )
        self.plan: Plan = resolve(request, registry)
        for sentence in self.plan.warnings:
            warnings.warn(sentence, UserWarning, stacklevel=2)
        self._parts = build(self.plan)
        self.callbacks: list[Any] = list(as_tuple(callbacks))
        self.loggers: list[Any] = list(self._parts.loggers)
        self._preemption = None
        self._connected = False
        self._closed = False
        self._tracker = LoaderTracker()
        self._set_up = SetUp()
        self._accumulation = Accumulation(self._tracker)
        self._guard = self._make_guard()
        self._saving = Saving()
        self._warned_no_hold = self._warned_no_background = False
        self._turns = 0
