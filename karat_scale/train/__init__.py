"""Training: the loop, what it is built from, and how a run starts, stops and ends."""
