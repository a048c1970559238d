"""As in torch_xla."""
