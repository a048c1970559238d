"""The registry: which parts the installed distributions offer, by name."""

from fabric_core.registry.registry import Offer, Problem, Registry, default_registry

__all__ = ["Offer", "Problem", "Registry", "default_registry"]
