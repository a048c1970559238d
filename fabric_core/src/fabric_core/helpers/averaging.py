"""The average of a model's weights over the steps of a training: exponential (EMA) or equal (SWA).

PyTorch's ``torch.optim.swa_utils.AveragedModel`` does the averaging. What it is given here is not the model but the
part of each tensor that lies on this rank, so that shards are averaged where they are, and nothing is ever gathered.

[Note: the average of shards] ``AveragedModel`` copies the model, and a sharded one cannot be copied. It gets a
`_Skeleton` instead: modules without a class that hold the local parts under the names of the model. A second one,
`_whole`, shows the averages as the tensors that the model has, shards as shards, over the same memory; that is what
goes into a checkpoint, in the way of the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import swa_utils

from fabric_core.errors import ConfigurationError, UnsupportedError, WrongTypeError, listing
from fabric_core.wrappers.face import is_wrapped, unwrap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fabric_core.fabric import Fabric

__all__ = ["ModelAverage"]


class ModelAverage:
    """The running average of a model's weights. Put it into the state; use it with `applied`.

    In a checkpoint it is two entries: ``"module"``, with the keys of the model, which a plain model loads, and
    ``"count"``. Like a model, it is saved under one strategy and loaded under another.

    Example:
        >>> average = ModelAverage(fabric, model, decay=0.999)
        >>> state = {"model": model, "optimizer": optimizer, "average": average}
        >>> for batch in loader:
        ...     ...
        ...     optimizer.step()
        ...     average.update()
        >>> with average.applied():
        ...     validate(model)

    Args:
        fabric: Which set up the model.
        model: What ``fabric.setup`` returned. Made on every rank.
        decay: Of the exponential average: w ← decay · w + (1 - decay) · model. ``None``: all steps count the same.
        use_buffers: Average buffers (running means…) as well. Otherwise they are those of the last `update`.
        dtype: Keep averages of floating-point tensors in this format, for weights in half precision: a step of
            1 - decay is less than what their own format can tell apart. Their own by default.

    Raises:
        ConfigurationError: The decay is not between 0 and 1.
        UnsupportedError: The strategy keeps weights where nobody else can see them.
        WrongTypeError: The model was not set up.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        *,
        decay: float | None = None,
        use_buffers: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ConfigurationError(f"decay={decay!r} has to be between 0 and 1.")
        if not (isinstance(model, nn.Module) and is_wrapped(model)):
            raise WrongTypeError(
                f"ModelAverage needs a model that fabric.setup() returned, not a {type(model).__qualname__}."
            )
        self._fabric, self._model = fabric, model
        self._module: nn.Module = unwrap(model)
        self._dtype = dtype
        # Of a sharded model these are the shards; while it computes, others stand in their places.
        _check_visible(fabric, self._module, self._settled())
        self._parameters = dict(self._module.named_parameters(remove_duplicate=False))
        self._not_saved = set(_not_persistent(self._module))
        self._averaged = swa_utils.AveragedModel(
            self._skeleton(self._local_average), use_buffers=use_buffers, **_functions(decay, use_buffers)
        )
        self._whole = self._skeleton(self._average_like)
        whole = _tensors(self._whole)
        for name, tensor in _tensors(self._averages).items():
            tensor.data = _local(whole[name])
        self._count = _Skeleton({}, {"n_averaged": self._averaged.n_averaged})

    @property
    def updates(self) -> int:
        """How many times the model has been averaged in."""
        return int(self._averaged.n_averaged)

    def update(self) -> None:
        """Average the model in, after a step of its optimizer. Called on every rank; nothing is sent."""
        averages, buffers = self._averages, self._buffers()
        source: Any = _Tensors(
            [self._local_average(self._parameters[name]) for name, _ in averages.named_parameters()],
            [self._local_average(buffers[name]) for name, _ in averages.named_buffers()],
        )
        self._averaged.update_parameters(source)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """A block in which the model has the averaged weights, and after which it has its own. Called on every rank.

        Its own are kept meanwhile, so that this takes the memory of what a rank holds of the model. To train inside
        is pointless: what was learned is dropped. Before the first `update`, the weights are the model's own.

        Yields:
            The model.
        """
        self._settled()
        own = {name: _local(tensor) for name, tensor in (self._parameters | self._buffers()).items()}
        kept = {name: tensor.clone() for name, tensor in own.items()}
        if self.updates:
            averages = _tensors(self._averages)
            _copy(averages, {name: own[name] for name in averages})
        try:
            yield self._model
        finally:
            self._settled()
            _copy(kept, own)

    def update_bn(self, loader: Iterable[Any]) -> None:
        """Compute the running means and variances of batch norms for the averaged weights. Called on every rank.

        After the last `update` with equal weights (SWA), whose buffers are those of other weights. Batches of all
        ranks count the same, as in ``torch.optim.swa_utils.update_bn`` on one process that sees all of them.

        Args:
            loader: Batches of the training data; a batch is what the model is called with, or a tuple that begins
                with it.

        Raises:
            ConfigurationError: There was no batch, on any rank.
        """
        norms = {
            name: module for name, module in self._module.named_modules() if isinstance(module, _BatchNorm)
        }
        with self.applied():
            swa_utils.update_bn(loader, self._model)
            averages = _tensors(self._averages)
            for name, norm in norms.items():
                for buffer, value in self._of_all_ranks(norm).items():
                    averages[f"{name}.{buffer}" if name else buffer].copy_(value)

    def state_parts(self) -> dict[str, nn.Module]:
        """What the state consists of; ``fabric.save`` and ``fabric.load`` ask for it. Called on every rank."""
        return {"module": self._whole, "count": self._count}

    def state_dict(self) -> dict[str, Any]:
        """The averages, and how many there were; of shards, those of this rank."""
        return {name: part.state_dict() for name, part in self.state_parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, part in self.state_parts().items():
            part.load_state_dict(state[name])

    @property
    def _averages(self) -> nn.Module:
        module: nn.Module = self._averaged.module
        return module

    def _settled(self) -> Mapping[str, Any]:
        """The state of the model, for which a strategy drops what it has gathered of other ranks' shards."""
        state: Mapping[str, Any] = self._fabric.strategy.module_state_dict(self._module)
        return state

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self._module.named_buffers(remove_duplicate=False))

    def _skeleton(self, change: Callable[[Tensor], Tensor]) -> _Skeleton:
        # Messages about what does not fit name the class, which is to be the model's.
        named: type[_Skeleton] = type(type(self._module).__name__, (_Skeleton,), {})
        return named(self._parameters, self._buffers(), change, self._not_saved)

    def _local_average(self, tensor: Tensor) -> Tensor:
        local = _local(tensor)
        return local.to(self._dtype) if local.is_floating_point() else local

    def _average_like(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        return tensor.detach().to(dtype or tensor.dtype, copy=True)

    def _of_all_ranks(self, norm: _BatchNorm) -> dict[str, Tensor]:
        """The statistics of a batch norm over the batches of all ranks, each of which has seen some of them."""
        seen = norm.num_batches_tracked
        if seen is None or norm.running_mean is None or norm.running_var is None:
            return {}
        total = self._fabric.all_reduce(seen, reduce_op="sum")
        if not total:
            raise ConfigurationError("update_bn was given no batch, on any rank. Was the loader used up?")
        share = seen / total
        summed = self._fabric.all_reduce(
            [norm.running_mean * share, norm.running_var * share], reduce_op="sum"
        )
        return {"running_mean": summed[0], "running_var": summed[1], "num_batches_tracked": total}


class _Skeleton(nn.Module):
    """Tensors under the names that they have in a model; those that layers share are shared.

    Args:
        parameters, buffers: The tensors by dotted names.
        change: What is made of each.
        not_saved: Which buffers are in no state dict.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        not_saved: Iterable[str] = (),
    ) -> None:
        super().__init__()
        made: dict[int, Any] = {}
        for path, tensor in parameters.items():
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(change(tensor), requires_grad=tensor.requires_grad)
            module, name = self._place(path)
            module.register_parameter(name, made[id(tensor)])
        for path, tensor in buffers.items():
            if id(tensor) not in made:
                made[id(tensor)] = change(tensor)
            module, name = self._place(path)
            module.register_buffer(name, made[id(tensor)], persistent=path not in not_saved)

    def _place(self, path: str) -> tuple[nn.Module, str]:
        """The module that a tensor belongs to, made if it is not there yet, and the tensor's name in it."""
        module: nn.Module = self
        *above, name = path.split(".")
        for part in above:
            if part not in module._modules:
                module.register_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, name


class _Tensors:
    """What ``AveragedModel`` asks of a model."""

    def __init__(self, parameters: list[Tensor], buffers: list[Tensor]) -> None:
        self._parameters, self._buffers = parameters, buffers

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._parameters)

    def buffers(self) -> Iterator[Tensor]:
        return iter(self._buffers)


def _functions(decay: float | None, use_buffers: bool) -> dict[str, Any]:
    """Which of PyTorch's averages: for several tensors at a time, unless some may be counts of batches.

    Its equal average of several tensors divides whole numbers in a way that GPUs refuse.
    """
    library: Any = swa_utils
    if decay is not None:
        return {"multi_avg_fn": library.get_ema_multi_avg_fn(decay)}
    return {"avg_fn": library.get_swa_avg_fn()} if use_buffers else {}


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, over the same memory; all of one that is not sharded."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return part.detach()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _not_persistent(module: nn.Module) -> Iterator[str]:
    for path, part in module.named_modules(remove_duplicate=False):
        yield from (f"{path}.{name}" if path else name for name in part._non_persistent_buffers_set)


def _check_visible(fabric: Fabric, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a model whose parameters are not what the strategy saves: they may be empty between two passes."""
    hidden = [
        name
        for name, parameter in module.named_parameters()
        if name not in state or tuple(getattr(state[name], "shape", ())) != tuple(parameter.shape)
    ]
    if hidden:
        raise UnsupportedError(
            f"The weights of this {type(module).__name__} cannot be averaged under the strategy "
            f"{fabric.plan.strategy.name!r}, which keeps them elsewhere between two steps: {listing(hidden[:3])}. "
            "Strategies that shard parameters as DTensor, or leave them whole, can."
        )
