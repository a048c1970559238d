"""Tensor parallel: the layers of a model are divided among the ranks of a group, each of which computes its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel as losses_in_shards
from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.alike import check_gradients, same_random_numbers, share_random_state
from fabric_backends.hooks import TENSOR_PARALLEL
from fabric_backends.meshes import TENSOR, Size
from fabric_backends.parallelizing import carry_out, give_values, lies_on, plan_of
from fabric_backends.sharding.tensors import is_sharded, local_part
from fabric_backends.strategies.folders import CheckpointKind
from fabric_backends.strategies.grouped import GroupedStrategy
from fabric_backends.strategies.sharded import ShardedStrategy
from fabric_backends.timeouts import INIT_TIMEOUT
from fabric_core.contracts.strategy import ReduceOp
from fabric_core.errors import OptionsError
from fabric_core.targets import import_target


class TensorParallelStrategy(GroupedStrategy, ShardedStrategy):
    """Divides layers within groups of ranks (tensor parallel), and the data between these groups (data parallel).

    How a model is divided says a function of the user's, ``parallelize_fn(module, mesh)``, or a method
    ``parallelize(mesh)`` of the model. It changes the model in place, with ``parallelize_module`` over
    ``mesh["tensor_parallel"]``, and may call ``fully_shard`` over ``mesh["data_parallel"]`` for parts of it. What is
    left unsharded is sharded over that axis here, whenever it has more than one rank, so that gradients are averaged.

    Args:
        parallelize_fn: The function, or its ``"package.module:function"``. Without one, the model's own method is
            called.
        data_parallel_size: How many groups read different data. ``"auto"``: what the other size leaves; when both
            are, the number of nodes.
        tensor_parallel_size: How many ranks share a model, likewise; when both are ``"auto"``, those of a node.
        loss_parallel: Compute ``cross_entropy`` of scores that are sharded over the classes in shards too, both in
            the loop and in ``fabric.backward``, so that no rank ever has all scores.
        checkpoint, process_group_backend, timeout, init_timeout: As in `ShardedStrategy`.

    Raises:
        OptionsError: A size or the function is none.
    """

    spec = TENSOR_PARALLEL
    axis = TENSOR

    def __init__(
        self,
        *,
        parallelize_fn: str | Callable[[Any, DeviceMesh], Any] | None = None,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: Size = "auto",
        loss_parallel: bool = False,
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
        if not (parallelize_fn is None or isinstance(parallelize_fn, str) or callable(parallelize_fn)):
            raise OptionsError(
                f"The option parallelize_fn is {parallelize_fn!r}. It takes a function of a module and a mesh, or its "
                "'package.module:function'."
            )
        self._parallelize_fn = parallelize_fn
        self.ask_for(data_parallel_size, tensor_parallel_size)
        self._loss_parallel = loss_parallel
        self._entered = ExitStack()
        self._checked: WeakSet[Optimizer] = WeakSet()

    # -- coming and going -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the other ranks, and make losses in shards if that was asked for. Called on every rank, once."""
        super().connect()
        if self._loss_parallel:
            self._entered.enter_context(losses_in_shards())

    def teardown(self) -> None:
        """Leave the process group. Called on every rank; safe to call twice."""
        with suppress(KeyError):  # a block of the user's own has left it already
            self._entered.close()
        super().teardown()

    # -- setting up -----------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """As the contract. With ``empty_init``, a model needs no memory before it is divided."""
        return torch.device("meta") if empty_init else super().module_init_context(empty_init)

    def move_module(self, module: nn.Module) -> None:
        """Move what has values. What is on the meta device gets memory once it is divided."""
        change: Any = module._apply
        change(lambda tensor: tensor if tensor.is_meta else tensor.to(self.root_device))

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank the weights of rank 0, and divide them. Called on every rank.

        Returns:
            The module, changed in place; or what ``parallelize_fn`` returned.

        Raises:
            SetupError, WrongTypeError: As `plan_of` and `carry_out`.
        """
        plan = plan_of(module, self._function())
        self.synchronize_module(module)
        share_random_state(self.group, self.root_device)
        with self.rebinding.watch(module):
            forward_module = carry_out(plan, module, self.mesh)
            with same_random_numbers(None, self.root_device):
                give_values(module, self.root_device)
        self.remember(module)
        return forward_module

    def synchronize_module(self, module: nn.Module) -> None:
        """As `ParallelStrategy`; what is on the meta device has no values to be sent."""
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta:
                collectives.broadcast_(tensor)

    def _function(self) -> Callable[[Any, DeviceMesh], Any] | None:
        function: Callable[[Any, DeviceMesh], Any] | None
        function = import_target(self._parallelize_fn, "the option parallelize_fn")
        return function

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """As the contract. With the first step of each optimizer, ranks compare the gradients of undivided weights.

        Raises:
            SetupError: They differ within a tensor-parallel group, so these weights would drift apart.
        """
        if self.group_size > 1 and optimizer not in self._checked and closure is None:
            gradients = dict(self._undivided_gradients(optimizer))
            if check_gradients(gradients, self.group, self.root_device):
                self._checked.add(optimizer)
        return super().optimizer_step(optimizer, step, closure)

    def _undivided_gradients(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Those that no tensor-parallel layer has summed; of each what this rank holds along the data axis."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in (pair for model in self._models for pair in model.named_parameters()):
            if id(parameter) in own and parameter.grad is not None and not lies_on(parameter, TENSOR):
                yield name, local_part(parameter.grad)

    # -- talking to the other ranks -------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As the contract, over all ranks. A sharded tensor, such as a loss in shards, is made whole first."""
        return super().all_gather(_plain(tensor), group, sync_grads)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", group: Any = None) -> Tensor:
        """As the contract, over all ranks. A sharded tensor is made whole first."""
        return super().all_reduce(_plain(tensor), op, group)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor
