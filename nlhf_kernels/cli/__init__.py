"""The command `nlhf-kernels`."""
