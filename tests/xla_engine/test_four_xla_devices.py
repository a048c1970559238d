"""Four XLA devices in one program: numbers, how tensors lie on the mesh, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

COMPARED = (
    "data_parallel",
    "tensor_parallel",
    "tensor_parallel_by_hand",
    "partition_by_function",
    "fully_sharded",
    "data_and_fully_sharded",
)
OVER_FOUR = "{devices=[4,1]0,1,2,3}"
ROWS_OVER_MODEL = "{devices=[2,1,2]0,2,1,3 last_tile_dim_replicate}"
COLUMNS_OVER_MODEL = "{devices=[1,2,2]0,2,1,3 last_tile_dim_replicate}"


@pytest.fixture(scope="module")
def found(answers: Callable[..., Any]) -> dict[str, Any]:
    """What ``programs/spmd.py`` found."""
    return answers("spmd", devices=4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", COMPARED)
def test_training_equals_the_plain_loop_also_with_a_short_batch(found: dict[str, Any], way: str) -> None:
    assert found[way]["losses"] <= 1e-6
    assert found[way]["parameters"] <= 1e-6
    assert found[way]["keys"], "the keys of the state dict are those of the user's model"
    assert found[way]["sizes"] == [1, 0, 4], "one rank, four devices"


@pytest.mark.parametrize("way", COMPARED)
def test_what_is_loaded_is_what_was_saved(found: dict[str, Any], way: str) -> None:
    assert found[way]["loaded"] == 0.0


@pytest.mark.parametrize("way", COMPARED)
def test_what_is_saved_beside_the_training_is_what_was_there(found: dict[str, Any], way: str) -> None:
    assert found[way]["beside"]


def test_what_is_divided_is_written_as_it_lies_on_the_devices(found: dict[str, Any]) -> None:
    assert found["data_parallel"]["file"], "nothing is divided"
    assert found["tensor_parallel"]["shards"] == [[8, 6], [8, 6]]
    assert found["tensor_parallel_by_hand"]["shards"] == [[4, 6]] * 4
    assert found["fully_sharded"]["shards"] == [[4, 6]] * 4
    assert not any(found[way]["file"] for way in COMPARED[1:])


def test_a_resumed_training_is_bit_for_bit_one_that_was_never_interrupted(found: dict[str, Any]) -> None:
    assert found["resumed"]["differences"] == {"saved": [], "3": [], "4": [], "5": []}
    assert found["resumed"]["steps"] == {"saved": 8, "3": 5, "4": 4, "5": 3}


def test_parameters_lie_as_the_options_say(found: dict[str, Any]) -> None:
    assert set(found["data_parallel"]["divided"]) == {"{replicated}"}
    assert found["tensor_parallel"]["divided"][::2] == [ROWS_OVER_MODEL, COLUMNS_OVER_MODEL]
    assert found["tensor_parallel_by_hand"]["divided"][0] == OVER_FOUR
    assert found["partition_by_function"]["divided"][::2] == [ROWS_OVER_MODEL] * 2
    assert found["fully_sharded"]["divided"][0] == OVER_FOUR
    assert found["data_and_fully_sharded"]["divided"][::2] == [ROWS_OVER_MODEL, COLUMNS_OVER_MODEL]


def test_the_optimizer_state_lies_as_its_parameter(found: dict[str, Any]) -> None:
    for way in COMPARED:
        assert found[way]["state"] == found[way]["divided"][0], way


def test_what_is_divided_stays_so_when_a_checkpoint_is_loaded(found: dict[str, Any]) -> None:
    for way in ("tensor_parallel", "fully_sharded", "data_and_fully_sharded"):
        assert found[way]["after load"][::2] == found[way]["divided"][::2], way


def test_a_mesh_has_the_axes_that_were_asked_for(found: dict[str, Any]) -> None:
    assert found["data_parallel"]["axes"] == {"data": 4}
    assert found["partition_by_function"]["axes"] == {"data": 2, "model": 2}
    assert found["fully_sharded"]["axes"] == {"fsdp": 4}


def test_each_device_gets_its_part_of_a_batch(found: dict[str, Any]) -> None:
    batches = found["batches"]
    assert batches["divided"] == {"x": OVER_FOUR, "y": "{devices=[4]0,1,2,3}"}
    assert batches["values"] == [True, list(range(8)), 3]
    assert batches["scalar"] == [5.0, "xla"]
    assert batches["sum"] == 240.0


def test_no_graph_is_compiled_twice(found: dict[str, Any]) -> None:
    counts = found["compilations"]
    assert counts[2:] == [counts[2]] * 8


def test_random_numbers_of_the_devices_follow_the_seed(found: dict[str, Any]) -> None:
    assert found["seeds"] == [True, False]


def test_the_verbs_between_ranks_answer_for_one(found: dict[str, Any]) -> None:
    assert found["verbs"] == [[[0.0, 1.0, 2.0]], [0.0, 1.0, 2.0], "word"]


def test_holding_gradients_back_warns(found: dict[str, Any]) -> None:
    (warning,) = found["holding_back"]
    assert warning.startswith("The strategy 'xla_spmd' cannot hold back the synchronisation of gradients")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("mesh", "ConfigurationError: The mesh does not fit the devices: data(3) * model(-1) != 4."),
        (
            "shape",
            "OptionsError: The option mesh_shape is {'data': 0}. It takes names of axes and their sizes",
        ),
        ("axis", "OptionsError: The partition of '0.weight' names the axis 'modle'. Did you mean 'model'?"),
        (
            "entries",
            "OptionsError: The partition of '0.bias' is ('model', None). The parameter has the shape (16,)",
        ),
        ("rules", "OptionsError: The option partition is 3. It takes patterns of names"),
        (
            "function",
            "OptionsError: The strategy 'xla_spmd' cannot take parallelize_fn=3 from the code: it has to be ",
        ),
        (
            "policy",
            "OptionsError: The strategy 'xla_spmd' cannot take auto_wrap_policy={3} from the code: it has to ",
        ),
        (
            "option",
            "OptionsError: The strategy 'xla_spmd' has no option 'mesh', which the code states. It has: ",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_error(found: dict[str, Any], option: str, message: str) -> None:
    assert found["errors"][option].startswith(message)


def test_a_pattern_that_fits_nothing_is_told_of(found: dict[str, Any]) -> None:
    (warning,) = found["errors"]["unmatched"]
    assert "No parameter of Sequential fits a pattern of partition={'no.such': ('data',)}" in warning
    assert "They are called 0.weight, 0.bias, 2.weight, 2.bias." in warning


def test_a_process_in_spmd_mode_refuses_the_other_mode(found: dict[str, Any]) -> None:
    told = found["one_process_per_device_afterwards"]
    assert told.startswith("SetupError: This process is in the SPMD mode of torch_xla")
