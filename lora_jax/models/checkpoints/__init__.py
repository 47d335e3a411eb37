"""Checkpoints that come quantised: one file a method, a table of them."""
