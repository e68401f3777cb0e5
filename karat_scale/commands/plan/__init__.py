"""Answers before a job is submitted: does it fit, which stage and micro batch, how long, and what is wrong with it."""
