"""Many runs of one study: `python -m experiments.sweep`."""
