"""A real Jupyter kernel launches a function on two processes, twice, and survives a failure."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = Path(__file__).parent / "programs" / "notebook.py"
SEPARATOR = "# " + "-" * 114 + "\n"


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """What each cell printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook packages themselves
        import nbclient
        import nbformat.v4

        cells = [nbformat.v4.new_code_cell(cell) for cell in PROGRAM.read_text().split(SEPARATOR)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(notebook, timeout=90, kernel_name="python3").execute()
    return [_printed(cell) for cell in notebook.cells]


def _printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")


def test_a_function_runs_on_two_processes(outputs: list[str]) -> None:
    name, world_size, loss = outputs[1].split()
    assert (name, world_size) == ("ddp_notebook", "2")
    assert float(loss) > 0


def test_a_second_launch_in_the_same_kernel_gives_the_same_result(outputs: list[str]) -> None:
    world_size, loss, equal = outputs[2].split()
    assert (world_size, loss, equal) == ("2", outputs[1].split()[2], "True")


def test_a_failing_rank_is_an_exception_that_ends_with_its_traceback(outputs: list[str]) -> None:
    assert outputs[3].strip() == "RankFailedError ValueError: a cell with a fault"


def test_nothing_of_a_launch_remains_in_the_kernel(outputs: list[str]) -> None:
    assert outputs[4].splitlines() == ["[]", "True"]


def test_no_process_remains(outputs: list[str]) -> None:
    assert outputs
    mine = psutil.Process().children(recursive=True)
    assert [process for process in mine if "ipykernel" in " ".join(process.cmdline())] == []
