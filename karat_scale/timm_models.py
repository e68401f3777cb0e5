"""Importing this module registers `karat` with timm. Exported models name it; see `models/timm_models.py`."""

import karat_scale.models.timm_models  # noqa: F401
