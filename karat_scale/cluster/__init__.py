"""Runs as jobs of a cluster: submit them, show their progress, and detect a rank that hangs."""
