"""Put KArAt into any timm ViT in five lines, and then train one step."""

from typing import Any

import timm
import torch

from karat_scale.models.vit import attention_class
from karat_scale.recipe import AttentionConfig

# The five lines.
settings = AttentionConfig(kind="karat", grid=3, rank=12)
host: Any = timm.create_model("vit_tiny_patch16_224", num_classes=10)
num_tokens = host.patch_embed.num_patches + host.num_prefix_tokens
vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=10, attn_layer=attention_class(settings, num_tokens))
print(vit.blocks[0].attn.operator)

images, labels = torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4])
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
for step in range(3):
    loss = torch.nn.functional.cross_entropy(vit(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
