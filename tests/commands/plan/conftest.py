"""A small recipe on synthetic data."""

from tests.small_engines import small_recipe

__all__ = ["small_recipe"]
