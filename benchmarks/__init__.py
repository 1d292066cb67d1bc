"""Speed and quality beside PyTorch: ``python -m benchmarks --help``."""
