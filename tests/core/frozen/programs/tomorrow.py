"""The core as it may be one day: two versions further in one contract, one in another. Imported before a training.

There is no such core, so this changes the one of today: contracts have new methods, and the core calls them.
"""

from __future__ import annotations

import os
from abc import abstractmethod, update_abstractmethods
from collections.abc import Callable, Mapping
from typing import Any

from fabric_core import Logger, Precision, contract_versions
from fabric_core.data.collections import to_scalars
from fabric_core.verbs.reporting import Reporting

# -- precision: in version 2 forward_context is called compute_context, in version 3 convert_output is called finish


def wrap_forward(self: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What ``Precision.wrap_forward`` is in version 3."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.convert_input(args), self.convert_input(kwargs)
        with self.compute_context():
            return self.finish(forward(*args, **kwargs))

    return computed


contract: Any = Precision
contract.compute_context = Precision.forward_context
contract.finish = Precision.convert_output
contract.wrap_forward = wrap_forward


def precision_1_to_2(cls: type) -> type:
    """Call the context by its old name."""

    class Adapted(cls):  # type: ignore[misc]
        def compute_context(self) -> Any:
            return self.forward_context()

    return Adapted


def precision_2_to_3(cls: type) -> type:
    """Call the conversion of results by its old name."""

    class Adapted(cls):  # type: ignore[misc]
        def finish(self, data: Any) -> Any:
            return self.convert_output(data)

    return Adapted


# -- logger: in version 2 log_metrics is called record, has its arguments the other way round, and cannot be left out


def record(self: Any, step: int | None, metrics: Mapping[str, float]) -> None:
    """Record metrics."""


def log_dict(self: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
    """What the verb is in version 2."""
    for logger in self.loggers:
        logger.record(step, to_scalars(metrics))


contract = Logger
contract.record = abstractmethod(record)
update_abstractmethods(contract)
verbs: Any = Reporting
verbs.log_dict = log_dict


def logger_1_to_2(cls: type) -> type:
    """Record by the old name, the arguments in their old order."""

    class Adapted(cls):  # type: ignore[misc]
        def record(self, step: int | None, metrics: Mapping[str, float]) -> None:
            self.log_metrics(metrics, step)

    return Adapted


contract_versions.CURRENT.update({"precision": 3, "logger": 2})
if os.environ.get("WITHOUT_ADAPTERS") != "1":
    contract_versions.ADAPTERS.update(
        {
            ("precision", 1): "tomorrow:precision_1_to_2",
            ("precision", 2): "tomorrow:precision_2_to_3",
            ("logger", 1): "tomorrow:logger_1_to_2",
        }
    )
