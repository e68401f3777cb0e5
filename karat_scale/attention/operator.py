"""The module that owns what KArAt learns: the coefficients of every unit and the projector W of every head."""

import torch
from torch import Tensor, nn

from karat_scale.attention.bases import BASE_ACTIVATIONS, INITIALISATIONS, initialise_fourier
from karat_scale.attention.checks import check_choice
from karat_scale.attention.functional import IMPLEMENTATIONS, fourier_karat_attention, fourier_karat_scores


class FourierKaratOperator(nn.Module):
    """Fourier-KArAt attention for a fixed number of tokens; (2 G + 1) r N parameters a head.

    One operator to a block is the paper's blockwise mode; one operator given to all blocks is its universal mode.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        rank: r, the width of H.
        grid: G, the number of harmonics.
        base: base activation b(x): "zero", "identity", "silu" or "gelu".
        init: "paper" or "variance_preserving" (see `initialise_fourier`).
        implementation: as in `fourier_karat_attention`.
        device, dtype: of the parameters.

    Raises ValueError when a count is not a positive integer or a name is unknown.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        rank: int = 12,
        grid: int = 3,
        base: str = "zero",
        init: str = "variance_preserving",
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {"num_tokens": num_tokens, "num_heads": num_heads, "rank": rank, "grid": grid}
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} = {count!r}: expected an integer of at least 1")
        check_choice("base", base, BASE_ACTIVATIONS)
        check_choice("init", init, INITIALISATIONS)
        check_choice("implementation", implementation, ("auto", *IMPLEMENTATIONS))
        self.num_tokens, self.num_heads, self.rank, self.grid = num_tokens, num_heads, rank, grid
        self.base, self.init, self.implementation = base, init, implementation
        coefficients = (num_heads, rank, num_tokens, grid)
        self.cos_coef = nn.Parameter(torch.empty(coefficients, device=device, dtype=dtype))
        self.sin_coef = nn.Parameter(torch.empty(coefficients, device=device, dtype=dtype))
        self.proj = nn.Parameter(torch.empty((num_heads, num_tokens, rank), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew by the scheme `init`."""
        initialise_fourier(self.cos_coef, self.sin_coef, self.proj, self.init)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; see `fourier_karat_attention`."""
        return fourier_karat_attention(
            query,
            key,
            value,
            self.cos_coef,
            self.sin_coef,
            self.proj,
            base=self.base,
            bias=bias,
            mask=mask,
            implementation=self.implementation,
        )

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The learned attention S [B, h, N, N]; see `fourier_karat_scores`."""
        return fourier_karat_scores(
            query,
            key,
            None,
            self.cos_coef,
            self.sin_coef,
            self.proj,
            base=self.base,
            bias=bias,
            mask=mask,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return (
            f"num_tokens={self.num_tokens}, num_heads={self.num_heads}, rank={self.rank}, grid={self.grid}, "
            f"base={self.base!r}, init={self.init!r}, implementation={self.implementation!r}"
        )
