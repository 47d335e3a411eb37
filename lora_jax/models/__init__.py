"""Decoder-only language models: one core, one small file per family."""
