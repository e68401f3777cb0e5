"""The commands of `karat`: a folder or a module for each one, and the parsers of all."""
