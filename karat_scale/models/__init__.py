"""timm models with KArAt attention instead of softmax."""

from karat_scale.models.factory import create_model, no_weight_decay_names, parameter_count, swap_attention

__all__ = ["create_model", "no_weight_decay_names", "parameter_count", "swap_attention"]
