"""The strategies of this distribution, one file each."""
