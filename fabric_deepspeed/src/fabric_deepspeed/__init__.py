"""DeepSpeed's ZeRO strategies as a plugin of fabric-core.

Nothing works yet, so nothing is registered: see `fabric_deepspeed.hooks`.
"""
