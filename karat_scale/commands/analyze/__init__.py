"""Analyse what attention learned: the paper's five analyses (arXiv 2503.10632, section 5), more, and a report."""
