"""Measurements that only the developers run: `python -m benchmarks.NAME` at the top of a clone."""
