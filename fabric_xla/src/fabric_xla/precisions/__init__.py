"""The precisions of the XLA strategies, one file each."""
