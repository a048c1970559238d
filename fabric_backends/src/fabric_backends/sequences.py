"""Sequences that are divided between the ranks of a group, and attention over all of them.

[Note: head and tail] Of N ranks, each holds two of 2N equal parts of a sequence: rank r the parts r and 2N-1-r. Under a
causal mask, a part is compared with everything before it; so the two together cost the same on every rank.
Keys and values are gathered from all ranks for each attention (and their gradients summed and scattered), queries stay
where they are: what Llama 3 was trained with (section 3.3.2 of arXiv:2407.21783). It takes whatever kernel PyTorch
chooses for the device, and its result is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode

from fabric_backends import collectives
from fabric_core.errors import ConfigurationError, UnsupportedError

_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # its name before torch 2.13


def own_part(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """The two parts of a sequence that a rank holds, one after the other; see [Note: head and tail].

    Args:
        tensor: The whole sequence, equal on all ranks.
        dim: Along which dimension it runs.
        rank, ranks: Which of how many.

    Raises:
        ConfigurationError: It cannot be cut into 2 * ``ranks`` equal parts.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise ConfigurationError(
            f"A tensor of shape {tuple(tensor.shape)} has no dimension {dim} to be divided along."
        )
    length = tensor.shape[dim]
    if length % (2 * ranks):
        raise ConfigurationError(
            f"A sequence of {length} (dimension {dim} of {tuple(tensor.shape)}) cannot be divided between {ranks} "
            f"ranks: its length has to be a multiple of {2 * ranks}. Pad it."
        )
    parts = tensor.chunk(2 * ranks, dim)
    return torch.cat([parts[rank], parts[-1 - rank]], dim)


def in_order(gathered: Tensor, dim: int) -> Tensor:
    r"""The whole sequence from the parts of all ranks.

    Args:
        gathered: Shape (ranks, \*S), in rank order.
        dim: The dimension of S along which the sequence runs.

    Returns:
        Shape S, but for ``dim``, which is whole.
    """
    halves = [part.chunk(2, dim) for part in gathered.unbind(0)]
    return torch.cat([head for head, _ in halves] + [tail for _, tail in reversed(halves)], dim)


class _Gather(torch.autograd.Function):
    """Collect a tensor from every rank of a group; the gradient of each is the sum of what all ranks make of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return collectives.all_gather(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(gradient[0], memory_format=torch.contiguous_format)
        _scatter(own, gradient.contiguous().flatten(0, 1), group=ctx.group)
        return own, None


def gather(tensor: Tensor, dim: int, group: Any) -> Tensor:
    """The whole sequence, of which each rank of ``group`` has `own_part`. Called on each of them; has a gradient."""
    if tensor.dim() == 0:
        raise ConfigurationError("A tensor without dimensions is no part of a sequence.")
    gathered: Tensor = _Gather.apply(tensor.contiguous(), group)  # type: ignore[no-untyped-call]
    return in_order(gathered, dim % tensor.dim())


class WholeAttention(TorchFunctionMode):
    """Inside, ``scaled_dot_product_attention`` of sequences that are divided is that of the whole ones.

    Args:
        group: The ranks between which they are divided.
    """

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for each function of PyTorch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in _UNSUPPORTED:
            raise UnsupportedError(
                f"{_UNSUPPORTED[func]} cannot attend to a sequence that is divided between ranks; it would see this "
                "rank's part of it. Use torch.nn.functional.scaled_dot_product_attention in its place."
            )
        return func(*args, **kwargs)

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """As ``Tensor.backward``, but inside of this mode, because forward passes may be computed again in it.

        Every public function that runs the engine leaves the mode first.
        """
        if gradient is None and loss.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        keep = create_graph if retain_graph is None else retain_graph
        wanted = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
        roots = (loss,), (torch.ones_like(loss) if gradient is None else gradient,)
        run: Any = torch.autograd.graph._engine_run_backward
        with self:
            run(*roots, keep, create_graph, wanted, allow_unreachable=True, accumulate_grad=True)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        keys, values = gather(key, -2, self._group), gather(value, -2, self._group)
        if not is_causal:
            _check_mask(attn_mask, query, key, dist.get_world_size(self._group))
            return F.scaled_dot_product_attention(query, keys, values, attn_mask, dropout_p, **options)
        if attn_mask is not None or query.shape[-2] != key.shape[-2]:
            raise ConfigurationError(
                "Attention with is_causal=True takes no attn_mask, and as many keys as queries."
            )
        return self._attend_backwards(query, keys, values, dropout_p, options)

    def _attend_backwards(
        self, query: Tensor, keys: Tensor, values: Tensor, dropout_p: float, options: dict[str, Any]
    ) -> Tensor:
        """Each of the two parts of the queries sees what comes before its end."""
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        length = query.shape[-2] // 2
        results = []
        for part, number in zip(query.chunk(2, -2), (rank, 2 * ranks - 1 - rank), strict=True):
            end = (number + 1) * length
            mask: Any = causal_lower_right(length, end)
            results.append(
                F.scaled_dot_product_attention(
                    part, keys[..., :end, :], values[..., :end, :], mask, dropout_p, **options
                )
            )
        return torch.cat(results, -2)


def _check_mask(mask: Tensor | None, query: Tensor, key: Tensor, ranks: int) -> None:
    if mask is None:
        return
    wanted = (query.shape[-2], key.shape[-2] * ranks)
    if mask.shape[-1] != wanted[1] or mask.shape[-2] not in (1, wanted[0]):
        raise ConfigurationError(
            f"The attn_mask has the shape {tuple(mask.shape)}, but has to end in {wanted}: a row for each query of "
            "this rank, a column for each key of the whole sequence. Divide its rows by shard_sequence, along "
            "dimension -2."
        )


_UNSUPPORTED: dict[Any, str] = {
    F.multi_head_attention_forward: "nn.MultiheadAttention",
    torch.ops.higher_order.flex_attention: "flex_attention",
}
