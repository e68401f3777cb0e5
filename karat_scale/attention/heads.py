"""What replaces softmax in an attention layer, and what the rest of the project asks it."""

import torch
from torch import Tensor, nn

from karat_scale.attention import functional
from karat_scale.attention.bases import Fourier
from karat_scale.attention.call import FourierCall
from karat_scale.attention.flops import karat_flops


class AttentionHeads(nn.Module):
    """Computes O = S V from query, key and value [B, h, N, d] of `num_heads` heads, with the optional bias and mask.

    `forward(query, key, value, bias, mask)` is every subclass's own.
    """

    num_heads: int

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the learned attention S [B, h, N, N], for analysis."""
        raise NotImplementedError

    def function_of_score(self, scores: Tensor) -> Tensor | None:
        """Return what each head makes of each score alone [..., h, n, N], of scores [..., h, n, N]; None by default."""
        return None

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """Return the operations of a forward pass on one item of N tokens and heads of width d, as the equations need.

        A multiply-add is two. Elementwise work does not count, as is usual for MFU; a function with K coefficients
        counts as K multiply-adds per evaluation. masked: pairs are masked, so that S is needed.
        """
        raise NotImplementedError

    def refusal(self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False) -> str | None:
        """Return why the requested implementation cannot run on a device with heads of this width; None if it can.

        biased, masked: whether the layer gives a bias and a mask.
        """
        return None

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """Return the implementation that runs, and why "auto" did not choose the device's own kernels, or None.

        The arguments are those of `refusal`, which must have returned None. Those that have no choice run by "PyTorch".
        """
        return "PyTorch", None


class FourierHeads(AttentionHeads):
    """Heads that call the modular Fourier operator, which has kernels. Subclasses set these sizes and choices."""

    num_tokens: int
    rank: int
    grid: int
    base = "zero"
    implementation: str

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        sizes = self.num_heads, self.rank, tokens, width
        return karat_flops(Fourier(self.grid), "modular", *sizes, masked=masked)

    def refusal(self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False) -> str | None:
        """See `AttentionHeads`."""
        return functional.refusal(self.implementation, self._call(width, device, biased, masked))

    def chosen(
        self, width: int, device: torch.device, *, biased: bool = False, masked: bool = False
    ) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        if self.implementation != "auto":
            return self.implementation, None
        call = self._call(width, device, biased, masked)
        return functional.automatic(call), functional.refusal(functional.KERNELS_OF.get(device.type, "auto"), call)

    def _call(self, width: int, device: torch.device, biased: bool, masked: bool) -> FourierCall:
        """A call of the shapes that the layer makes."""

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        head = room(1, self.num_heads, self.num_tokens, width)
        coef = room(self.num_heads, self.rank, self.num_tokens, self.grid)
        proj = room(self.num_heads, self.num_tokens, self.rank)
        pairs = room(self.num_tokens, self.num_tokens)
        bias, mask = pairs if biased else None, pairs == 0 if masked else None
        return FourierCall(head, head, head, coef, coef, proj, self.base, bias, mask)
