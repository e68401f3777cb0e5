"""The schema of a recipe, and how a recipe is read. It is checked as a whole before anything is built."""

from karat_scale.recipe.attention import AttentionConfig
from karat_scale.recipe.base import CheckpointConfig, LogConfig, ResumeConfig
from karat_scale.recipe.data import AugmentConfig, DataConfig
from karat_scale.recipe.schema import ModelConfig, Recipe, RunConfig, RunRecipe
from karat_scale.recipe.train import DeepSpeedConfig, OptimConfig, RecomputeConfig, ScheduleConfig, TrainConfig

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
