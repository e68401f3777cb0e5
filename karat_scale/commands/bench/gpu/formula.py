"""KArAt's equations in plain PyTorch, with autograd's derivatives: an oracle that shares no line with the package.

FlexAttention cannot be one: it changes scores one by one before a softmax, and here there is none.
"""

import torch
from torch import Tensor
from torch.nn import functional

BASE_FUNCTIONS = {"identity": lambda x: x, "silu": functional.silu, "gelu": functional.gelu}


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    base: str = "zero",
    psi_constant: Tensor | None = None,
    psi_cos: Tensor | None = None,
    psi_sin: Tensor | None = None,
) -> Tensor:
    """O = H (W^T V) with H[k, p] = sum_q phi_pq(A[k, q]) (arXiv 2503.10632, section 4), as matrix products.

    Shapes and meanings are those of `fourier_karat_attention`; the dtype is that of the arguments, float64 here.
    With psi, a constant and coefficients for each head, psi(A) V / N is added: the content form.
    """
    scores = torch.einsum("bhkd,bhqd->bhkq", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    hidden = scores.new_zeros(())
    for order in range(1, cos_coef.shape[-1] + 1):
        rotation = torch.polar(torch.ones_like(scores), order * scores)
        # Re((a - ib) e^(imx)) = a cos(mx) + b sin(mx)
        coef = torch.complex(cos_coef[..., order - 1], -sin_coef[..., order - 1])
        rotation = rotation if mask is None else rotation * mask
        hidden = hidden + (rotation @ coef.mT).real
    if base != "zero":
        activated = BASE_FUNCTIONS[base](scores)
        activated = activated if mask is None else activated * mask
        hidden = hidden + activated.sum(-1, keepdim=True)
    output: Tensor = hidden @ (proj.mT @ value) if mask is None else ((hidden @ proj.mT) * mask) @ value
    if psi_constant is None or psi_cos is None or psi_sin is None:
        return output
    learned = psi_constant[:, None, None].expand_as(scores)
    for order in range(1, psi_cos.shape[-1] + 1):
        cos, sin = (coef[:, order - 1, None, None] for coef in (psi_cos, psi_sin))
        learned = learned + cos * torch.cos(order * scores) + sin * torch.sin(order * scores)
    return output + learned @ value / key.shape[-2]
