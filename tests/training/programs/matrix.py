"""Every strategy with every precision that it claims: one training, many ways, to be compared with a plain loop.

As a program it trains the cells that a JSON file names, one ``Fabric`` after the other in the same processes, and
writes what came out. The test imports it for the cells and for the plain loops.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fabric_core.testing import comparison
from fabric_core.testing.comparison import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    HALVES,
    LAST_DIGITS,
    TRUE_TOLERANCE,
)
from fabric_core.testing.plain_loop import CASES, Case, Trained
from fabric_core.testing.programs.training import Training


@dataclass(frozen=True)
class Cell:
    """A strategy and a precision."""

    strategy: str
    precision: str

    @property
    def cases(self) -> dict[str, Case]:
        """The ways in which it trains."""
        wanted = CASES if self.precision == "32-true" else ("plain", "everything")
        return {name: replace(CASES[name], precision=self.precision) for name in wanted}


@dataclass
class Outcome:
    """What came out of a cell: by case, in how many parts each batch was computed, and what went wrong, if anything."""

    trained: dict[str, Trained] = field(default_factory=dict)
    replicas: int = 1
    error: str = ""


def parallelize(module: Any, mesh: Any) -> None:
    """The plan of the model for strategies that divide its layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: Any = {"first": ColwiseParallel(), "last": RowwiseParallel()}
    parallelize_module(module, mesh["tensor_parallel"], plan)


def options_of(strategy: str, processes: int) -> dict[str, Any]:
    """What a strategy has to be told about the model, or to use two axes of a mesh of four."""
    told: dict[str, dict[str, Any]] = {
        "tensor_parallel": {"parallelize_fn": parallelize, "data_parallel_size": 2 if processes == 4 else 1},
        "ddp_sharded_spawn": {"engine": "torch"},  # where FairScale is installed, the other two use that
        "local_sgd": {"warmup_steps": 10**6},  # it equals the plain loop as long as gradients are averaged
        "fsdp_hybrid": {} if processes < 4 else {"device_mesh": (2, 2)},
    }
    return told.get(strategy, {})


def opened(cell: Cell, accelerator: str) -> Any:
    from fabric_core import Fabric

    options = options_of(cell.strategy, int(os.environ.get("WORLD_SIZE", "1")))
    return Fabric(
        accelerator=accelerator, strategy=cell.strategy, precision=cell.precision, strategy_options=options
    )


def train_cell(cell: Cell, folder: Path, accelerator: str = "cpu") -> Outcome:
    """Every case of a cell; and under ``"resumed"``, everything, stopped in the middle and gone on with elsewhere."""
    results = {}
    for name, case in cell.cases.items():
        with opened(cell, accelerator) as fabric:
            training = Training(fabric, case)
            if case.every > 1 and case.two_optimizers:
                middle = case.every * 7
                training.run(end=middle)
                fabric.save(folder / "middle", training.state)
                training.run(begin=middle)
            else:
                training.run()
            results[name] = training.result(folder)
    case = cell.cases["everything"]
    with opened(cell, accelerator) as fabric:
        training = Training(fabric, case, seed=2)
        training.restore(folder / "middle")
        training.run(begin=case.every * 7)
        results["resumed"] = training.result(folder)
        return Outcome(results, fabric.strategy.sampler_arguments["num_replicas"])


def judge(cell: Cell, name: str, outcome: Outcome) -> tuple[float, float]:
    """The largest difference to the plain loop, of losses and parameters; and the largest that is allowed."""
    case, trained = cell.cases["everything" if name == "resumed" else name], outcome.trained[name]
    return comparison.judge(case, trained, outcome.replicas, master=has_master_weights(cell))


def has_master_weights(cell: Cell) -> bool:
    """Whether the engine computes with a copy of the weights in half precision and updates those in float32."""
    return cell.strategy.startswith("deepspeed") and cell.precision in HALVES


def verdict(cell: Cell, outcome: Outcome) -> list[str]:
    """One line for each case."""
    if outcome.error:
        return [outcome.error]
    found = {name: judge(cell, name, outcome) for name in outcome.trained}
    return [
        f"{name}: {distance:.1e} {'<=' if distance <= most else 'IS MORE THAN'} {most:.1e}"
        for name, (distance, most) in found.items()
    ]


PAGE = """# What is equal to a plain PyTorch loop

This page is written by the tests (`make matrix`), and a test fails when it is not what was found.

Each strategy trains one model with each precision that it claims, on the CPU, and the losses and final parameters are
compared with those of a plain PyTorch loop over the same global batches: {cases};
and *resumed*: everything of it, with a checkpoint in the middle, and gone on with from there by another `Fabric`.
A field says with how many processes all of them are equal: in float32 and float64 within {exact:g}; in half precision
within {half:.0%} of how far training moved, against a plain loop with the same casts; where the weights themselves are
in half precision, within {true:.0%} or {digits} of their last digits. In a precision other than `32-true`, {fewer} are
compared. Strategies that differ only in how they start their processes are trained once.

{table}
"""


def document(equal: dict[Cell, list[int]]) -> str:
    """The page of the documentation that says what was found."""
    precisions = list(dict.fromkeys(cell.precision for cell in sorted(equal, key=lambda c: c.precision)))
    strategies = list(dict.fromkeys(cell.strategy for cell in equal))
    lines = [
        "| strategy |" + "|".join(f" `{name}` " for name in precisions) + "|",
        "|---" * (len(precisions) + 1) + "|",
    ]
    for strategy in strategies:
        fields = [", ".join(map(str, equal.get(Cell(strategy, name), []))) or "-" for name in precisions]
        lines.append(f"| `{strategy}` | " + " | ".join(fields) + " |")
    return PAGE.format(
        cases=", ".join(f"*{name}*" for name in CASES),
        exact=FLOAT32_TOLERANCE,
        half=HALF_TOLERANCE,
        true=TRUE_TOLERANCE,
        digits=LAST_DIGITS,
        fewer="*plain*, *everything* and *resumed*",
        table="\n".join(lines),
    )


def main() -> None:
    """``matrix.py cells.json results.pt [accelerator]``."""
    asked, answer, *accelerator = sys.argv[1:]
    is_zero = os.environ.get("RANK", "0") == "0"
    results: dict[Cell, Outcome] = {}
    folder = Path(answer).with_suffix(".checkpoints")
    for fields in json.loads(Path(asked).read_text()):
        cell, started = Cell(**fields), time.process_time()
        try:
            results[cell] = train_cell(cell, folder / f"{cell.strategy}-{cell.precision}", *accelerator)
        except Exception as error:
            results[cell] = Outcome(error="".join(traceback.format_exception(error)))
        if is_zero:
            seconds = time.process_time() - started
            print(f"{cell} ({seconds:.1f} s)", *verdict(cell, results[cell]), sep="\n    ", flush=True)
    if is_zero:
        torch.save({astuple(cell): vars(outcome) for cell, outcome in results.items()}, answer)


if __name__ == "__main__":
    main()
