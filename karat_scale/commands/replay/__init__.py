"""`karat replay` and `karat verify`: train a part of a run again, and look at every tensor or compare with the run."""
