"""Training: DeepSpeed's engine, the loop around it, checkpoints, and what is reported."""

import os

import torch

# DeepSpeed looks for an accelerator when it is first imported, and warns where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
