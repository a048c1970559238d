"""The conformance of strategies."""

from __future__ import annotations

from fabric_core.testing.strategy_checks.description import Description
from fabric_core.testing.strategy_checks.life import Life
from fabric_core.testing.strategy_checks.numbers import Numbers
from fabric_core.testing.strategy_checks.state import State
from fabric_core.testing.strategy_checks.talking import Talking


class StrategyConformance(Description, Life, Talking, Numbers, State):
    """Proof that a strategy keeps the promises of its contract, on the CPU with two processes.

    Every check uses the strategy by its name, through ``fabric run`` as users do. The model is small; it, its data and
    the plain loop that everything is compared with are in `fabric_core.testing.plain_loop`.

    Example:
        >>> class TestAcme(StrategyConformance):
        ...     name = "acme"
        ...     world_sizes = (2, 1)

    Attributes:
        name: What users write: ``"name"``, or ``"name@distribution"``.
        options: Options of the strategy, over those of its spec.
        precisions: The precisions to try, by name. By default those that the spec claims; where it claims none, every
            installed one that is not made for particular strategies or accelerators.
        processes: How many processes. By default 2, or as many as the spec allows.
        world_sizes: Numbers of processes between which checkpoints can be carried; claims nothing by default.
        master_weights: The precisions in which it computes with a copy of the weights in half precision and updates
            them in float32.
        program: The author's module, for what cannot be written as plain options: ``model()`` returns a model of shape
            (N, 6) to (N, 2), ``strategy_options(processes)`` a dictionary of options. Imported on the ranks.
        accelerator: With which accelerator it is tried.
        environ: Further environment variables of the ranks, such as ``PYTHONPATH``.
        patience: How long one step of the programs may take until it counts as hanging, in seconds.
        expected_failures: As in `Conformance`.
    """
