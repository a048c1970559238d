"""The environments of this distribution, one file each."""
