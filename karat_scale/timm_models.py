"""Import this and timm knows `karat`. Exported models and their users name this place; see `models/timm_models.py`."""

import karat_scale.models.timm_models  # noqa: F401
