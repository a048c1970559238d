"""What a training reads: collections of tensors, seeds, samplers and loaders."""
