"""KArAt with bounded scores and a bounded S."""

import math

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from karat_scale.attention.bases import initialise_projector
from karat_scale.attention.call import FourierCall
from karat_scale.attention.functional import fourier_karat_units
from karat_scale.attention.heads import FourierHeads
from karat_scale.attention.operator import FourierKaratOperator, plain_operator
from karat_scale.attention.precision import compute_dtype, full_precision, output_dtype

_SMALLEST = 1e-12


class BoundedOperator(FourierHeads):
    """The modular Fourier operator on A = tau cos(q, k), with the units of H normalised over the tokens.

    Ours, not the paper's. With tau = pi sigmoid(t) <= pi no score leaves one period of the series. H[:, p] becomes
    gamma_p H[:, p] / rms(H[:, p]), so the Frobenius norm of S is at most sqrt(N) |gamma| |W|. A coefficient of order m
    starts at N(0, 1 / (N m^4)) and is stored times m. So it learns about m times more slowly than one of order 1, and
    AdamW's weight decay, which shrinks all orders alike, weighs about m times more beside what it learns. (A penalty in
    the loss would be m^2 (a_m^2 + b_m^2).)

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        rank: r.
        grid: G.
        implementation: as in `fourier_karat_attention`.
        device, dtype: of `cos_coef` and `sin_coef` [h, r, N, G], `proj` W [h, N, r], `gamma` [h, r] and `temperature`
            t [h].

    Raises ValueError when the rank is larger than N.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        rank: int = 12,
        grid: int = 3,
        implementation: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank > num_tokens:
            raise ValueError(f"rank = {rank} is more than N = {num_tokens} tokens; use at most {num_tokens}")
        self.num_tokens, self.num_heads, self.rank, self.grid = num_tokens, num_heads, rank, grid
        self.implementation = implementation

        def room(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.cos_coef = room(num_heads, rank, num_tokens, grid)
        self.sin_coef = room(num_heads, rank, num_tokens, grid)
        self.proj = room(num_heads, num_tokens, rank)
        self.gamma = room(num_heads, rank)
        self.temperature = room(num_heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again; tau starts at pi / 2 and gamma at 1."""
        for coef in (self.cos_coef, self.sin_coef):
            nn.init.normal_(coef, std=self.num_tokens**-0.5)
            coef.div_(self._orders(coef))
        initialise_projector(self.proj, "variance_preserving")
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.temperature)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """O [B, h, N, d] of query, key and value [B, h, N, d]; bias and mask as in `fourier_karat_attention`."""
        hidden = self._hidden(query, key, bias, mask)
        with full_precision(value.device):
            v, proj = value.to(hidden.dtype), self.proj.to(hidden.dtype)
            output = hidden @ (proj.mT @ v) if mask is None else (hidden @ proj.mT * mask) @ v
        return output.to(output_dtype(value))

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """S [B, h, N, N]."""
        hidden = self._hidden(query, key, bias, mask)
        with full_precision(query.device):
            learned = hidden @ self.proj.to(hidden.dtype).mT
        return (learned if mask is None else learned * mask).to(output_dtype(query))

    def bounded(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key [B, h, N, d] whose scores, divided by sqrt(d) as all are, are tau cos(q, k)."""
        dtype = compute_dtype(query, key, self.cos_coef)
        with full_precision(query.device):
            tau = math.pi * self.temperature.to(dtype).sigmoid()
            q = _scaled(query.to(dtype), (tau * query.shape[-1] ** 0.5)[:, None, None])
            k = _scaled(key.to(dtype), 1)
        return q.to(query.dtype), k.to(query.dtype)

    @torch.no_grad()
    def plain(self) -> FourierKaratOperator:
        """Return a plain operator with the same functions phi of the bounded scores; its H is not normalised."""
        return plain_operator(*self._series(self.cos_coef.dtype), self.proj)

    def extra_repr(self) -> str:
        """The settings, in the constructor's names."""
        return (
            f"num_tokens={self.num_tokens}, num_heads={self.num_heads}, rank={self.rank}, grid={self.grid}, "
            f"implementation={self.implementation!r}"
        )

    def _call(self, width: int, device: torch.device, biased: bool, masked: bool) -> FourierCall:
        call = super()._call(width, device, biased, masked)
        return call._replace(value=call.value.new_empty(*call.value.shape[:-1], self.rank))  # of H, not of O

    def _hidden(self, query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """H [B, h, N, r], normalised; float32, or float64 where an input is."""
        dtype = compute_dtype(query, key, self.cos_coef)
        heads = self.bounded(query, key)
        with full_precision(query.device):
            more = {"bias": bias, "mask": mask, "implementation": self.implementation}
            hidden = fourier_karat_units(*heads, *self._series(dtype), **more).to(dtype)  # type: ignore[arg-type]
            size = hidden.square().mean(2, keepdim=True).add(torch.finfo(dtype).eps).rsqrt()
            return hidden * size * self.gamma.to(dtype)[:, None]

    def _series(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The series' cosines and sines [h, r, N, G]; they are stored times their order."""
        orders = self._orders(self.cos_coef).to(dtype)
        return self.cos_coef.to(dtype) / orders, self.sin_coef.to(dtype) / orders

    def _orders(self, like: Tensor) -> Tensor:
        return torch.arange(1, self.grid + 1, device=like.device, dtype=like.dtype)


def _scaled(heads: Tensor, length: Tensor | int) -> Tensor:
    """Tokens [B, h, N, d] of a length, 0 where they are 0; with fewer passes over them than `normalize` makes."""
    factor: Tensor = length / vector_norm(heads, dim=-1, keepdim=True).clamp_min(_SMALLEST)
    return heads * factor
