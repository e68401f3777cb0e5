"""`karat show` and `karat data`: look at the batches of a recipe and at a data set before training."""
