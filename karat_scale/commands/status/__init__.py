"""`karat status`: what a run is doing, and which rank the others wait for."""
