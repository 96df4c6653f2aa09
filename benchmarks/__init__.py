"""Speeds and memory, measured beside named peers: `python -m benchmarks.train_step --help` and so on (README.md)."""
