"""Training in simulated 8-bit floating point, as a plugin of fabric-core."""
