"""Kernels, each beside a plain path that means the same."""
