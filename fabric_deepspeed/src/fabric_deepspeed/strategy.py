"""DeepSpeed: an engine around each model, which divides optimizer, gradients and parameters over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_backends.sharding.memory import give_back
from fabric_backends.strategies.folders import CheckpointKind, FolderStrategy
from fabric_backends.timeouts import INIT_TIMEOUT
from fabric_core.empty_init import skip_init
from fabric_core.errors import OptionsError, UnsupportedError
from fabric_core.sharded.trees import mapped, named
from fabric_deepspeed import library, pieces, states
from fabric_deepspeed.checks import backward_arguments, check_parameters
from fabric_deepspeed.checks import logging_level as as_level
from fabric_deepspeed.config import combine, complete, read
from fabric_deepspeed.dividing import divided
from fabric_deepspeed.engine import Engine
from fabric_deepspeed.engines import Engines
from fabric_deepspeed.from_config import make_optimizer, make_scheduler
from fabric_deepspeed.hooks import DEEPSPEED
from fabric_deepspeed.options import options_from
from fabric_deepspeed.precision import DeepSpeedPrecision
from fabric_deepspeed.stepping import Joined


class DeepSpeedStrategy(FolderStrategy):
    """A process per device, and DeepSpeed between the model and its optimizers.

    Loops stay as they are: the verbs of Fabric accumulate, clip and step, and each model has an engine of its own. What
    comes back from ``setup`` are the user's own optimizers; their ``step`` is the engine's, when all of the optimizers
    of its model have been asked.

    Args:
        config: DeepSpeed's config: a dictionary or the path of a JSON file. Without it, the environment variable
            ``FABRIC_DEEPSPEED_CONFIG`` may name one. What Fabric knows may be ``"auto"`` in it.
        checkpoint: As in `FolderStrategy`.
        exclude_frozen_parameters: Leave parameters that are not trained out of checkpoints.
        shared_memory: Let CPUs of one node reduce through shared memory, by kernels that are compiled at first use.
        logging_level: Of DeepSpeed's logger.
        process_group_backend, timeout, init_timeout: As in `ParallelStrategy`.
        options: See `fabric_deepspeed.options.Options`.

    Raises:
        OptionsError: An option is unknown or cannot be; or options and config contradict each other.
    """

    spec = DEEPSPEED
    joint_setup = True
    owns_backward = True
    reads_stored_tensors = True

    def __init__(
        self,
        *,
        config: Any = None,
        checkpoint: CheckpointKind = "sharded",
        exclude_frozen_parameters: bool = False,
        shared_memory: bool = False,
        logging_level: int | str = logging.WARNING,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
        init_timeout: float | timedelta = INIT_TIMEOUT,
        **options: Any,
    ) -> None:
        super().__init__(
            checkpoint=checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            init_timeout=init_timeout,
        )
        self.config = combine(read(config), options_from(options))
        self._exclude_frozen = exclude_frozen_parameters
        self._shared_memory = shared_memory
        self._log_level = as_level(logging_level)
        self._deepspeed: Any = None
        self._engines = Engines()

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        stage: int = self.config["zero_optimization"]["stage"]
        return stage

    # -- coming and going -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the process group, and import DeepSpeed. Called on every rank, once.

        Raises:
            BrokenPluginError: DeepSpeed is installed, and cannot be imported.
            UnsupportedError: The precision was passed in code, and is another one.
            OptionsError: The config contradicts the precision, or the number of ranks.
        """
        precision = self.surroundings.precision
        if not isinstance(precision, DeepSpeedPrecision):
            raise UnsupportedError(
                f"A {type(precision).__name__} was passed; DeepSpeed's engine converts and scales by itself. Say the "
                "precision by name, or pass a fabric_deepspeed.precision:DeepSpeedPrecision."
            )
        self._complete_config()
        self._deepspeed = library.load(self.root_device.type)
        super().connect()
        library.join(
            self._deepspeed,
            library.backend_name(),
            shared_memory=self._shared_memory,
            log_level=self._log_level,
        )

    def _complete_config(self) -> dict[str, Any]:
        precision: Any = self.surroundings.precision
        return complete(self.config, dtype=precision.dtype, world_size=self.world_size)

    def teardown(self) -> None:
        """Destroy the engines, then leave the process group. Called on every rank; safe to call twice."""
        self._engines.release()
        if self._deepspeed is not None:
            library.leave()
            self._deepspeed = None
        super().teardown()

    # -- setting up -----------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which a model is created on the device; in stage 3, each parameter is divided at once."""
        if self.stage < 3:
            return super().module_init_context(empty_init)
        return self._divided(empty_init)

    @contextmanager
    def _divided(self, empty_init: bool | None) -> Any:
        with ExitStack() as stack:
            stack.enter_context(library.working(self.local_rank))
            stack.enter_context(divided(self._deepspeed, self._complete_config(), self.root_device))
            stack.enter_context(skip_init() if empty_init else nullcontext())
            yield

    def move_module(self, module: nn.Module) -> None:
        """As the contract; what is divided is in its place."""
        if not any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
            super().move_module(module)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Make a model ready for inference. In stage 3, its parameters are divided. Called on every rank."""
        precision: Any = self.surroundings.precision
        if self.stage < 3:
            self.synchronize_module(module)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(precision.dtype)
            return module
        raw = self._initialize(module, None)
        self._engines.add_untrained(raw)
        return _ForwardOnly(raw)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Put an engine around a model and its optimizers. Called on every rank, in the same order.

        Returns:
            The engine, and the user's own optimizers and scheduler, or those that the config names.

        Raises:
            SetupError: There is nothing to train; or two optimizers share a parameter.
            OptionsError: An optimizer or a scheduler was given, and the config names one, too; or there is none such.
        """
        trains = any(parameter.requires_grad for parameter in module.parameters())
        made = make_optimizer(self._deepspeed, self.config, module) if trains else None
        if made is not None and optimizers:
            raise OptionsError(
                f"DeepSpeed's config names an optimizer ({type(made).__name__}), and a {type(optimizers[0]).__name__} "
                "was given to setup. Take one of them out."
            )
        optimizers = optimizers if made is None else [made]
        if not optimizers:
            return self.setup_module(module), [], scheduler
        named = make_scheduler(self.config, optimizers)
        if named is not None and scheduler is not None:
            raise OptionsError(
                "DeepSpeed's config names a scheduler, and one was given to setup. Take one out."
            )
        check_parameters(module, optimizers)
        precise, joined = self._precise_weights(module), Joined(optimizers)
        engine = self._engines.add(Engine(self._initialize(module, joined), joined), module)
        states.begin_with(engine, precise)
        return engine.raw, optimizers, scheduler if named is None else named

    def _precise_weights(self, module: nn.Module) -> dict[nn.Parameter, Tensor]:
        """In half precision, the float32 weights of rank 0, before the engine rounds them."""
        precision: Any = self.surroundings.precision
        wanted = [
            parameter
            for parameter in module.parameters()
            if parameter.requires_grad
            and parameter.dtype is torch.float32 is not precision.dtype
            and not hasattr(parameter, "ds_tensor")
        ]
        if wanted:
            self.synchronize_module(module)
        return {parameter: parameter.detach().clone() for parameter in wanted}

    def _initialize(self, module: nn.Module, joined: Joined | None) -> Any:
        config = self._complete_config()
        for made_here in ("optimizer", "scheduler"):
            config.pop(made_here, None)
        arguments: dict[str, Any] = {} if joined is None else {"optimizer": joined}
        with library.working(self.local_rank):
            raw, *_ = self._deepspeed.initialize(
                model=module, config=config, dist_init_required=False, **arguments
            )
        give_back(self.root_device)  # DeepSpeed has laid the parameters out anew
        return raw

    # -- the step -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """As the contract, through the engine of the model.

        Raises:
            SetupError: It is not known which engine the loss belongs to; or a half of its optimizers was stepped.
            UnsupportedError: An argument of ``torch.Tensor.backward`` that DeepSpeed has not.
        """
        gradient, retain_graph = backward_arguments(*args, **kwargs)
        engine = self._engines.of(module)
        if gradient is not None:
            loss = (loss * gradient).sum()
        self._engines.backward(engine, loss, retain_graph)

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step the engine, when all optimizers of its model have been asked. Called on every rank."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._engines.of_optimizer(optimizer).step(optimizer)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers of PyTorch look at it
        return loss

    def hold_gradient_sync(self, module: nn.Module) -> None:
        """It cannot be held back: where gradients are divided, they are sent as they appear."""
        return

    def zero_gradients(
        self, optimizer: Optimizer, zero_grad: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """As the contract; also drops what the engine has collected."""
        self._engines.of_optimizer(optimizer).zero_grad(optimizer)

    def scale_gradients(self, module: nn.Module, factor: float) -> None:
        """As the contract."""
        self._engines.of(module).scale(factor)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract. The gradients are clipped in the step, in float32."""
        engine = self._engines.of(module)
        return engine.clip_norm(parameters, max_norm, float(norm_type), error_if_nonfinite)

    def clip_gradients_value(
        self, module: nn.Module, parameters: list[nn.Parameter], clip_value: float
    ) -> None:
        """As the contract. The gradients are clipped in the step, in float32."""
        self._engines.of(module).clip_value(parameters, clip_value)

    # -- state ----------------------------------------------------------------------------------------------------

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of a module, its trained weights in float32; of what is divided, the pieces of this rank."""
        state = states.module_state(module, self._engines.find(module))
        if self._exclude_frozen:
            frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
            state = {name: value for name, value in state.items() if name not in frozen}
        return state

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """As the contract; each rank reads only what it holds."""
        states.load_module_state(module, self._engines.find(module), state, strict)

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer; of what is divided, the pieces of this rank."""
        return states.optimizer_state(optimizer, self._engines.of_optimizer(optimizer))

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """As the contract; each rank reads only what it holds."""
        states.load_optimizer_state(optimizer, self._engines.of_optimizer(optimizer), state)

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy what this rank will write; what is to be whole is put together first. Called on every rank."""
        checkpoint = self._as_asked(checkpoint)
        if _has_pieces(checkpoint):
            return self.staged(checkpoint, copied, range(self.world_size))
        return super().stage_checkpoint(checkpoint, copied)

    def _as_asked(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """Whole, or as it is. Called on every rank."""
        if self.checkpoint == "sharded":
            return checkpoint
        whole: Mapping[str, Any] = mapped(checkpoint, pieces.Piece.whole, pieces.Piece)
        return whole

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write a folder of shards, or one file where nothing is in pieces. Called on every rank.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """
        checkpoint = self._as_asked(checkpoint)
        if _has_pieces(checkpoint):
            self.save_folder(path, mapped(checkpoint, pieces.Piece.share, pieces.Piece))
        else:
            super().save_checkpoint(path, checkpoint)


def _has_pieces(checkpoint: Mapping[str, Any]) -> bool:
    """Whether anything in a checkpoint is in pieces; the same on every rank."""
    return bool(named(checkpoint, lambda value: isinstance(value, pieces.Piece)))


class _ForwardOnly(nn.Module):
    """An engine without an optimizer: it gathers the parameters for each layer while that computes."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = [raw]  # no module of this one: it is destroyed by its strategy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with library.quiet():
            return self._raw[0](*args, **kwargs)
