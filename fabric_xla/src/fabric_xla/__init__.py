"""TPU and XLA devices as a plugin of fabric-core.

Nothing works yet, so nothing is registered: see `fabric_xla.hooks`.
"""
