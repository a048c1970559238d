"""The reference parts: with them alone, the core trains on a CPU. They are registered like everybody else's."""
