"""The comparison itself: what is worse fails and says by how much, and what is better asks to be kept."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def numbers() -> dict[str, Any]:
    return {"calls": {"a step": 10}}


def test_the_same_number_passes_and_a_near_one_where_it_may_differ(held: Any) -> None:
    held("calls", "a step", 10)
    held("calls", "a step", 12, slack=2)
    held("calls", "a step", 8, slack=2)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (13, r"Worse by 3: \[calls\] 'a step' of tests/ratchets/numbers.toml is 10, and now it is 13"),
        (6, r"Better by 4: tighten \[calls\] 'a step' .* from 10 to 6"),
    ],
)
def test_another_number_fails_and_says_by_how_much(held: Any, found: int, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        held("calls", "a step", found)


def test_a_number_that_is_not_known_says_where_it_belongs(held: Any) -> None:
    with pytest.raises(AssertionError, match="write 7 as .calls. 'a batch' of"):
        held("calls", "a batch", 7)
