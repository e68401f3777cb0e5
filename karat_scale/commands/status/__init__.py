"""Runs as jobs of a cluster: what they are doing, and which rank hangs."""
