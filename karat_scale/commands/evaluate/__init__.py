"""Evaluate a trained classifier on labelled images: its own validation split and other test sets."""
