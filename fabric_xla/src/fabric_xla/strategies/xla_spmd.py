"""One program over all devices of a machine: torch_xla's SPMD mode.

The program is written as for one device. Tensors are marked as divided over a mesh of devices, and the compiler derives
from that who computes and sends what. Batches, weights and losses are global ones; there is one process and one rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.core import xla_model as xm
from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel

from fabric_core.data.collections import map_tensors
from fabric_core.errors import OptionsError
from fabric_core.sharded.shares import Share
from fabric_core.sharded.trees import mapped, named
from fabric_xla.divided import in_boxes
from fabric_xla.hooks import XLA_SPMD
from fabric_xla.partitioning import (
    BATCH_AXES,
    DATA,
    FSDP,
    PartitionSpec,
    Rules,
    check_partition,
    check_rules,
    checked_mesh_shape,
    fitted,
    partition_of,
)
from fabric_xla.strategies.lazy import CheckpointKind, LazyStrategy, checkpoint_kind, default_device
from fabric_xla.wrapping import wrap_policy

_INNER = "_orig_module."  # what torch_xla's wrapper adds to names


class XLASPMDStrategy(LazyStrategy):
    """Data parallel, fully sharded and tensor parallel training over a mesh of devices.

    A batch is the batch of all devices: it is divided over the axes ``data`` and ``fsdp`` of the mesh, along its first
    dimension. With an axis ``fsdp``, parameters are divided over it as well (``SpmdFullyShardedDataParallel``). Over
    any other axis, parameters are divided as ``partition`` or ``parallelize_fn`` say.

    Args:
        mesh_shape: The axes and their sizes, of which one may be -1 for what is left. By default ``{"data": -1}``.
        partition: Over which axes parameters are divided: patterns of names (``{"*.up.weight": ("model", None)}``), or
            a function of a name and a parameter. What nobody names is the same on every device.
        parallelize_fn: Called with the model and the mesh, to mark tensors by hand (``spmd.mark_sharding``).
        auto_wrap_policy: With ``fsdp``, whose outputs are kept divided too: classes of modules, or a function as
            torch_xla takes it.
        checkpoint: How ``save`` writes. ``"sharded"``: what is divided goes into a folder, device by device, and is
            whole nowhere; where nothing is divided, one file. ``"full"``: one file.

    Attributes:
        mesh: The mesh of torch_xla, once the job is launched.

    Raises:
        OptionsError: An option is malformed.
    """

    spec = XLA_SPMD
    mesh: xs.Mesh

    def __init__(
        self,
        *,
        mesh_shape: Mapping[str, int] | None = None,
        partition: Rules | None = None,
        parallelize_fn: Callable[[nn.Module, xs.Mesh], None] | None = None,
        auto_wrap_policy: Any = None,
        checkpoint: CheckpointKind = "sharded",
    ) -> None:
        self._shape = checked_mesh_shape({DATA: -1} if mesh_shape is None else mesh_shape)
        check_rules(partition)
        if parallelize_fn is not None and not callable(parallelize_fn):
            raise OptionsError(
                f"The option parallelize_fn is {parallelize_fn!r}. It takes a function of a model and a mesh."
            )
        self._partition = partition
        self._parallelize = parallelize_fn
        self._policy = wrap_policy("auto_wrap_policy", auto_wrap_policy)
        self.checkpoint = checkpoint_kind(checkpoint)
        self._inputs: dict[int, xs.ShardingSpec] = {}

    @property
    def root_device(self) -> torch.device:
        """The one device that stands for all of them."""
        return default_device()

    @property
    def axes(self) -> dict[str, int]:
        """The axes of the mesh and their sizes."""
        return dict(self.mesh.shape())

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH_AXES if axis in self._shape)

    def connect(self) -> None:
        """Enter the SPMD mode, which this process never leaves again, and lay out the mesh.

        Raises:
            ConfigurationError: The mesh does not fit the devices.
        """
        if not xr.is_spmd():
            xr.use_spmd()
        super().connect()
        count = xr.global_runtime_device_count()
        sizes = fitted(self._shape, count)
        self.mesh = xs.Mesh(np.arange(count), tuple(sizes.values()), tuple(sizes))

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Mark the parameters as divided over the mesh, in place.

        Returns:
            The module, or a ``SpmdFullyShardedDataParallel`` of it.

        Raises:
            OptionsError: What ``partition`` says of a parameter does not fit it.
        """
        if self._parallelize is not None:
            self._parallelize(module, self.mesh)
        self._apply_rules(module)
        if FSDP not in self._shape:
            return module
        # The wrapper hooks into the backward pass of every part, of which the first has inputs without gradients.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        wrapped: nn.Module = SpmdFullyShardedDataParallel(
            module, mesh=self.mesh, shard_output=self._shard_output, auto_wrap_policy=self._policy
        )
        return wrapped

    def _apply_rules(self, module: nn.Module) -> None:
        matched = False
        for name, parameter in module.named_parameters():
            spec = partition_of(self._partition, name, parameter)
            if spec is not None:
                check_partition(name, parameter, spec, self._shape)
                xs.mark_sharding(parameter, self.mesh, tuple(spec))
                matched = True
        if isinstance(self._partition, Mapping) and not matched:
            names = [name for name, _ in module.named_parameters()]
            warnings.warn(
                f"No parameter of {type(module).__name__} fits a pattern of partition={dict(self._partition)}, so none "
                f"is divided by it. They are called {', '.join(names[:5])}{', …' if len(names) > 5 else ''}.",
                UserWarning,
                stacklevel=2,
            )

    def _shard_output(self, output: Any, mesh: xs.Mesh) -> None:
        """Keep what a wrapped module returns divided along the batch, so that the compiler gathers weights instead."""

        def shard(tensor: Tensor) -> Tensor:
            if tensor.dim() > 0 and tensor.device.type == "xla":
                xs.mark_sharding(tensor, mesh, self._along_batch(tensor.dim()))
            return tensor

        map_tensors(shard, output)

    def _along_batch(self, dimensions: int) -> PartitionSpec:
        return (self._batch_axes or None, *[None] * (dimensions - 1))

    # -- batches --------------------------------------------------------------------------------------------------

    def upload(self, batch: Any, move: Callable[[Any], Any]) -> Any:
        """Send each device its part of a batch, and what has no first dimension to all of them."""
        return move(map_tensors(self._send, batch))

    def _send(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or tensor.dim() == 0 or not self._batch_axes:
            return tensor
        if tensor.dim() not in self._inputs:
            self._inputs[tensor.dim()] = xs.ShardingSpec(self.mesh, self._along_batch(tensor.dim()))
        (sent,) = xm.send_cpu_data_to_device([tensor], self.root_device, self._inputs[tensor.dim()])
        divided: Tensor = sent
        return divided

    # -- state ----------------------------------------------------------------------------------------------------

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The whole state of the user's module, keys without prefix."""
        return {name.replace(_INNER, ""): value for name, value in module.state_dict().items()}

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Restore a whole state, in place; what is divided stays so."""
        inner = {name.replace(_INNER, ""): name for name in module.state_dict()}
        super().load_module_state_dict(
            module, {inner.get(name, name): value for name, value in state.items()}, strict
        )

    def to_write(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """What is divided, in the boxes of its devices."""
        own = super().to_write(checkpoint)
        if self.checkpoint == "full":
            return own
        xm.wait_device_ops()
        boxes: Mapping[str, Any] = mapped(own, in_boxes, Tensor)
        return boxes

    def writes_folder(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether anything is divided."""
        return bool(named(checkpoint, lambda value: isinstance(value, Share)))
