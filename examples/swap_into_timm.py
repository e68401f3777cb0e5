"""Put KArAt into a trained timm ViT without changing what it computes, and then fine-tune it.

python examples/swap_into_timm.py            downloads timm's weights
python examples/swap_into_timm.py --random   starts from random weights instead
"""

import sys
from typing import Any

import timm
import torch

from karat_scale.models import swap_attention
from karat_scale.recipe import AttentionConfig

torch.manual_seed(0)
trained = "--random" not in sys.argv
vit: Any = timm.create_model("vit_tiny_patch16_224", pretrained=trained, num_classes=10).eval()
images, labels = torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4])
with torch.no_grad():
    before = vit(images)

# S = softmax(A) plus a gate of each head times KArAt's S. The gates start at 0, so nothing changes yet.
swap_attention(vit, AttentionConfig(kind="karat", residual=True, grid=3, rank=12))
print(vit.blocks[0].attn.operator)
with torch.no_grad():
    print(f"largest change of a logit: {(vit(images) - before).abs().max():.1e}")

optimizer = torch.optim.AdamW(vit.train().parameters(), lr=1e-3)
for step in range(3):
    loss = torch.nn.functional.cross_entropy(vit(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
