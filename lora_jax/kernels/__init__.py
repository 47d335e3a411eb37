"""Pallas kernels, each beside the plain XLA that it must equal."""
