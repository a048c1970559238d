"""DeepSpeed's ZeRO strategies as a plugin of fabric-core. See `fabric_deepspeed.hooks` for what it offers."""
