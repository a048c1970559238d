"""The checks of strategies, by what they are about. Authors meet them in `fabric_core.testing.strategy`."""
