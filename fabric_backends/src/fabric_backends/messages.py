"""Sending any object from one rank to all.

What pickles is pickled, except its tensors: they travel as they are, once each, after what surrounds them.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_backends.collectives import broadcast_
from fabric_core.errors import WrongTypeError

# Most messages are numbers, flags and paths, and fit into the first packet.
_PACKET = 512  # bytes
_PREFIX = 8  # bytes: the length of what follows; negative when nothing does


def broadcast_object(obj: Any, src: int, device: torch.device) -> Any:
    """Send ``obj`` from rank ``src``. Called on every rank.

    Args:
        obj: Anything that pickles, with tensors anywhere in it; ignored on ranks other than ``src``.
        src: The global rank that sends.
        device: Where the process group can reach tensors.

    Returns:
        On ``src`` the object itself. Elsewhere its equal: tensors that were on the CPU are there again, all others on
        ``device``; they are contiguous and have no graph.

    Raises:
        WrongTypeError: The object cannot be pickled; on every rank.
    """
    if dist.get_rank() == src:
        _send(obj, src, device)
        return obj
    return _receive(src, device)


@dataclass(frozen=True)
class _Form:
    """What a rank needs to know of a tensor to receive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool
    requires_grad: bool
    is_parameter: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            tensor.device.type == "cpu",
            tensor.requires_grad,
            isinstance(tensor, nn.Parameter),
        )

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def dress(self, values: Tensor) -> Tensor:
        values = values.cpu() if self.on_cpu else values
        if self.is_parameter:
            return nn.Parameter(values, self.requires_grad)
        return values.requires_grad_(self.requires_grad)


@dataclass
class _Parcel:
    """An object taken apart: its pickle, and the tensors that the pickle refers to by number."""

    text: bytes = b""
    tensors: list[Tensor] = field(default_factory=list)


def _pack(obj: Any, device: torch.device) -> _Parcel:
    parcel, numbers, buffer = _Parcel(), dict[int, int](), io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not _travels_as_it_is(obj, device):
                return None
            if id(obj) not in numbers:
                numbers[id(obj)] = len(parcel.tensors)
                parcel.tensors.append(obj)
            return numbers[id(obj)]

    Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    forms = [_Form.of(tensor) for tensor in parcel.tensors]
    parcel.text = pickle.dumps((forms, buffer.getvalue()))
    return parcel


def _travels_as_it_is(obj: Any, device: torch.device) -> bool:
    return (
        type(obj) in (Tensor, nn.Parameter)
        and obj.layout is torch.strided
        and not obj.is_quantized
        and obj.device.type in ("cpu", device.type)
    )


def _unpack(text: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: int) -> Tensor:
            return tensors[pid]

    return Unpickler(io.BytesIO(text)).load()


def _send(obj: Any, src: int, device: torch.device) -> None:
    try:
        parcel = _pack(obj, device)
    except Exception as error:  # whatever a __reduce__ may raise; the others wait and have to be told
        reason = f"{type(error).__name__}: {error}"
        _send_text(pickle.dumps(reason), src, device, failed=True)
        raise WrongTypeError(_refusal(src, reason)) from error
    _send_text(parcel.text, src, device)
    for tensor in parcel.tensors:
        broadcast_(tensor.to(device), src)


def _receive(src: int, device: torch.device) -> Any:
    text, failed = _receive_text(src, device)
    if failed:
        raise WrongTypeError(_refusal(src, pickle.loads(text)))
    forms, inner = pickle.loads(text)
    tensors = [form.empty(device) for form in forms]
    for tensor in tensors:
        broadcast_(tensor, src)
    return _unpack(inner, [form.dress(tensor) for form, tensor in zip(forms, tensors, strict=True)])


def _send_text(text: bytes, src: int, device: torch.device, failed: bool = False) -> None:
    length = -len(text) if failed else len(text)
    packet = length.to_bytes(_PREFIX, "big", signed=True) + text[: _PACKET - _PREFIX]
    broadcast_(_tensor(packet.ljust(_PACKET, b"\0"), device), src)
    rest = text[_PACKET - _PREFIX :]
    if rest:
        broadcast_(_tensor(rest, device), src)


def _receive_text(src: int, device: torch.device) -> tuple[bytes, bool]:
    """What `_send_text` sent, and whether it is the reason of a failure."""
    first = torch.empty(_PACKET, dtype=torch.uint8, device=device)
    broadcast_(first, src)
    packet = _bytes(first)
    length = int.from_bytes(packet[:_PREFIX], "big", signed=True)
    rest = torch.empty(max(0, abs(length) - (_PACKET - _PREFIX)), dtype=torch.uint8, device=device)
    broadcast_(rest, src)
    text = packet[_PREFIX : _PREFIX + abs(length)] + _bytes(rest)
    return text, length < 0


def _tensor(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.cpu()
    return ctypes.string_at(values.data_ptr(), values.numel()) if values.numel() else b""


def _refusal(src: int, reason: str) -> str:
    return (
        f"Rank {src} cannot send its object to the other ranks, because it does not pickle ({reason}). "
        "Send tensors, numbers, text, collections of them, or objects of classes that a module defines."
    )
