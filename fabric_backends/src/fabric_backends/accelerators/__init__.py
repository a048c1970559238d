"""The accelerators of this distribution, one file each."""
