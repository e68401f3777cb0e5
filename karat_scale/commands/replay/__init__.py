"""`karat replay`: a training step again, with a look at every tensor in it."""
