"""The engines of a strategy: which of them a model, an optimizer or a loss belongs to."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.errors import SetupError
from fabric_deepspeed.engine import Engine


class Engines:
    """All engines that were made, in the same order on every rank."""

    def __init__(self) -> None:
        self._engines: list[Engine] = []
        self._by_module: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()
        self._untrained: list[Any] = []

    def add(self, engine: Engine, module: nn.Module) -> Engine:
        """Remember the engine of a model in training."""
        self._engines.append(engine)
        self._by_module[module] = self._by_module[engine.raw] = engine
        return engine

    def add_untrained(self, raw: Any) -> None:
        """Remember an engine of DeepSpeed's without an optimizer, to destroy it in the end."""
        self._untrained.append(raw)

    def find(self, module: nn.Module) -> Engine | None:
        """That of a model, if it is in training."""
        return self._by_module.get(module)

    def of(self, module: nn.Module | None) -> Engine:
        """That of a model in training; without a model, the only one.

        Raises:
            SetupError: There is none, or several.
        """
        if module is not None and module in self._by_module:
            return self._by_module[module]
        if module is not None or not self._engines:
            raise SetupError(
                "fabric.backward() needs a model that was set up with an optimizer: DeepSpeed's engine computes its "
                "gradients. Call fabric.setup(model, optimizer)."
            )
        if len(self._engines) > 1:
            raise SetupError(
                f"{len(self._engines)} models are in training, each in an engine of DeepSpeed's. Say to which of them "
                "the loss belongs: fabric.backward(loss, model=model)."
            )
        return self._engines[0]

    def of_optimizer(self, optimizer: Optimizer) -> Engine:
        """That which an optimizer steps with.

        Raises:
            SetupError: It steps with none.
        """
        for engine in self._engines:
            if any(optimizer is own for own in engine.optimizers):
                return engine
        raise SetupError(f"This {type(optimizer).__name__} was not set up together with a model.")

    def backward(self, engine: Engine, loss: Tensor, retain_graph: bool) -> None:
        """Add to the gradients of an engine; a loss may pass through the models of others. Called on every rank."""
        others = [other for other in self._engines if other is not engine]
        for other in others:
            other.expect_to_be_passed()
        engine.backward(loss, retain_graph)
        for other in others:
            other.end_backward()

    def release(self) -> None:
        """Destroy them all. Called on every rank."""
        for engine in self._engines:
            engine.release()
        for raw in self._untrained:
            raw.destroy()
        for forgotten in (self._engines, self._untrained, self._by_module):
            forgotten.clear()
