"""The registry: which parts the installed distributions offer, by name."""

from fabric_core.registry.registry import OWN_DISTRIBUTION, Offer, Problem, Registry, default_registry

__all__ = ["OWN_DISTRIBUTION", "Offer", "Problem", "Registry", "default_registry"]
