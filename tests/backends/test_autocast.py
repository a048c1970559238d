"""The light context of mixed precision does what ``torch.autocast`` does, and makes way for it under a tracer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fabric_backends.precisions.autocast import light_autocast
from fabric_core import Fabric

ONES = torch.ones(2, 4)
State = tuple[Any, ...]


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu", precision="bf16-mixed") as fabric:
        yield fabric


def state() -> State:
    """All that autocast has to say of this thread."""
    cpu = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return (*cpu, torch.is_autocast_cache_enabled(), torch.is_autocast_enabled("cuda"), _nesting())


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def both() -> Iterator[Any]:
    """The two contexts, each fresh."""
    yield torch.autocast("cpu", torch.bfloat16)
    yield light_autocast("cpu", torch.bfloat16)


def test_inside_and_after_it_everything_is_as_with_pytorchs_own() -> None:
    found = []
    for context in both():
        seen = [state()]
        with context:
            seen.append(state())
            with torch.autocast("cpu", enabled=False):
                seen.append(state())
            with light_autocast("cpu", torch.float16):
                seen.append(state())
            seen.append(state())
            torch.set_autocast_cache_enabled(False)
        found.append([*seen, state()])
    assert found[0] == found[1]
    assert found[0][0] == found[0][-1]


def test_it_is_left_as_it_was_entered_when_the_forward_pass_fails(fabric: Fabric) -> None:
    model, before = fabric.setup(nn.Linear(4, 4)), state()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(2, 5))
    assert state() == before


def test_inside_of_a_users_autocast_the_users_is_back_afterwards(fabric: Fabric) -> None:
    model = fabric.setup(nn.Linear(4, 4))
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        outside = state()
        model(ONES)
        assert state() == outside


def test_weights_are_converted_once_per_pass_and_anew_in_the_next() -> None:
    for context in (light_autocast, torch.autocast):
        weight = nn.Parameter(torch.ones(4, 4))
        for value in (1.0, 2.0):
            with context("cpu", torch.bfloat16):
                one, other = ONES @ weight, ONES @ weight
            assert one.grad_fn.next_functions[1][0] is other.grad_fn.next_functions[1][0]
            assert one[0, 0] == 4 * value
            weight.data.add_(1.0)


def test_passes_in_passes_and_in_threads_do_not_disturb_each_other(fabric: Fabric) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fabric.setup(nn.Linear(4, 4))
            self.seen: list[torch.dtype] = []

        def forward(self, inputs: Tensor) -> Tensor:
            self.inner(inputs)
            self.seen.append((inputs @ inputs.T).dtype)  # still under the outer one
            return inputs

    outer = fabric.setup(Outer())
    failures: list[Any] = []

    def work() -> None:
        before = state()
        for _ in range(50):
            outer(ONES)
            if state() != before:
                failures.append(state())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(outer.seen) == {torch.bfloat16}


def test_it_decorates_functions_that_call_themselves(fabric: Fabric) -> None:
    @fabric.autocast()
    def power(matrix: Tensor, times: int) -> Tensor:
        """Its documentation."""
        return matrix @ matrix if times == 1 else power(matrix, times - 1) @ matrix

    before = state()
    assert power(torch.eye(4), 3).dtype is torch.bfloat16
    assert state() == before
    assert power.__doc__ == "Its documentation."


# -- tracers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_is_one_graph_whether_it_was_compiled_before_or_after_setup(
    fabric: Fabric, when: str
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(ONES).float()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compiled(model: Any) -> Any:
        return torch.compile(model, backend=backend, fullgraph=True)

    model = fabric.setup(compiled(plain)) if when == "before" else compiled(fabric.setup(plain))
    assert torch.equal(model(ONES), expected)
    assert len(graphs) == 1
    fabric.backward(model(ONES).sum())
    assert plain[0].weight.grad is not None


def test_a_function_that_enters_it_is_the_graph_that_pytorchs_own_would_make(fabric: Fabric) -> None:
    def graph_of(context: Callable[[], Any]) -> list[str]:
        def product(inputs: Tensor) -> Tensor:
            with context():
                return inputs @ inputs.T

        nodes: list[str] = []

        def backend(graph: Any, _: Any) -> Any:
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        assert torch.compile(product, backend=backend, fullgraph=True)(ONES).dtype is torch.bfloat16
        return nodes

    assert graph_of(fabric.autocast) == graph_of(lambda: torch.autocast("cpu", torch.bfloat16))


def test_an_exported_or_traced_model_computes_in_half_precision(fabric: Fabric) -> None:
    model = fabric.setup(nn.Linear(4, 2))
    expected = model(ONES)
    exported = torch.export.export(model, (ONES,), strict=False)
    assert torch.equal(exported.module()(ONES), expected)
    with torch.no_grad():
        traced = make_fx(lambda inputs: model(inputs), pre_dispatch=True)(ONES)
    assert torch.equal(traced(ONES), expected)
    assert any("autocast" in str(node.target) for node in traced.graph.nodes)
