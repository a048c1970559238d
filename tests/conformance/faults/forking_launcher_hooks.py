"""What the forking launcher offers; becomes the hooks.py of its package."""

from __future__ import annotations

from collections.abc import Iterator

from fabric_core import LauncherSpec, hookimpl

SPEC = LauncherSpec(
    "sample",
    "fabric_sample.launcher:SampleLauncher",
    interactive=True,
    needs_function=True,
    description="forks this process",
    api=1,
)


@hookimpl
def fabric_launchers() -> Iterator[LauncherSpec]:
    """The launchers of this plugin."""
    yield SPEC
