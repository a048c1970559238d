"""What this distribution offers. Data only."""

from collections.abc import Iterator

from fabric_core import ClusterEnvironmentSpec, CommandSpec, hookimpl

ACME = ClusterEnvironmentSpec(
    "acme",
    "fabric_acme_cluster.environment:MyCluster",
    detect="fabric_acme_cluster.environment:detect",
    priority=55,
    description="processes started by Acme's scheduler, as its job file says",
)


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """Jobs of Acme's scheduler."""
    yield ACME


@hookimpl
def fabric_cli_commands() -> Iterator[CommandSpec]:
    """``fabric acme …``."""
    yield CommandSpec("acme", "fabric_acme_cluster.commands:acme", help="Look at a job of Acme's scheduler.")
