"""Giving values to parameters that are divided among the ranks, while a model is created (ZeRO's stage 3).

[Note: views of what is divided] What shares the memory of a parameter (``weight.data``, ``weight[0]``) outlives the
moment in which the parameter is whole. So it is a tensor without memory, which knows how it was made, and is made again
whenever something is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fabric_core.errors import UnsupportedError

__all__ = ["is_divided", "whole_while_used"]


class whole_while_used(TorchFunctionMode):  # noqa: N801  (used like a function)
    """A context in which a divided parameter says how large the whole is, and is whole while something is done with it.

    A module may give values to what its inner modules have, which are divided by then, and would stay as they are.

    Args:
        deepspeed: The library.
    """

    def __init__(self, deepspeed: Any) -> None:
        super().__init__()
        self._gathered = deepspeed.zero.GatheredParameters
        self._replaced: list[Any] = []

    def __exit__(self, *error: Any) -> None:
        """Refuse what DeepSpeed would lose.

        Raises:
            UnsupportedError: A divided parameter was given other data.
        """
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        shapes = [tuple(each.ds_shape) for each in self._replaced if each.data.numel()]
        if shapes and error[0] is None:
            raise UnsupportedError(
                "While the model was created, a module has given other data to a parameter of an inner module "
                f"(parameter.data = …; of shape {shapes[0]}), which had been divided among the ranks by then. Write to "
                "it in place: parameter.data.copy_(…), or with torch.nn.init."
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        use = _Use(func, args, kwargs or {})
        parts = use.parts()
        if not parts:
            return use.call({})
        if func in _ASKING:
            return func(_without_memory(args[0]), *args[1:], **use.kwargs)
        if func == _GIVE_DATA and _is_view(args[1]):  # DeepSpeed does so with what torch.eye(out=…) returns
            use = _Use(_tensor.copy_, args, {})
        elif func == _GIVE_DATA and is_divided(args[0]):  # DeepSpeed takes it away again, the user may not
            self._replaced.append(args[0])
        if use.func in _LEFT_ALONE or _is_attribute(use.func):
            return use.call({})
        with self._gathered(list(_parameters_of(parts)), modifier_rank=0):  # the values of rank 0 count
            return use.run(parts)


@dataclass(frozen=True)
class _Use:
    """A function and what it is called with, among it parts: divided parameters, and views of such."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def parts(self) -> list[Any]:
        """Among the arguments, and in lists of tensors."""
        found = []
        for value in (*self.args, *self.kwargs.values()):
            several = type(value) in (list, tuple)
            found += [each for each in (value if several else (value,)) if is_divided(each) or _is_view(each)]
        return found

    def run(self, parts: list[Any]) -> Any:
        """Call the function while all parameters are whole. Of what shares their memory, a view is returned."""
        made = {id(part): _made(part) for part in parts}
        known = {id(made[id(part)]): part for part in parts}
        memory = {each.untyped_storage().data_ptr() for each in made.values()}

        def as_seen(value: Any, number: int | None) -> Any:
            if id(value) in known:
                return known[id(value)]
            if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() not in memory:
                return value
            view: Any = torch.empty_like(value, device="meta")
            view._made_by = self, parts, number
            return view

        result = self.call(made)
        if isinstance(result, tuple | list):
            return type(result)(as_seen(value, number) for number, value in enumerate(result))
        return as_seen(result, None)

    def call(self, made: dict[int, Any]) -> Any:
        """Call the function, with what was made in the places of parts."""

        def real(value: Any) -> Any:
            if type(value) in (list, tuple):
                return type(value)(made.get(id(each), each) for each in value)
            return made.get(id(value), value)

        return self.func(*map(real, self.args), **{name: real(value) for name, value in self.kwargs.items()})


def is_divided(value: Any) -> bool:
    """Whether a value is a parameter of which this rank has a part only at the moment."""
    return isinstance(value, nn.Parameter) and hasattr(value, "ds_tensor") and not value.data.numel()


def _is_view(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "_made_by")


def _made(part: Any) -> Any:
    """A part as it is while its parameters are whole."""
    if not _is_view(part):
        return part
    use, parts, number = part._made_by
    result = use.call({id(each): _made(each) for each in parts})
    return result if number is None else result[number]


def _parameters_of(parts: Iterable[Any]) -> Iterator[nn.Parameter]:
    for part in parts:
        if _is_view(part):
            yield from _parameters_of(part._made_by[1])
        else:
            yield part


def _without_memory(part: Any) -> Tensor:
    return part if _is_view(part) else torch.empty(part.ds_shape, device="meta")


def _is_attribute(func: Any) -> bool:
    """Whether an attribute of a tensor is read or set that has nothing to do with its memory."""
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__", "__delete__") and func not in _SHARING


_tensor: Any = Tensor
_GIVE_DATA = _tensor.data.__set__
_SHARING = [getattr(_tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")]
_ASKING = [
    *(_tensor.dim, _tensor.ndimension, _tensor.size, _tensor.numel, _tensor.nelement, _tensor.stride),
    *(_tensor.__len__, _tensor.ndim.__get__, _tensor.shape.__get__),
]
"""How one asks for the size of a tensor."""
_LEFT_ALONE = [
    *(_tensor.requires_grad_, _tensor.is_floating_point, _tensor.is_complex, _tensor.element_size),
    *(_tensor.__repr__, _tensor.__hash__),
]
"""What has nothing to do with the values; or is not done on every rank."""
