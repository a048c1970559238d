"""Where DeepSpeed keeps what belongs to a parameter: one class per way in which its stages divide things.

To all of them a parameter is a row of numbers, of which each rank holds a piece: the float32 weights, each tensor of
the optimizer's state, and, when it has been reduced, the gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fabric_deepspeed.stepping import Joined


@dataclass(frozen=True)
class Place:
    """Where the piece of one parameter is that this rank holds; all of it where nothing is divided.

    Attributes:
        flat: The float32 tensor that the optimizer steps. Others may be in it, too.
        start: Where in ``flat`` the piece begins.
        offset: Where in the parameter it begins.
        length: How long it is; may be 0.
    """

    flat: Tensor
    start: int
    offset: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that is as long as ``flat``."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)


class Layout(ABC):
    """The places of all parameters that are trained by one engine, and what can be done with the gradients there."""

    divides = True
    """Whether ranks hold different pieces."""

    def __init__(self, engine: Any, joined: Joined) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.joined = joined
        self.places: dict[nn.Parameter, Place] = dict(self.find())

    @abstractmethod
    def find(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """The places, in the same order on every rank."""

    @abstractmethod
    def reduce(self) -> None:
        """Reduce what backward passes have collected, so that `gradient` has it. Called on every rank."""

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The piece of a reduced gradient, still scaled as the losses were."""

    @abstractmethod
    def drop(self) -> None:
        """Drop the gradients."""

    @property
    @abstractmethod
    def touched(self) -> bool:
        """Whether the backward pass that has just ended has reached the parameters."""

    @abstractmethod
    def publish(self) -> None:
        """Let the model compute with the float32 weights, which have been changed. Called on every rank."""

    def end_backward(self) -> None:
        """Get ready for the next backward pass, which adds to the gradients. Called on every rank."""

    def read(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The piece of the float32 weights, or of a tensor in the optimizer's state; shares memory if it can."""
        place = self.places[parameter]
        return place.of(place.flat if key is None else self.joined.state[place.flat][key])

    def write(self, parameter: nn.Parameter, piece: Tensor, key: str | None = None) -> None:
        """The other way round. A tensor that the state does not have yet is made."""
        place = self.places[parameter]
        whole = place.flat
        if key is not None:
            state = self.joined.state[place.flat]
            whole = (
                state[key] if isinstance(state.get(key), Tensor) else torch.zeros_like(place.flat.detach())
            )
            state[key] = whole
        place.of(whole).copy_(piece)

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state that the parameter is in."""
        state: dict[str, Any] = self.joined.state[self.places[parameter].flat]
        return state


class Replicated(Layout):
    """Stage 0: every rank holds everything."""

    divides = False

    def find(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """In float32 the parameters themselves, otherwise their copies."""
        if self.optimizer is self.joined:
            pairs: Iterable[Any] = ((p, p) for group in self.joined.param_groups for p in group["params"])
        else:
            pairs = (
                pair
                for groups in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
                for pair in zip(*groups, strict=True)
            )
        for parameter, flat in pairs:
            yield parameter, Place(flat, 0, 0, flat.numel())

    def reduce(self) -> None:
        """Average them over the ranks."""
        self.engine.allreduce_gradients()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Where PyTorch has put it."""
        return None if parameter.grad is None else parameter.grad.detach().view(-1)

    def drop(self) -> None:
        """As PyTorch does."""
        for parameter in self.places:
            parameter.grad = None

    @property
    def touched(self) -> bool:
        """Whether there are any."""
        return any(parameter.grad is not None for parameter in self.places)

    def publish(self) -> None:
        """Round the copies."""
        for parameter, place in self.places.items():
            if place.flat is not parameter:
                parameter.detach().copy_(place.flat)


class _Zero(Layout):
    """What the stages of ZeRO have in common."""

    @property
    def touched(self) -> bool:
        """Whether hooks of the parameters were called."""
        return bool(self.optimizer._backward_hook_state.hooks_fired_this_backward)

    def end_backward(self) -> None:
        """DeepSpeed does this before the next forward pass only, and would take a second loss for the first again."""
        self.optimizer.clear_backward_seen_flag()


class Partitioned(_Zero):
    """Stages 1 and 2: each rank steps a part of each group, laid end to end; the model is whole."""

    def find(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """As DeepSpeed has linked them."""
        zero = self.optimizer
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                link = parameter._hp_mapping
                if link is None:
                    yield parameter, Place(flat, 0, 0, 0)
                    continue
                inside, there = link.lp_fragment_address, link.get_hp_fragment_address()
                yield parameter, Place(flat, there.start, inside.start, there.numel)

    def reduce(self) -> None:
        """Stage 1 sends them now; stage 2 has sent them, and collects what is for this rank."""
        if self.engine.zero_optimization_partition_gradients():
            self.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self.engine.allreduce_gradients()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Offloaded gradients are in place; others are in a list of pieces."""
        zero, place = self.optimizer, self.places[parameter]
        if zero.cpu_offload:
            return None if place.flat.grad is None else place.of(place.flat.grad)
        group = next(i for i, flat in enumerate(zero.single_partition_of_fp32_groups) if flat is place.flat)
        begin = 0
        for piece in zero.averaged_gradients[group]:
            if begin == place.start and place.length:
                found: Tensor = piece.detach().view(-1)
                return found
            begin += piece.numel()
        return None

    def drop(self) -> None:
        """Also what has been reduced and collected."""
        zero = self.optimizer
        zero.zero_grad()
        zero.micro_step_id = -1
        for collected in (zero.averaged_gradients, zero.all_grad_tensors):
            for group in collected:
                collected[group] = None
        for parameter in self.places:
            parameter.grad_accum = None  # type: ignore[attr-defined]
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
            for flat in zero.single_partition_of_fp32_groups:
                if flat.grad is not None:
                    flat.grad.zero_()

    def publish(self) -> None:
        """Round this rank's part, and send it to the others."""
        self.optimizer.update_lp_params()


class Divided(_Zero):
    """Stage 3: each rank holds a piece of every parameter."""

    def find(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """As DeepSpeed has cut them: equal pieces, the last of which may be filled up."""
        zero = self.optimizer
        for parameters in zero.fp16_groups:
            for parameter in parameters:
                group, start, length = zero.grad_position[zero.get_param_id(parameter)]
                offset, real = piece_of(parameter)
                yield (
                    parameter,
                    Place(zero.fp32_partitioned_groups_flat[group], start, offset, min(real, length)),
                )

    def reduce(self) -> None:
        """They are reduced; what is offloaded is copied there."""
        self.optimizer.finalize_gradient_accumulation_boundary()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Without what fills it up."""
        from deepspeed.utils import safe_get_local_grad

        piece: Tensor = safe_get_local_grad(parameter)
        return piece.view(-1)[: self.places[parameter].length]

    def drop(self) -> None:
        """DeepSpeed would leave those of a parameter that the next backward pass does not reach."""
        from deepspeed.utils import safe_set_local_grad

        zero = self.optimizer
        zero.zero_grad()
        for parameter in self.places:
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))  # type: ignore[attr-defined]
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()

    def read(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """Through DeepSpeed, since it may lie on a disk."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if not self.on_disk:
            return super().read(parameter, key)
        piece = (
            safe_get_local_fp32_param(parameter)
            if key is None
            else safe_get_local_optimizer_state(parameter, key)
        )
        own: Tensor = piece.detach().view(-1)[: self.places[parameter].length]
        return own

    def write(self, parameter: nn.Parameter, piece: Tensor, key: str | None = None) -> None:
        """Likewise."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if not self.on_disk:
            super().write(parameter, piece, key)
            return
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=piece.dtype)  # type: ignore[attr-defined]
        padded[: piece.numel()] = piece
        if key is None:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, key)

    @property
    def on_disk(self) -> bool:
        """Whether the optimizer's state is offloaded to NVMe."""
        return bool(self.optimizer.swap_optimizer)

    def publish(self) -> None:
        """Round this rank's pieces; parameters that are kept whole are gathered anew."""
        zero = self.optimizer
        zero.parameter_offload.partition_all_parameters()
        for parameter in self.places:
            write_piece(parameter, self.read(parameter))
        kept = zero.persistent_parameters
        if kept:
            kept[0].partition(kept, has_been_updated=False)
            kept[0].all_gather(kept)


def piece_of(parameter: Any) -> tuple[int, int]:
    """Where this rank's piece of a parameter that ZeRO has divided begins, and how long it is."""
    length = (
        parameter.ds_tensor.ds_numel
        if hasattr(parameter.ds_tensor, "ds_numel")
        else parameter.ds_tensor.numel()
    )
    offset = torch.distributed.get_rank(parameter.ds_process_group) * length
    return offset, max(0, min(length, parameter.ds_numel - offset))


def read_piece(parameter: Any) -> Tensor:
    """This rank's piece of a divided parameter, as the model computes with it."""
    piece: Tensor = parameter.ds_tensor.detach().view(-1)
    return piece[: piece_of(parameter)[1]]


def write_piece(parameter: Any, piece: Tensor) -> None:
    """The other way round."""
    parameter.ds_tensor.detach().view(-1)[: piece.numel()].copy_(piece)


LAYOUTS: dict[int, type[Layout]] = {0: Replicated, 1: Partitioned, 2: Partitioned, 3: Divided}
