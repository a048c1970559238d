"""``fabric acme …``. Imported when it is called."""

import click

from fabric_acme_cluster.environment import MyCluster


@click.group()
def acme() -> None:
    """Look at a job of Acme's scheduler."""


@acme.command()
def job() -> None:
    """Show the job of this process as the plugin reads it."""
    me = MyCluster()
    click.echo(f"nodes       {', '.join(me.job.nodes)}, with {me.job.processes_per_node} process(es) each")
    click.echo(f"ranks meet  at {me.main_address} port {me.main_port}")
    click.echo(f"this is     rank {me.global_rank()} of {me.world_size()}, on node {me.node_rank()}")
