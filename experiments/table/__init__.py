"""What a sweep showed: `python -m experiments.table`."""
