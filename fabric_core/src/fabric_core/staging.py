"""A copy of a state in memory of its own, from which it can be written while the training goes on.

Everything is copied: tensors into buffers on the host, and whatever Python holds with ``copy.deepcopy``. Tensors that
share memory share it in the copy, so tied weights do not grow, and neither do views of one buffer.

[Note: copies in the stream] What lies on a device is copied into pinned memory by its current stream, and the host does
not wait. What the training queues later is in the same stream, comes after the copy, and cannot get into it. Whoever
reads the copy waits for it first (`Staging.wait`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fabric_core.memory import in_large_pages

_CLONES = (torch.Tensor.clone, torch.clone)


class Staging:
    """Copies states, one after the other, into the same memory.

    Memory that the system gives anew costs several times as much as the copy itself, so it is kept between saves.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._used: dict[tuple[int, bool], list[Tensor]] = {}
        self._copying: list[Any] = []

    def begin(self) -> None:
        """Forget the state before: its memory may be used again."""
        self.wait()
        self._free, self._used = self._used, {}

    def copied(self, tree: Any) -> Any:
        """A copy of anything, tensors and all; tensors are on the CPU. May be called several times for one state."""
        with _Copying(self) as copying:
            result = copy.deepcopy(tree)
        self._copying += [
            torch.accelerator.current_stream(device).record_event() for device in copying.devices
        ]
        return result

    def wait(self) -> None:
        """Wait until the copies are there. Called by any thread, before they are read."""
        events, self._copying = self._copying, []
        for event in events:
            event.synchronize()

    def buffer(self, size: int, pinned: bool) -> Tensor:
        """Memory for so many bytes, which nobody uses."""
        free = self._free.get((size, pinned))
        buffer = free.pop() if free else _memory(size, pinned)
        self._used.setdefault((size, pinned), []).append(buffer)
        return buffer


class _Copying(TorchFunctionMode):
    """While this is active, whatever ``copy.deepcopy`` does with a tensor becomes a copy into a buffer.

    Attributes:
        devices: Those whose streams still copy.
    """

    def __init__(self, staging: Staging) -> None:
        super().__init__()
        self.devices: set[torch.device] = set()
        self._staging = staging
        self._copied: dict[tuple[torch.device, int, int], tuple[Any, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return self._with_attributes(tensor, memo)
        if func in _CLONES:  # with which classes of tensors copy themselves, such as parameters
            return self._copy(args[0])
        return func(*args, **(kwargs or {}))

    def _with_attributes(self, tensor: Any, memo: dict[int, Any]) -> Any:
        result = self._copy(tensor)
        if tensor.requires_grad and not result.requires_grad:
            result.requires_grad_()
        if tensor.__dict__ and result is not tensor and not is_traceable_wrapper_subclass(tensor):
            with self:
                result.__dict__.update(copy.deepcopy(tensor.__dict__, memo))
        return result

    def _copy(self, tensor: Any) -> Any:
        if hasattr(tensor, "trigger_wait"):  # the promise of a collective
            return self._copy(tensor.trigger_wait())
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            parts = {
                name: getattr(tensor, name) for name in names
            }  # tensors, and what says how they are spread
            inner = {
                name: self._copy(part) if isinstance(part, Tensor) else part for name, part in parts.items()
            }
            return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
        if tensor.is_meta:
            return tensor
        if not _has_plain_memory(tensor):
            return tensor.detach().to("cpu", copy=True)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        memory = self._memory(tensor).untyped_storage()
        plain = torch.empty(0, dtype=tensor.dtype, device="cpu")
        plain.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
        return plain if type(tensor) is Tensor else plain.as_subclass(type(tensor))

    def _memory(self, tensor: Tensor) -> Tensor:
        """The copy of the memory that a tensor lies in, as bytes."""
        memory, device = tensor.untyped_storage(), tensor.device
        key = (device, memory.data_ptr(), memory.nbytes())
        if key not in self._copied:
            on_device = device.type != "cpu"
            source = torch.empty(0, dtype=torch.uint8, device=device).set_(memory)
            buffer = self._staging.buffer(memory.nbytes(), on_device).copy_(source, non_blocking=on_device)
            self.devices |= {device} if on_device else set()
            self._copied[key] = source, buffer  # the source is kept, so that no other memory gets its address
        return self._copied[key][1]


def _memory(size: int, pinned: bool) -> Tensor:
    memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return memory if pinned else in_large_pages(memory)


def _has_plain_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a view of bytes that can be copied as they are."""
    accelerator = torch.accelerator.current_accelerator()
    known = ("cpu", accelerator.type if accelerator else "cpu")
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type in known
