"""One small file per family: what its `config.json` means."""
