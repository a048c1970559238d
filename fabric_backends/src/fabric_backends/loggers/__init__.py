"""The loggers of this distribution, one file each."""
