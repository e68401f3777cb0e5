"""What a run can train: forward pass, losses and scores of each task."""
