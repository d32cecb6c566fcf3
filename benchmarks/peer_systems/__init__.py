"""The systems that benchmarks/peers.py compares, and how each is run."""
