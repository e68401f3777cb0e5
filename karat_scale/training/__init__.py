"""What a training run does from its start to its end."""
