"""What this machine has for training, and which part of it bounds a recipe: `karat doctor`."""
