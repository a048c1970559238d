"""The accelerator of this distribution, and what it knows of the devices."""
