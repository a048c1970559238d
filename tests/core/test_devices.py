"""Every spelling of ``devices``, against machines that have some, many, or none."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_core.errors import DevicesError
from fabric_core.resolve.devices import choose, is_cpu_request, normalise
from fabric_core.specs import Inventory

EIGHT = Inventory(indices=tuple(range(8)))
ODD = Inventory(indices=(0, 2, 5))
"""What is left where others are hidden from this process."""
ANY = Inventory(virtual=True, default=1)
"""Processes, as on the CPU."""
SHY = Inventory(indices=(0, 1, 2, 3), default=2)
"""Devices of which the probe advises to take only two."""
NAMED = Inventory(indices=(0, 1, 2), names={"Unit-aa10": 0, "Unit-aa20": 1, "Unit-b": 2, "Part-b": 2})
"""Devices that have names besides their index; one of them has two."""


@pytest.mark.parametrize(
    ("devices", "eight", "odd", "processes"),
    [
        ("auto", (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5), (0,)),
        (" AUTO ", (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5), (0,)),
        (-1, (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5), (0,)),
        ("-1", (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 5), (0,)),
        (1, (0,), (0,), (0,)),
        (2, (0, 1), (0, 2), (0, 1)),
        ("2", (0, 1), (0, 2), (0, 1)),
        (" 3 ", (0, 1, 2), (0, 2, 5), (0, 1, 2)),
        ([2], (2,), (2,), "has none"),
        ([5, 2], (5, 2), (5, 2), "has none"),
        ((0, 5), (0, 5), (0, 5), "has none"),
        ("0,5", (0, 5), (0, 5), "has none"),
        ("2, 5", (2, 5), (2, 5), "has none"),
        ("2,", (2,), (2,), "has none"),
        ([1, 4], (1, 4), "no device 1, 4 here. There are: 0, 2, 5", "has none"),
        ("1, 4", (1, 4), "no device 1, 4 here. There are: 0, 2, 5", "has none"),
        (9, "9 devices were asked for, but 'unit' has 8 here", "has 3 here: 0, 2, 5", tuple(range(9))),
        ([8], "no device 8 here", "no device 8 here", "has none"),
    ],
)
def test_every_documented_form_means_the_same_everywhere(
    devices: Any, eight: Any, odd: Any, processes: Any
) -> None:
    for inventory, expected in ((EIGHT, eight), (ODD, odd), (ANY, processes)):
        if isinstance(expected, str):
            with pytest.raises(DevicesError, match="asked for|lists device indices") as caught:
                choose(devices, inventory, "unit")
            assert expected in str(caught.value)
        else:
            chosen, why = choose(devices, inventory, "unit")
            assert chosen == expected
            assert why


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("two", "devices='two' is not understood"),
        ("1.5", "devices='1.5' is not understood"),
        ("[1, 4]", "is not understood"),
        ("1;2", "is not understood"),
        ("", "devices='' is empty"),
        ("  ", "is empty"),
        (",", "lists no device"),
        ([], r"devices=\[\] lists no device"),
        ((), "lists no device"),
        (-3, "devices=-3 is negative; only -1 has a meaning"),
        ("-2", "devices=-2 is negative"),
        ([0, 0], r"devices=\[0, 0\] names a device twice"),
        ("1,1", "names a device twice"),
        ([-1], "whole numbers from 0"),
        ("0,-1", "whole numbers from 0"),
        (["0"], "whole numbers from 0"),
        ([1.0], "whole numbers from 0"),
        ([True], "whole numbers from 0"),
        (True, "devices=True is not understood"),
        (False, "devices=False is not understood"),
        (1.5, "devices=1.5 is not understood"),
        (2.0, "devices=2.0 is not understood"),
        ({0, 1}, "is not understood"),
        ({"a": 1}, "is not understood"),
        (object(), "is not understood"),
    ],
)
def test_every_other_form_is_an_error_that_says_what_is_taken(devices: Any, message: str) -> None:
    for inventory in (EIGHT, ODD, ANY):
        with pytest.raises(DevicesError, match=message):
            choose(devices, inventory, "unit")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["Unit-b"], (2,)),
        ("Unit-b", (2,)),
        (" unit-AA20 ", (1,)),
        ("Unit-aa20, Unit-aa10", (1, 0)),
        (("Part-b", "UNIT-AA10"), (2, 0)),
        ([1, "Unit-aa10"], (1, 0)),
        ("2,Unit-aa10", (2, 0)),
        ("Unit-aa1", (0,)),
        ("part-", (2,)),
        ([2], (2,)),
        (2, (0, 1)),
        ("auto", (0, 1, 2)),
    ],
)
def test_a_device_with_a_name_may_be_asked_for_by_it_or_by_its_beginning(devices: Any, expected: Any) -> None:
    assert choose(devices, NAMED, "unit")[0] == expected
    assert not is_cpu_request(devices)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            "Unit-c",
            "'unit' has no device named 'unit-c' here. There are: Part-b, Unit-aa10, Unit-aa20, Unit-b.",
        ),
        (["Unit-aa"], "2 devices whose name begins with 'unit-aa'"),
        (["Unit-b", "Part-b"], "names a device twice"),
        ([0, "Unit-aa10"], "names a device twice"),
        (["Unit-b", "unit-b"], "names a device twice"),
        ([""], "has to list device indices"),
        (["two"], "has to list device indices"),
        ([3, "Unit-b"], "has no device 3"),
        ([1.0, "Unit-b"], "whole numbers from 0"),
        ("two", "devices='two' is not understood"),
    ],
)
def test_a_name_that_means_no_device_or_several_is_an_error_with_all_names(
    devices: Any, message: str
) -> None:
    with pytest.raises(DevicesError) as caught:
        choose(devices, NAMED, "unit")
    assert message in str(caught.value)


@pytest.mark.parametrize("inventory", [EIGHT, ANY], ids=["indices only", "processes"])
def test_where_devices_have_no_names_a_name_is_an_error(inventory: Inventory) -> None:
    for devices in ("Unit-b", ["Unit-b"], "Unit-b,0"):
        with pytest.raises(DevicesError, match="no device named 'unit-b' here"):
            choose(devices, inventory, "unit")


@pytest.mark.parametrize("devices", [None, 0, "0"])
def test_none_and_zero_ask_for_one_process_without_an_accelerator(devices: Any) -> None:
    assert is_cpu_request(devices)
    assert choose(devices, ANY, "cpu")[0] == (0,)


@pytest.mark.parametrize("devices", ["auto", -1, 1, "1", [0], "0,", "0,1"])
def test_anything_else_does_not(devices: Any) -> None:
    assert not is_cpu_request(devices)


def test_a_list_is_not_changed_and_not_kept() -> None:
    mine = [1, 4]
    chosen, _ = choose(mine, EIGHT, "unit")
    mine.append(5)
    assert chosen == (1, 4)


def test_auto_follows_the_advice_of_the_probe_and_minus_one_does_not() -> None:
    assert choose("auto", SHY, "unit")[0] == (0, 1)
    assert choose(-1, SHY, "unit")[0] == (0, 1, 2, 3)


def test_auto_follows_what_was_started() -> None:
    assert choose("auto", EIGHT, "unit", started=3) == (
        (0, 1, 2),
        "auto: 3 process(es) were started on this node",
    )
    assert choose("auto", ANY, "unit", started=3)[0] == (0, 1, 2)
    assert choose("auto", ODD, "unit", started=4)[0] == (0, 2, 5), "more were started than there are devices"


def test_auto_takes_no_more_than_can_be_used() -> None:
    assert choose("auto", EIGHT, "unit", most=1) == ((0,), "auto: 8 were found, and 1 can be used")
    assert choose(2, EIGHT, "unit", most=1)[0] == (0, 1), "what was asked for is refused later, not cut"


@given(st.integers(1, 64))
def test_a_number_and_its_text_mean_the_same(count: int) -> None:
    assert normalise(count) == normalise(str(count)) == normalise(f" {count} ")


@given(st.lists(st.integers(0, 99), min_size=2, max_size=8, unique=True))
def test_a_list_a_tuple_and_its_text_mean_the_same(indices: list[int]) -> None:
    assert normalise(indices) == normalise(tuple(indices)) == normalise(", ".join(map(str, indices)))


@given(
    st.one_of(st.text(max_size=8), st.integers(-9, 20), st.lists(st.integers(-2, 9), max_size=4), st.floats())
)
def test_whatever_is_given_the_answer_is_devices_that_exist_or_our_error(devices: Any) -> None:
    for inventory in (EIGHT, ODD):
        chosen: tuple[int, ...] = ()
        with contextlib.suppress(DevicesError):
            chosen, _ = choose(devices, inventory, "unit")
        assert set(chosen) <= set(inventory.indices)
        assert len(set(chosen)) == len(chosen)
