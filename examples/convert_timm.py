"""Replace the softmax of a trained timm ViT by KArAt, matched on your own images, in Python alone.

python examples/convert_timm.py            downloads timm's weights
python examples/convert_timm.py --random   has random weights instead

`karat convert` does the same as a run, and trains the whole model afterwards (docs/convert.md).
"""

import sys
from typing import Any

import timm
import torch

from karat_scale.models import swap_attention
from karat_scale.models.matching import Conversion, descend, errors, solve
from karat_scale.recipe import AttentionConfig

torch.manual_seed(0)
trained = "--random" not in sys.argv
vit: Any = timm.create_model("vit_tiny_patch16_224", pretrained=trained, img_size=64, num_classes=10).eval()
images = torch.randn(48, 3, 64, 64)  # yours, normalised as the model knows them; labels are not needed
with torch.no_grad():
    before = vit(images)

# New attention in the last four blocks. None: the original's is softmax.
last = {f"{number}": {"kind": "karat", "bound": 3.14} for number in range(8, 12)}
swap_attention(vit, AttentionConfig(blocks=last), image_size=64)
conversion = Conversion(vit, dict.fromkeys(range(8, 12)))
conversion.use(())  # the original's attention everywhere, as the matching needs it


def show(when: str) -> None:
    """Print how much of its output O each block misses."""
    missed = errors(conversion, conversion.blocks, images)
    print(f"{when}: " + ", ".join(f"block {block} {sum(heads) / len(heads):.3f}" for block, heads in missed.items()))


show("at once")
for block in conversion.blocks:
    calls = conversion.calls(images, [block])
    solve(conversion.new[block], [calls[block]], rounds=1)
show("after least squares")
descend(conversion, conversion.blocks, [images] * 20, steps=20, lr=1e-3, of_scores=0.0, on_step=lambda step: None)
show("after gradient descent")

conversion.use(conversion.blocks)
with torch.no_grad():
    print(f"largest change of a logit: {(vit(images) - before).abs().max():.1e} of {before.abs().max():.1e}")
