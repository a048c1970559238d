"""What strategies have in common whose ranks work on one batch in groups, and on different batches between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from torch.distributed.device_mesh import DeviceMesh

from fabric_backends.alike import check_alike, share_random_state
from fabric_backends.meshes import DATA, Size, axis_sizes, make_mesh
from fabric_backends.sharding.grid import forget_groups
from fabric_backends.strategies.parallel import ParallelStrategy
from fabric_core.contracts.strategy import Surroundings
from fabric_core.errors import SetupError


class GroupedStrategy(ParallelStrategy):
    """The ranks as a grid of two axes: between groups, data are split; within one, all ranks read the same.

    To be put in front of another base. A subclass calls `ask_for` in its constructor.
    """

    axis: ClassVar[str]
    """The axis of the mesh along which the ranks of a group lie."""

    _grid: DeviceMesh | None = None

    def ask_for(self, data_parallel_size: Size, group_size: Size) -> None:
        """Say how many groups there should be, and of how many ranks; see `axis_sizes`."""
        self._asked_sizes: dict[str, Size] = {DATA: data_parallel_size, self.axis: group_size}
        self._sizes: dict[str, int] = {}

    # -- who am I -------------------------------------------------------------------------------------------------

    def attach(self, surroundings: Surroundings) -> None:
        """As the contract.

        Raises:
            OptionsError: The sizes of the axes do not make the number of processes.
        """
        super().attach(surroundings)
        self._sizes = axis_sizes(self._asked_sizes, self.world_size, surroundings.num_nodes)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks as a grid with the axes ``"data_parallel"`` and `axis`; either may be 1 long.

        Raises:
            SetupError: The ranks have not joined yet.
        """
        if self._grid is None:
            raise SetupError(
                "The mesh is there once the processes have joined. Call fabric.launch() first, and any verb of setting "
                "up (such as setup or barrier)."
            )
        return self._grid

    @property
    def group_size(self) -> int:
        """How many ranks a group has."""
        return self._sizes[self.axis]

    @property
    def group(self) -> Any:
        """The process group of this rank's group."""
        return self.mesh[self.axis].get_group()

    @property
    def sampler_arguments(self) -> dict[str, int]:
        """Data is split between the groups only: within one, all ranks read the same."""
        return {"num_replicas": self._sizes[DATA], "rank": self.global_rank // self.group_size}

    # -- coming and going -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the other ranks and make the mesh. Called on every rank, once. Errors as in `ParallelStrategy`."""
        super().connect()
        self._grid = make_mesh(self.root_device, self._sizes)
        self.afterwards(partial(forget_groups, self._grid))

    def teardown(self) -> None:
        """Leave the process group. Called on every rank; safe to call twice."""
        super().teardown()
        self._grid = None

    # -- batches --------------------------------------------------------------------------------------------------

    def move_batches(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """As the contract. Each loop begins with the same random numbers on all ranks of a group.

        Raises:
            SetupError: The ranks of a group read different batches; from the first ``next`` of the loop.
        """
        there = super().move_batches(batches, move)
        if self.group_size == 1:
            return there
        share_random_state(self.group, self.root_device)
        return check_alike(there, self.group, self.root_device)
