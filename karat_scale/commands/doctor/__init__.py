"""`karat doctor`: check a machine for training, and find the stage that limits a recipe's speed on it."""
