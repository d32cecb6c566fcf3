"""The sections of benchmarks/paper.py, one module each."""
