"""The tasks that a run can train: forward pass, losses and scores of each."""
