"""Runs as jobs of a cluster: submit them, see where they stand, and notice when a rank hangs."""
