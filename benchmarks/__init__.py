"""Benchmarks: what an adapter costs in time and memory, in JAX and in PyTorch."""
