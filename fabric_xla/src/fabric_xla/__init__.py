"""TPU and XLA devices as a plugin of fabric-core. What it offers is in `fabric_xla.hooks`."""
