"""Our own strategies, through the kit that we give to others.

Every strategy with every precision, and in four processes, is in the matrix (tests/training/test_matrix.py). Here one
precision more than float32 is enough to show that the kit finds the right loop to compare with.
"""

from __future__ import annotations

from pathlib import Path

from fabric_core.testing import StrategyConformance

PROGRAMS = str(Path(__file__).with_name("programs"))
BOTH = ("32-true", "bf16-mixed")
FULL = ("32-true",)


class TestSingleDevice(StrategyConformance):
    name = "single_device"


class TestDDP(StrategyConformance):
    name = "ddp"
    precisions = (*BOTH, "16-mixed")
    world_sizes = (2, 1)


class TestDDPSpawn(StrategyConformance):
    name = "ddp_spawn"
    precisions = FULL


class TestDDPFork(StrategyConformance):
    name = "ddp_fork"
    precisions = FULL


class TestDP(StrategyConformance):
    name = "dp"
    precisions = FULL


class TestShardedDDP(StrategyConformance):
    name = "ddp_sharded"
    options = {"engine": "torch"}
    precisions = BOTH
    world_sizes = (2, 1)


class TestShardedDDPOfFairScale(StrategyConformance):
    name = "ddp_sharded_fairscale"
    precisions = BOTH


class TestFSDP(StrategyConformance):
    name = "fsdp"
    precisions = BOTH
    world_sizes = (2, 1)


class TestFSDPOffload(StrategyConformance):
    name = "fsdp_cpu_offload"
    precisions = FULL


class TestTensorParallel(StrategyConformance):
    name = "tensor_parallel"
    program = "divided_layers"
    environ = {"PYTHONPATH": PROGRAMS}
    precisions = BOTH
    world_sizes = (2, 1)


class TestContextParallel(StrategyConformance):
    name = "context_parallel"
    precisions = FULL


class TestLocalSGD(StrategyConformance):
    name = "local_sgd"
    options = {"warmup_steps": 10**6}
    precisions = BOTH


class TestDeepSpeed(StrategyConformance):
    name = "deepspeed"
    precisions = BOTH
    master_weights = ("bf16-mixed",)


class TestDeepSpeedStage3(StrategyConformance):
    name = "deepspeed_stage_3"
    precisions = BOTH
    expected_failures = {
        "test_closing_leaves_no_thread": "DeepSpeed's stage 3 never frees an engine, nor the threads of its groups"
    }
    master_weights = ("bf16-mixed",)
