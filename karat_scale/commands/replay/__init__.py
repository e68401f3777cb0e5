"""`karat replay` and `karat verify`: a part of a run again, with a look at every tensor, or compared with the run."""
