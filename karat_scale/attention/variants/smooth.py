"""KArAt whose functions and projector vary smoothly over the image."""

import torch
from torch import Tensor, nn

from karat_scale.attention.call import compute_dtype, full_precision
from karat_scale.attention.functional import fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.operator import FourierHeads, FourierKaratOperator, plain_operator
from karat_scale.attention.softmax import smooth_modes


def mode_columns(tokens: int, count: int) -> Tensor:
    """M [N, K], float64: orthonormal columns. Raises ValueError when there are fewer than K modes."""
    if count > tokens:
        raise ValueError(f"modes = {count} is more than N = {tokens} tokens")
    constant = torch.full((tokens, 1), tokens**-0.5, dtype=torch.float64, device="cpu")
    return torch.cat((constant, smooth_modes(tokens, count - 1)), 1)


class SmoothOperator(FourierHeads):
    """The modular Fourier operator with coefficients and W expanded from K modes of the patch grid.

    a_pqm = sum_j M_qj c_pjm and W = M w. The orthonormal columns of M [N, K] are the constant, class and register
    tokens, and the lowest frequencies of the cosine transform over the grid. Ours, not the paper's: N / K times fewer
    parameters.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        rank: r.
        grid: G.
        modes: K.
        implementation: as in `fourier_karat_attention`.
        device, dtype: of `cos_modes` and `sin_modes` [h, r, K, G] and `proj_modes` [h, K, r].

    Raises ValueError when there are fewer than K modes.
    """

    modes: Tensor

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        rank: int = 12,
        grid: int = 3,
        modes: int = 16,
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens, self.num_heads, self.rank, self.grid = num_tokens, num_heads, rank, grid
        self.num_modes, self.implementation = modes, implementation
        columns = mode_columns(num_tokens, modes)
        kept = torch.get_default_dtype() if dtype is None else dtype
        # In checkpoints too, where it shows N.
        where = torch.get_default_device() if device is None else device
        self.register_buffer("modes", columns.to(where, kept))

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.cos_modes = room(num_heads, rank, modes, grid)
        self.sin_modes = room(num_heads, rank, modes, grid)
        self.proj_modes = room(num_heads, modes, rank)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, with the variance of H and O that the plain operator starts with."""
        # A row of M has a mean square of 1 / N, so K modes give K / N of a mode's variance.
        share = (self.num_tokens / self.num_modes) ** 0.5
        for coef in (self.cos_modes, self.sin_modes):
            nn.init.normal_(coef, std=share * (self.num_tokens * self.grid) ** -0.5)
        nn.init.normal_(self.proj_modes, std=share * (self.num_tokens * self.rank) ** -0.5)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `fourier_karat_attention`."""
        more = {"bias": bias, "mask": mask, "implementation": self.implementation}
        return fourier_karat_attention(query, key, value, *self._expanded(), **more)  # type: ignore[arg-type]

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        more = {"bias": bias, "mask": mask, "implementation": self.implementation}
        return fourier_karat_scores(query, key, None, *self._expanded(), **more)  # type: ignore[arg-type]

    @torch.no_grad()
    def plain(self) -> FourierKaratOperator:
        """Return the plain operator that computes the same."""
        return plain_operator(*self._expanded())

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return (
            f"num_tokens={self.num_tokens}, num_heads={self.num_heads}, rank={self.rank}, grid={self.grid}, "
            f"modes={self.num_modes}, implementation={self.implementation!r}"
        )

    def _expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """cos_coef and sin_coef [h, r, N, G], and W [h, N, r]."""
        kept = self.cos_modes, self.sin_modes, self.proj_modes
        dtype = compute_dtype(*kept)
        with full_precision(self.modes.device):
            modes, cos, sin, proj = (x.to(dtype) for x in (self.modes, *kept))
            cos, sin = (torch.einsum("qj,hpjm->hpqm", modes, x) for x in (cos, sin))
            return cos, sin, modes @ proj
