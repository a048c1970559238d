"""NVIDIA and ROCm devices as a plugin of fabric-core.

Nothing works yet, so nothing is registered: see `fabric_cuda.hooks`.
"""
