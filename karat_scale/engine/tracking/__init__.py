"""Shows a run elsewhere: in TensorBoard, W&B, MLflow or trackio, or by a class of yours."""
