"""Fully sharded data parallel: every process holds a part of the model, and gathers the rest while it computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from fabric_backends import collectives
from fabric_backends.hooks import FSDP
from fabric_backends.sharding.grid import MeshShape, check_options, forget_groups, mesh_of, shape_for
from fabric_backends.sharding.identity import refuse_copies
from fabric_backends.sharding.memory import give_back
from fabric_backends.sharding.recomputing import Recomputed, check_recomputed, recompute
from fabric_backends.sharding.units import Policy, UnitPolicy, is_container, own_modules
from fabric_backends.sharding.views import keep_views_inside
from fabric_backends.strategies.folders import CheckpointKind
from fabric_backends.strategies.sharded import ShardedStrategy
from fabric_backends.timeouts import INIT_TIMEOUT
from fabric_core.contracts.strategy import Surroundings
from fabric_core.errors import OptionsError, SetupError
from fabric_core.materializing import materialize, warn_of_undefined


class FSDPStrategy(ShardedStrategy):
    """PyTorch's ``fully_shard`` (FSDP2).

    A model is divided into *units*: modules whose parameters are gathered before they compute, and dropped afterwards.
    Between the passes every rank holds its shard of each parameter, of its gradient and of its optimizer's state.

    Args:
        auto_wrap_policy: Which modules are units: a set of classes, a function that says of a module whether it is
            one, or ``"auto"``: those with at least ``min_parameters``. The model as a whole always is one.
        min_parameters: How many parameters make a unit, with ``"auto"``.
        mixed_precision: A ``MixedPrecisionPolicy`` for all units; its ``output_dtype`` is that of the whole model.
            Default: what the precision wants.
        activation_checkpointing: Which modules are computed again in the backward pass, instead of keeping what they
            computed: ``True`` for the units inside of the model, a set of classes, or a function.
        cpu_offload: Keep shards in the memory of the CPU. Optimizers step there.
        reshard_after_forward: Drop what was gathered after the forward pass, and gather it again for the backward
            pass; a number: keep shards of 1 in so many. Default: all units but the outermost are dropped.
        device_mesh: ``(replicas, shards)``, or a ``DeviceMesh`` with one or two named axes: shard the model over the
            last one, keep a replica of it along the first.
        shard_size: The same by the number of processes that share one replica, or ``"node"`` for those of a node.
        checkpoint, process_group_backend, timeout, init_timeout: As in `ShardedStrategy`.

    Raises:
        OptionsError: An option has a value that it cannot have.
    """

    spec = FSDP

    def __init__(
        self,
        *,
        auto_wrap_policy: Policy = "auto",
        min_parameters: int = 1_000_000,
        mixed_precision: MixedPrecisionPolicy | None = None,
        activation_checkpointing: Recomputed = False,
        cpu_offload: bool = False,
        reshard_after_forward: bool | int | None = None,
        device_mesh: MeshShape = None,
        shard_size: int | Literal["node"] | None = None,
        checkpoint: CheckpointKind = "sharded",
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
        init_timeout: float | timedelta = INIT_TIMEOUT,
    ) -> None:
        super().__init__(
            checkpoint=checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            init_timeout=init_timeout,
        )
        if not (mixed_precision is None or isinstance(mixed_precision, MixedPrecisionPolicy)):
            raise OptionsError(
                f"The option mixed_precision is {mixed_precision!r}. It takes a "
                "torch.distributed.fsdp.MixedPrecisionPolicy; for the usual ones, set precision= instead."
            )
        if not (reshard_after_forward is None or isinstance(reshard_after_forward, int)):
            raise OptionsError(
                f"The option reshard_after_forward is {reshard_after_forward!r}. It takes True, False, or a number of "
                "processes."
            )
        check_recomputed(activation_checkpointing)
        check_options(device_mesh, shard_size)
        self._units = UnitPolicy(auto_wrap_policy, min_parameters)
        self._mixed_precision = mixed_precision
        self._recomputed = activation_checkpointing
        self._cpu_offload = cpu_offload
        self._reshard_after_forward = reshard_after_forward
        self._asked_mesh, self._shard_size = device_mesh, shard_size
        self._shape: tuple[int, ...] = ()
        self._mesh: DeviceMesh | None = None

    # -- coming and going -----------------------------------------------------------------------------------------

    def attach(self, surroundings: Surroundings) -> None:
        """As the contract.

        Raises:
            OptionsError: ``device_mesh`` or ``shard_size`` does not fit the number of processes.
        """
        super().attach(surroundings)
        self._shape = shape_for(
            self._asked_mesh, self._shard_size, self.world_size, surroundings.processes_per_node
        )

    def connect(self) -> None:
        """Join the other ranks and make the mesh. Called on every rank, once. Errors as in `ParallelStrategy`."""
        super().connect()
        asked = self._asked_mesh
        self._mesh = asked if isinstance(asked, DeviceMesh) else mesh_of(self._shape, self.root_device)
        self.afterwards(partial(forget_groups, self._mesh))

    def teardown(self) -> None:
        """Let go of the models and the mesh, then leave the process group. Safe to call twice."""
        super().teardown()
        self._mesh = None

    # -- setting up -----------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which a model is created: on the CPU, because it need not fit on the device.

        Args:
            empty_init: Create it on the meta device, where it takes no memory at all. `setup_module` then gives it
                values, unit by unit.
        """
        return torch.device("meta" if empty_init else "cpu")

    def move_module(self, module: nn.Module) -> None:
        """Leave the model where it is: `setup_module` moves it unit by unit, because it need not fit on the device."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank its shards of rank 0's weights, and rank 0's buffers. Called on every rank.

        Returns:
            The module, whose parameters are sharded in place.

        Raises:
            SetupError: It cannot be sharded.
        """
        _check(module)
        units = self._units.units_of(module)
        recompute(self._recomputed, module, units)
        undefined: list[str] = []
        with self.rebinding.watch(module):
            for unit in units:
                own = own_modules(unit, set(units) - {unit})
                undefined += materialize(own, self.root_device)
                self._synchronize(own)
                keep_views_inside(unit)
                fully_shard(unit, mp_policy=self._policy(unit is module), **self._arguments)
                give_back(self.root_device)
        refuse_copies(module)
        warn_of_undefined(module, undefined)
        self.remember(module)
        return module

    def _synchronize(self, modules: list[nn.Module]) -> None:
        """Move what some modules have themselves to the device, and make it equal to what rank 0 has."""
        own: dict[int, Tensor] = {}
        for module in modules:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                own[id(tensor)] = tensor
        for tensor in own.values():
            tensor.data = tensor.data.to(self.root_device).contiguous()  # shards are cut from rows
            collectives.broadcast_(tensor)

    def _policy(self, is_outermost: bool) -> MixedPrecisionPolicy:
        given = self._mixed_precision
        if given is not None:  # what goes from one unit to the next stays as it is
            return given if is_outermost else replace(given, output_dtype=None)
        wanted = None if is_outermost else getattr(self.surroundings.precision, "unit_policy", None)
        return wanted or MixedPrecisionPolicy()

    @property
    def _arguments(self) -> dict[str, Any]:
        pins = self.root_device.type != "cpu"
        return {
            "mesh": self._mesh,
            "reshard_after_forward": self._reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(pin_memory=pins) if self._cpu_offload else OffloadPolicy(),
        }


def _check(module: nn.Module) -> None:
    name = type(module).__name__
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise SetupError(
            f"The {name} is sharded already, by fully_shard or by another Fabric. Set up the model as it was before."
        )
    if is_container(module):
        raise SetupError(
            f"A {name} cannot be set up: it is never called itself. Set up the model that holds it."
        )
    scalars = [key for key, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise SetupError(
            f"The {name} cannot be sharded, because {', '.join(map(repr, scalars))} has no dimension to divide. Give "
            "such parameters one: nn.Parameter(torch.ones(1)) instead of nn.Parameter(torch.tensor(1.0))."
        )
