"""Shows a run elsewhere: in TensorBoard, W&B, MLflow or trackio, or by your own class."""
