"""The launchers of this distribution, one file each."""
