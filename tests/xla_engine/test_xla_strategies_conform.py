"""The strategies of this distribution, through the kit that we give to others: one process with one device of XLA."""

from __future__ import annotations

from fabric_core.testing import StrategyConformance

ONE_DEVICE = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}
OWN_DEVICE = {
    "test_the_root_device_is_that_of_the_local_rank": "each of several processes sees one device, and asks XLA for it"
}


class TestSingleXLA(StrategyConformance):
    name = "single_xla"
    accelerator = "tpu"
    precisions = ("32-true", "bf16-mixed")
    environ = ONE_DEVICE


class TestXLA(StrategyConformance):
    name = "xla"
    accelerator = "tpu"
    precisions = ("32-true",)
    processes = 1
    environ = ONE_DEVICE
    expected_failures = OWN_DEVICE


class TestXLAFSDP(StrategyConformance):
    name = "xla_fsdp"
    accelerator = "tpu"
    precisions = ("32-true",)
    processes = 1
    environ = ONE_DEVICE
    expected_failures = OWN_DEVICE


class TestXLASPMD(StrategyConformance):
    name = "xla_spmd"
    accelerator = "tpu"
    precisions = ("32-true",)
    environ = ONE_DEVICE
    expected_failures = {
        "test_closing_leaves_the_environment_variables_as_they_were": "XLA notes in one that SPMD mode is on, for good"
    }
