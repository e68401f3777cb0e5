"""What a recipe may say, and how one is read: one YAML file, checked whole before anything is built."""

from karat_scale.recipe.attention import AttentionConfig
from karat_scale.recipe.data import AugmentConfig, DataConfig
from karat_scale.recipe.keep import CheckpointConfig, LogConfig, ResumeConfig
from karat_scale.recipe.recompute import RecomputeConfig
from karat_scale.recipe.schema import ModelConfig, Recipe, RunConfig, RunRecipe
from karat_scale.recipe.train import DeepSpeedConfig, OptimConfig, ScheduleConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RecomputeConfig",
    "ResumeConfig",
    "RunConfig",
    "RunRecipe",
    "ScheduleConfig",
    "TrainConfig",
]
