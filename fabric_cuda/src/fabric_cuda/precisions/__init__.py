"""The precisions of this distribution, one file each."""
