"""How long ranks wait for each other: long until the first step is done, where the device says so, and then not."""

from __future__ import annotations

from typing import Any

# The device pretends: it is the CPU, and says how long its collectives may take, as some accelerators do.
PREAMBLE = """
from fabric_core.parts.cpu import CPUAccelerator

class Impatient(CPUAccelerator):
    process_group_timeout = 1.5

def joined(accelerator, **options):
    strategy = DDPStrategy(**options)
    parts = accelerator, FullPrecision(), LocalEnvironment(), TorchFile()
    strategy.attach(Surroundings(*parts, (torch.device("cpu"),) * world, world, 1))
    strategy.connect()
    return strategy

def step():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=0.1).step()

def late(strategy, seconds, name):
    if rank == 1:
        time.sleep(seconds)
    return error_of(strategy.barrier, name)
"""


def outcomes(programs: Any, text: str) -> list[Any]:
    return programs.answers_of(PREAMBLE + text)


def test_the_time_that_a_device_gives_counts_from_the_first_step_on(shared_programs: Any) -> None:
    for before, after in outcomes(
        shared_programs,
        """
strategy = joined(Impatient(), init_timeout=40)
before = late(strategy, 3, "before any step")
step()
after = late(strategy, 6, "after it")
answer((before, after))
time.sleep(4)  # the store, in which the ranks look for each other, is rank 0's
os._exit(0)
""",
    ):
        assert before is None
        kind, message = after
        missing = kind == "SetupError" and "Not every rank came" in message
        assert missing or "imed out" in message or "onnection" in message


def test_the_users_time_counts_from_the_start_and_without_a_word_it_is_ten_minutes(
    shared_programs: Any,
) -> None:
    found = outcomes(
        shared_programs,
        """
def seconds():
    return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()

times = []
for accelerator, options in (
    (CPUAccelerator(), {"init_timeout": 50}),
    (Impatient(), {"init_timeout": 50}),
    (Impatient(), {"init_timeout": 1}),
    (CPUAccelerator(), {"timeout": 40}),
    (Impatient(), {"timeout": 40}),
):
    strategy = joined(accelerator, **options)
    times.append(seconds())
    if "timeout" not in options:
        strategy.teardown()
step()
answer((times, late(strategy, 3, "later than the device would wait")))
strategy.teardown()
""",
    )
    assert found == [([600.0, 50.0, 1.5, 40.0, 40.0], None)] * 2
