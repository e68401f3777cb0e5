"""Checkpoints: complete and hashed or not there, on any number of ranks, and the weights out of them."""
