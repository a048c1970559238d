"""From a request to a plan: a pure function of the flags, the specs and what the probes find.

It imports no PyTorch and no part, except where a request names a class by its path. It knows no part by name but the
core's own reference parts.
"""

from fabric_core.resolve.resolve import resolve

__all__ = ["resolve"]
