"""DeepSpeed's engine: its configuration, its private corners, and which element lies on which rank."""
