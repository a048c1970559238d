"""Mixed precision: weights in float32, computation in half precision where that is safe, by ``torch.autocast``."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fabric_backends.hooks import MIXED
from fabric_backends.precisions.autocast import is_traced, light_autocast
from fabric_backends.precisions.conversion import dtype_among, widen
from fabric_backends.precisions.loss_scaling import LossScaling
from fabric_core.contracts.precision import Precision
from fabric_core.errors import OptionsError, UnsupportedError, listing, unknown_option

SCALER_OPTIONS = tuple(name for name in inspect.signature(GradScaler).parameters if name != "device")


class MixedPrecision(Precision):
    """Forward passes run under ``torch.autocast``; weights, gradients and the optimizer's state stay in float32.

    Inputs are left alone: autocast converts them where an operation wants it, exactly as in a plain PyTorch loop.
    Outputs in half precision come back in the default dtype (float32). With float16, losses are scaled, so that small
    gradients are not lost, and steps with non-finite gradients are skipped.

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``, or the ``torch.dtype`` itself.
        scaler: For float16: options of ``torch.amp.GradScaler`` by name (``{"init_scale": 1024}``;
            ``{"enabled": False}`` for no scaling at all), or a scaler that is made already. Of the latter, ``scale``,
            ``unscale_``, ``update`` and the state are used; it must not be used elsewhere.

    Raises:
        OptionsError: Another dtype, a scaler for bfloat16, or an option or a value that the scaler does not take.
    """

    spec = MIXED

    scaling_type: type[LossScaling] = LossScaling
    """How losses are scaled; another one where gradients lie in shards."""

    def __init__(
        self, dtype: str | torch.dtype, scaler: Mapping[str, Any] | GradScaler | None = None
    ) -> None:
        self.dtype = dtype_among(dtype, (torch.float16, torch.bfloat16), "MixedPrecision")
        self._given = _checked_scaler(scaler, self.dtype)
        self.scales_loss = self.dtype is torch.float16 and self._given_enabled()

    def _given_enabled(self) -> bool:
        return isinstance(self._given, GradScaler) or bool(self._given.get("enabled", True))

    @functools.cached_property
    def _scaling(self) -> LossScaling:
        # Made at the first use: asking whether the device is there, as a scaler does, may initialise it.
        given = self._given
        return self.scaling_type(
            given if isinstance(given, GradScaler) else GradScaler(self.device.type, **given)
        )

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler of the losses, to look at; ``None`` when losses are not scaled."""
        return self._scaling.scaler if self.scales_loss else None

    # -- the forward pass -----------------------------------------------------------------------------------------

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave the weights as they are, and make sure that the forward passes and the steps will work.

        Raises:
            UnsupportedError: The device has no autocast, or not in this dtype; or losses are scaled, and the model has
                weights in float16, whose gradients cannot be brought to true size.
        """
        if self.scales_loss and any(parameter.dtype is torch.float16 for parameter in module.parameters()):
            raise UnsupportedError(
                f"The {type(module).__name__} has weights in float16, but mixed precision keeps them in float32 and "
                "computes in float16. Set up the model in float32, or use precision='16-true'."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch only warns, and goes on in float32
            try:
                torch.autocast(self.device.type, dtype=self.dtype)
            except (RuntimeError, AssertionError, UserWarning) as error:
                name = str(self.dtype).removeprefix("torch.")
                raise UnsupportedError(
                    f"The device {str(self.device)!r} cannot compute in mixed precision with {name}: {error} "
                    "Use precision='32-true', or another dtype."
                ) from error
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh context, in which this rank's device computes as in ``torch.autocast``."""
        if is_traced():
            return torch.autocast(self.device.type, dtype=self.dtype)
        return light_autocast(self.device.type, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Bring outputs in half precision back to the default dtype."""
        return widen(data)

    # -- the scale of the losses ----------------------------------------------------------------------------------

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Learn of an optimizer, whose gradients a change of the scale must not pass by."""
        if self.scales_loss:
            self._scaling.watch(optimizer)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the current scale."""
        return self._scaling.scale(loss) if self.scales_loss else loss

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients of one optimizer to their true size. Doing it twice is no error.

        Raises:
            SetupError: There are gradients, but no loss was ever scaled.
        """
        if self.scales_loss:
            self._scaling.unscale(optimizer)

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer; skip the step when a gradient is infinite or NaN.

        Raises:
            UnsupportedError: A closure was passed, and losses are scaled.
            SetupError: There are gradients, but no loss was ever scaled.
        """
        if not self.scales_loss:
            return step() if closure is None else step(closure)
        if closure is not None:
            raise UnsupportedError(
                f"{type(optimizer).__name__}.step(closure) cannot be used while losses are scaled (mixed precision "
                "with float16): the step would use gradients that are not at their true size. Use "
                "precision='bf16-mixed', which needs no scaling, or call fabric.backward(loss) and then step() "
                "without a closure."
            )
        return self._scaling.step(optimizer, step)

    def state_dict(self) -> dict[str, Any]:
        """The scale and what decides its next changes. Empty when losses are not scaled."""
        return self._scaling.state_dict() if self.scales_loss else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scale. The state of a run that did not scale is empty, and leaves the scale as it is.

        Raises:
            CheckpointKeyError: It is not the state of a scaler.
        """
        if self.scales_loss and state_dict:
            self._scaling.load_state_dict(state_dict)


def _checked_scaler(scaler: Any, dtype: torch.dtype) -> Mapping[str, Any] | GradScaler:
    if scaler is None:
        return {}
    if dtype is not torch.float16:
        raise OptionsError(
            "MixedPrecision takes scaler= with float16 only: bfloat16 has the range of float32, and its gradients need "
            "no scaling. Leave scaler out, or use precision='16-mixed'."
        )
    if isinstance(scaler, GradScaler):
        if not scaler.is_enabled():
            raise OptionsError(
                "The scaler that was passed is disabled (PyTorch disables one made for a device that is not there). "
                "Make it for the device that is used, or pass scaler={'enabled': False} for no scaling."
            )
        return scaler
    if not isinstance(scaler, Mapping):
        raise OptionsError(
            f"scaler={scaler!r} cannot be used. It takes a torch.amp.GradScaler, or a dictionary of its options: "
            f"{listing(SCALER_OPTIONS)}."
        )
    for name in scaler:
        if name not in SCALER_OPTIONS:
            raise unknown_option("The scaler", name, SCALER_OPTIONS)
    try:
        GradScaler("cpu", **scaler)  # checks the values; on the CPU, nothing is initialised
    except (AssertionError, TypeError) as error:
        raise OptionsError(f"The scaler refuses {dict(scaler)}: {error}") from error
    return scaler
