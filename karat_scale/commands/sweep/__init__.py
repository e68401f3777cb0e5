"""`karat sweep`: trains a recipe for each point of a grid of settings, and compares the runs."""
