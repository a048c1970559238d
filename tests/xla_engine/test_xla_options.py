"""What the XLA strategies declare as their options is what they, and torch_xla behind them, take."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

from fabric_core import OptionsError
from fabric_core.resolve.declared import declared_options
from fabric_core.targets import import_target
from fabric_xla.hooks import STRATEGIES, XLA_FSDP
from fabric_xla.options import XLAFSDPOptions
from fabric_xla.strategies import xla_fsdp
from fabric_xla.strategies.xla_fsdp import XLAFSDPStrategy
from fabric_xla.strategies.xla_spmd import XLASPMDStrategy


def test_sharding_declares_all_that_torch_xla_leaves_to_users() -> None:
    theirs = inspect.signature(XlaFullyShardedDataParallel).parameters
    left = xla_fsdp._PARAMETERS - xla_fsdp._DECIDED_HERE
    own = {"activation_checkpointing", "checkpoint", "sync_module_states"}
    declared: dict[str, Any] = {each.name: each.default for each in fields(XLAFSDPOptions)}
    assert set(declared) == left | own
    assert {name: declared[name] for name in left} == {name: theirs[name].default for name in left}


def test_sharding_takes_each_that_it_declares() -> None:
    declared = declared_options(XLA_FSDP) or {}
    defaults = {name: option.default for name, option in declared.items()}
    XLAFSDPStrategy(**defaults)
    with pytest.raises(OptionsError, match="no_such_option"):
        XLAFSDPStrategy(**defaults, no_such_option=1)


@pytest.mark.parametrize("spec", STRATEGIES, ids=[spec.name for spec in STRATEGIES])
def test_every_strategy_is_made_from_what_it_declares(spec: Any) -> None:
    declared = declared_options(spec) or {}
    cls = import_target(spec.target, spec.name)
    signature = inspect.signature(cls).parameters
    for name, option in declared.items():
        assert name in signature or cls is XLAFSDPStrategy
        if name in signature:
            assert signature[name].default == option.default


def test_a_mesh_of_a_file_and_of_the_command_line_is_one() -> None:
    form = (declared_options(XLASPMDStrategy.spec) or {})["mesh_shape"].form
    assert (
        form.read('{"data": 2, "model": -1}')
        == form.load({"data": 2, "model": -1})
        == {"data": 2, "model": -1}
    )
    XLASPMDStrategy(mesh_shape=form.read('{"data": 2, "model": -1}'))
