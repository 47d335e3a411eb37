"""Data: sources, formats, templates with loss masks, packing, batches."""
