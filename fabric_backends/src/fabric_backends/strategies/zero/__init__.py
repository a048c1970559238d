"""Optimizers of which each rank steps a part, and keeps the state of that part only (the first stages of ZeRO)."""
