"""The fixtures that build small engines."""

from tests.small_engines import make_checkpoints, make_engine, small_recipe

__all__ = ["make_checkpoints", "make_engine", "small_recipe"]
