"""A device of its own for PyTorch, simulated on the CPU, as a plugin of fabric-core."""
