"""torch_compile."""
