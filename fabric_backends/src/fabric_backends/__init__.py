"""Everything that stock PyTorch can do, as plugins: strategies, precisions, environments, launchers, devices."""
