"""A device for PyTorch whose tensors keep their values in tensors of the CPU, and the accelerator that offers it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fabric_core import Accelerator
from fabric_cpuaccel.hooks import CPUACCEL
from fabric_cpuaccel.probe import probe

NAME, CPU, aten = CPUACCEL.name, torch.device("cpu"), torch.ops.aten
ANYWHERE = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default)


class DeviceTensor(Tensor):
    """A tensor of the device."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor, device: torch.device) -> Any:  # noqa: D102
        form = memory.size(), memory.stride(), memory.storage_offset()
        tensor: Any = Tensor._make_wrapper_subclass(cls, *form, dtype=memory.dtype, device=device)
        tensor.memory = memory
        return tensor

    __torch_dispatch__: Any = classmethod(lambda _, op, __, args, kw=None: compute(op, *args, **kw or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.__format__, Tensor.__repr__):  # they read the values
            args = (args[0].detach().cpu(), *args[1:])
        elif func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].memory = args[1].memory
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["memory"], self.device

    __tensor_unflatten__: Any = staticmethod(lambda inner, device, *_: DeviceTensor(inner["memory"], device))


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do on the CPU what an operation is to do on the device."""
    given = args, kwargs
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    own = {id(tensor.memory): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    places = {str(t.device) for t in tensors if t.dim() or isinstance(t, DeviceTensor)}
    if len(places) > 1 and func not in ANYWHERE:
        raise RuntimeError(f"{func} needs all tensors on one device, not on {' and '.join(sorted(places))}")
    device = kwargs.get("device") or next(iter(own.values())).device
    if device == torch.device(NAME):
        device = torch.device(NAME, torch.get_device_module(NAME).current_device())
    args, kwargs = tree_map(lambda x: CPU if type(x) is torch.device else getattr(x, "memory", x), given)
    result = func(*args, **kwargs)
    for t in own.values():
        if (t.size(), t.stride()) != (t.memory.size(), t.memory.stride()):  # changed in place
            t.data = DeviceTensor(t.memory, t.device)
    if device.type != NAME:
        return result
    return tree_map_only(Tensor, lambda x: own[id(x)] if id(x) in own else DeviceTensor(x, device), result)


@cache
def register() -> Any:
    """Tell PyTorch of the device, once in a process. It forgets the fallback when nobody keeps it."""
    module: Any = backend_registration._DummyBackendModule()
    module.device_count = lambda: len(probe().indices)
    module.get_amp_supported_dtype, module.is_initialized = list, bool  # none, and no: a fork is safe
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch.library.impl("aten::_copy_from", NAME)(lambda x, to, *_: compute(aten.copy_.default, to, x))
    fallback: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    fallback.fallback(compute, "PrivateUse1")
    return fallback


class CPUAccel(Accelerator):
    """The simulated device. The processes on several of them talk as those on the CPU do."""

    spec = CPUACCEL
    process_group_backend = "gloo"

    def device(self, index: int) -> torch.device:
        """``cpuaccel:INDEX``, a device of PyTorch from now on."""
        register()
        return torch.device(NAME, index)

    def setup_device(self, device: torch.device) -> None:
        """Make it current. Backward passes stay on this thread: PyTorch has another for the first device only."""
        torch.get_device_module(NAME).current_device = lambda: device.index
        torch.autograd.set_multithreading_enabled(False)
