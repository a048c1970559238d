"""Rounding, number by number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fabric_core import Fabric, OptionsError, UnsupportedError
from fabric_sgdfp8sim.precision import FORMATS, Round, SimulatedFP8

every_format = pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a format, in order."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return codes[codes.isfinite()].unique()


@every_format
def test_the_nearest_number_of_the_format_is_taken(dtype: torch.dtype) -> None:
    known = numbers(dtype)
    x = torch.cat(
        [torch.linspace(-700, 700, 5001), torch.randn(2000) / 50, known, torch.tensor([1e9, -1e9, 0.0])]
    )
    found = Round.apply(x, dtype, False)
    distance = (x.clamp(known[0], known[-1])[:, None] - known).abs()
    assert torch.isin(found, known).all()
    assert torch.equal((x.clamp(known[0], known[-1]) - found).abs(), distance.min(dim=1).values)


@every_format
def test_at_random_one_of_both_neighbours_is_taken_and_the_mean_is_the_number(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    known = numbers(dtype)
    for value in (0.3, -5.3, 1.9 * known[known > 0][0].item(), known[known > 0][0].item() / 3, 300.0):
        found = Round.apply(torch.full((200_000,), value), dtype, True)
        above = known[known >= value][0].item()
        below = known[known <= value][-1].item()
        assert set(found.unique().tolist()) == {below, above}
        assert found.double().mean().item() == pytest.approx(value, abs=(above - below) / 200)
    exact = known.repeat(200)
    assert torch.equal(Round.apply(exact, dtype, True), exact)
    limits = Round.apply(torch.tensor([1e9, float("-inf")]), dtype, True)
    assert limits.tolist() == [known[-1].item(), known[0].item()]


def test_gradients_pass_straight_through() -> None:
    x = torch.tensor([0.013, 500.0, 0.0], requires_grad=True)
    (Round.apply(x, torch.float8_e4m3fn, False) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


def test_every_product_is_one_of_rounded_factors() -> None:
    torch.manual_seed(1)
    precision, a, b = SimulatedFP8(), torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    low, high = (Round.apply(x, torch.float8_e4m3fn, False) for x in (a, b))
    image, kernel = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    small, light = (Round.apply(x, torch.float8_e4m3fn, False) for x in (image, kernel))
    with precision.forward_context():
        found = (a @ b, torch.bmm(a, b), a.matmul(b), F.linear(a, weight=b[0]), torch.mm(a[0], mat2=b[0]))
        other = (F.conv2d(image, kernel), a + b, F.linear(a, b[0], b[0][0]))
    expected = (low @ high, low @ high, low @ high, low @ high[0].T, low[0] @ high[0])
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, other, (F.conv2d(small, light), a + b, F.linear(low, high[0], b[0][0]))))
    assert torch.equal(a @ b, torch.matmul(a, b))
    assert not torch.equal(a @ b, low @ high)


def test_what_cannot_be_rounded_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    with pytest.raises(UnsupportedError, match="1, a MultiheadAttention, multiplies inside of PyTorch"):
        SimulatedFP8().convert_module(model)


def test_options_reach_the_precision_and_are_checked() -> None:
    given = {"format": "e5m2", "stochastic": True}
    with Fabric(accelerator="cpu", devices=1, precision="sgdfp8sim", precision_options=given) as fabric:
        fabric.launch()
        module = fabric.setup_module(nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            module.weight.fill_(1.1)
            found = {module(torch.ones(1)).item() for _ in range(50)}
    assert found == {1.0, 1.25}
    for wrong, sentence in (
        ({"format": "e4m4"}, "e4m4"),
        ({"stochastics": True}, "Did you mean 'stochastic'"),
    ):
        with pytest.raises(OptionsError, match=sentence):
            Fabric(accelerator="cpu", devices=1, precision="sgdfp8sim", precision_options=wrong)
