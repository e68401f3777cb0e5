"""The modules that replace softmax in an attention layer: KArAt's operator, alone or combined with softmax.

They own KArAt's parameters: those of every unit, and the projector W of every head. `AttentionHeads` is the interface
that the rest of the project uses.

Hybrid heads: softmax on a block's first heads, KArAt on the others (arXiv 2503.10632).

Residual heads: softmax with a learned correction, S = softmax(A) + g S_learned. The gate g of a head starts at 0 or 1.
This is ours, not the paper's: it applies to attention what ReZero (arXiv 2003.04887) applies to a layer.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from karat_scale.attention import functional
from karat_scale.attention.bases import (
    BASE_ACTIVATIONS,
    INITIALISATIONS,
    Basis,
    Fourier,
    Wavelet,
    initialise_projector,
    key_of,
    make_basis,
)
from karat_scale.attention.bases.wavelets import WAV_KAN
from karat_scale.attention.call import FourierCall, check_choice
from karat_scale.attention.forms import (
    FORMS,
    SECOND,
    FormCall,
    Simplex,
    attend_form,
    check_implementation,
    check_simplex,
    form_scores,
    fourier_call,
    has_kernels,
    has_projector,
    karat_flops,
    parameter_shapes,
)
from karat_scale.attention.softmax import softmax_attention, softmax_scores, start_like_softmax


class LayerCall(NamedTuple):
    """A layer's call of its heads: their width d, the device, and whether there are a bias and a mask."""

    width: int
    device: torch.device
    biased: bool = False
    masked: bool = False


class AttentionHeads(nn.Module):
    """Computes O = S V from query, key and value [B, h, N, d] of `num_heads` heads, with the optional bias and mask.

    Every subclass defines `forward(query, key, value, bias, mask)`. The first axis of each parameter is the heads.
    """

    num_heads: int
    implementation = "auto"
    _shown: tuple[str, ...] = ()
    """The settings that `repr` shows."""
    without_kernels = "PyTorch"
    """The name of what runs if `implementation` is "auto" and the heads have no kernels."""
    sees_input = False
    """Whether the heads are `InputHeads`, or wrap such heads."""
    is_linear = True
    """Whether O = S V, with the S of `scores`."""
    multiplies_parameters = True
    """Whether a factor of the products that `flops` counts is a parameter, if the heads have any."""
    token_axes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """The axes of N tokens by parameter: for images of another size, the parameter is interpolated along them."""
    summed_axes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """The axes in `token_axes` over which attention sums, so that twice as many tokens halve the parameter."""

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the learned attention S [B, h, N, N], for analysis: by default the heads' output for V = I."""
        matrix: Tensor = self(query, key, _identity(query), bias, mask)
        return matrix

    @property
    def reach(self) -> float:
        """Return the largest |A| up to which the learned functions tell scores apart; infinity by default."""
        return math.inf

    def bounded(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query and key whose scores q k / sqrt(d) the functions get, for analysis."""
        return query, key

    def function_of_score(self, scores: Tensor) -> Tensor | None:
        """Return each head's function of every single score, for scores [..., h, n, N]; None by default."""
        return None

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """Return the operations of a forward pass on one item of N tokens and heads of width d, as the equations need.

        A multiply-add counts as two. Elementwise work does not count, as is usual for MFU; a function with K
        coefficients counts as K multiply-adds per evaluation. masked: pairs are masked, so that S is needed. Heads
        that do not override this method are counted by what PyTorch runs.
        """
        raise NotImplementedError

    def example(self, layer: LayerCall) -> FourierCall | None:
        """Return a call of the shapes that the layer makes; None if these heads have no kernels."""
        return None

    def refusal(self, layer: LayerCall) -> str | None:
        """Return why the requested implementation cannot run the layer's call; None if it can."""
        call = self.example(layer)
        return None if call is None else functional.refusal(self.implementation, call)

    def chosen(self, layer: LayerCall) -> tuple[str, str | None]:
        """Return the implementation that runs, and why "auto" did not choose the device's own kernels, or None.

        `refusal` must have returned None.
        """
        if self.implementation != "auto":
            return self.implementation, None
        call = self.example(layer)
        if call is None:
            return self.without_kernels, None
        own = functional.KERNELS_OF.get(layer.device.type, "auto")
        return functional.automatic(call), functional.refusal(own, call)

    def extra_repr(self) -> str:
        """Return the settings, with the constructor's names."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)


class InputHeads(AttentionHeads):
    """Heads whose `forward` and `scores` also take the layer's input x [B, N, D], by name."""

    sees_input = True

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionHeads`."""
        matrix: Tensor = self(query, key, _identity(query), bias, mask, x=x)
        return matrix


def _identity(query: Tensor) -> Tensor:
    """The identity [B, h, N, N]."""
    tokens = query.shape[2]
    return torch.eye(tokens, dtype=query.dtype, device=query.device).expand(*query.shape[:2], tokens, tokens)


def layer_input(heads: nn.Module, x: Tensor | None) -> dict[str, Tensor]:
    """Return the argument of heads that see the layer's input x [B, N, D]; none for others."""
    return {"x": x} if x is not None and getattr(heads, "sees_input", False) else {}


class WrappedHeads(AttentionHeads):
    """Heads that change or add to what `operator` computes. Implementation and operations are the operator's."""

    def __init__(self, operator: AttentionHeads) -> None:
        super().__init__()
        self.operator, self.num_heads, self.implementation = operator, operator.num_heads, operator.implementation

    @property
    def reach(self) -> float:
        """See `AttentionHeads`."""
        return self.operator.reach

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        return self.operator.flops(tokens, width, masked)

    def refusal(self, layer: LayerCall) -> str | None:
        """See `AttentionHeads`."""
        return self.operator.refusal(layer)

    def chosen(self, layer: LayerCall) -> tuple[str, str | None]:
        """See `AttentionHeads`."""
        return self.operator.chosen(layer)


class FourierHeads(AttentionHeads):
    """Heads that call the modular Fourier operator, which has kernels. Subclasses set these sizes and choices."""

    num_tokens: int
    rank: int
    grid: int
    base = "zero"

    @property
    def reach(self) -> float:
        """See `AttentionHeads`."""
        return Fourier.reach

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        sizes = self.num_heads, self.rank, tokens, width
        return karat_flops(Fourier(self.grid), "modular", *sizes, masked=masked)

    def example(self, layer: LayerCall) -> FourierCall | None:
        """See `AttentionHeads`."""

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, device=layer.device)

        head = room(1, self.num_heads, self.num_tokens, layer.width)
        coef = room(self.num_heads, self.rank, self.num_tokens, self.grid)
        proj = room(self.num_heads, self.num_tokens, self.rank)
        pairs = room(self.num_tokens, self.num_tokens)
        on_scores = pairs if layer.biased else None, pairs == 0 if layer.masked else None
        return FourierCall(head, head, head, coef, coef, proj, *on_scores, self.base)


SOFTMAX_LIKE, VARIANCE_PRESERVING, FOURIER_KAN = "softmax_like", "variance_preserving", "fourier_kan"
_PUBLIC_CODE = (FOURIER_KAN, WAV_KAN)  # which have no W


class KaratOperator(FourierHeads):
    """KArAt attention of any basis and form for a fixed number of tokens.

    In the paper's blockwise mode, each block has its own operator; in its universal mode, all blocks share one.
    Parameters have the basis's names; those of the second operator begin with `second_`. W is `proj`.

    Args:
        num_tokens: N, class token included.
        num_heads: h.
        basis: a basis, or the name of a basis, which then has its default settings.
        rank: r, the width of H; without effect in the full-rank form.
        form: "modular", "project_first", "two_operators" or "full_rank" (see `karat_attention`).
        base: base activation b(x): "zero", "identity", "silu" or "gelu".
        init: "variance_preserving", with which O has the values' variance while the scores are standard normal (not in
            the form two_operators with a rational basis); "paper"
            (see the basis's `initialise`, and `initialise_projector`); "fourier_kan", the paper's with Fourier
            coefficients from N(0, 1 / (q G)), for q inputs; "wav_kan", the paper's with the weights of wavelets uniform
            in +-1 / sqrt(q); or "softmax_like" (see `start_like_softmax`).
        simplex: as in `karat_attention`.
        implementation: as in `karat_attention`.
        device, dtype: the device and dtype of the parameters.

    Raises ValueError when a count is not a positive integer or a name is unknown.
    """

    without_kernels = "streaming"
    _shown: tuple[str, ...] = (
        *("num_tokens", "num_heads", "basis", "rank", "form", "base", "init", "simplex", "implementation"),
    )

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        basis: Basis | str = "fourier",
        rank: int = 12,
        *,
        form: str = "modular",
        base: str = "zero",
        init: str = "variance_preserving",
        simplex: Simplex = False,
        implementation: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_counts(num_tokens=num_tokens, num_heads=num_heads, rank=rank)
        check_choice("form", form, FORMS)
        check_choice("base", base, BASE_ACTIVATIONS)
        check_choice("init", init, (*INITIALISATIONS, *_PUBLIC_CODE, SOFTMAX_LIKE))
        self.basis = make_basis(basis) if isinstance(basis, str) else basis
        _check_basis(self.basis, base, init)
        check_simplex(simplex, form)
        check_implementation(implementation, self.basis, form, simplex)
        if init == SOFTMAX_LIKE and not _can_start_like_softmax(self.basis, form, base):
            raise ValueError(
                f"init = {init!r} needs the Fourier basis, form = 'modular' or 'full_rank' and base = 'zero'"
            )
        key_of(self.basis)  # a compiled forward may not be the first to name it
        self.num_tokens, self.num_heads, self.rank, self.form = num_tokens, num_heads, rank, form
        self.grid = getattr(self.basis, "grid", 0)
        self.base, self.init, self.simplex, self.implementation = base, init, simplex, implementation
        self._names = tuple(parameter_shapes(self.basis, form, num_heads, num_tokens, rank))
        for name, shape in parameter_shapes(self.basis, form, num_heads, num_tokens, rank).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.proj: nn.Parameter | None = None
        if has_projector(form):
            self.proj = nn.Parameter(torch.empty((num_heads, num_tokens, rank), device=device, dtype=dtype))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        key_of(self.basis)  # in another process nothing has named it

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again according to `init`."""
        if self.init == SOFTMAX_LIKE:
            start_like_softmax(self.basis_parameters(), self.proj)
            return
        if self.proj is not None:
            initialise_projector(self.proj, "paper" if self.init in _PUBLIC_CODE else self.init, self.form)
        drawn = VARIANCE_PRESERVING if self.init == FOURIER_KAN else self.init
        parameters = self.basis_parameters()
        first = {name: x for name, x in parameters.items() if not name.startswith(SECOND)}
        second = {name.removeprefix(SECOND): x for name, x in parameters.items() if name.startswith(SECOND)}
        self.basis.initialise(first, drawn)
        if second:
            self.basis.initialise(second, drawn)
        if self.init == VARIANCE_PRESERVING and self.form != "modular":
            # These functions give the entries of S, and each output sums N of them.
            for name in self.basis.amplitudes:
                (second or first)[name].mul_(self.num_tokens**-0.5)

    @property
    def reach(self) -> float:
        """See `AttentionHeads`. Where W comes first, the functions do not get the scores themselves."""
        return math.inf if self.form == "project_first" else self.basis.reach

    def basis_parameters(self) -> dict[str, Tensor]:
        """Return the basis's parameters by name: all except W."""
        return {name: getattr(self, name) for name in self._names}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return O [B, h, N, d] for query, key and value [B, h, N, d]; see `karat_attention`."""
        return attend_form(self._call(query, key, value, bias, mask), self.implementation)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the learned attention S [B, h, N, N]; see `karat_scores`."""
        return form_scores(self._call(query, key, query, bias, mask), self.implementation)

    def _call(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> FormCall:
        settings = self.form, self.base, bias, mask, self.simplex
        return FormCall(query, key, value, self.basis, self.basis_parameters(), self.proj, *settings)

    def flops(self, tokens: int, width: int, masked: bool = False) -> int:
        """See `AttentionHeads`."""
        sizes = self.num_heads, self.rank, tokens, width
        return karat_flops(self.basis, self.form, *sizes, simplex=self.simplex, masked=masked)

    def example(self, layer: LayerCall) -> FourierCall | None:
        """See `AttentionHeads`."""
        return super().example(layer) if has_kernels(self.basis, self.form, self.simplex) else None


class FourierKaratOperator(KaratOperator):
    """The modular Fourier operator, the paper's choice; (2 G + 1) r N parameters per head.

    Args:
        grid: G, the number of harmonics.
        gains: whether each function also has KAN's two gains, see `Fourier`. The other arguments are `KaratOperator`'s.
    """

    _shown = ("num_tokens", "num_heads", "rank", "grid", "base", "init", "implementation")

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
        gains: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_counts(grid=grid)
        super().__init__(
            num_tokens,
            num_heads,
            Fourier(grid, gains),
            rank,
            base=base,
            init=init,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        attend: Callable[[FourierCall], Tensor] | None = None,
    ) -> Tensor:
        """Return O as `KaratOperator` does, or `attend` of the call.

        A form that builds on this one passes `attend`: at ZeRO-3 the parameters are whole only during this forward.
        """
        if attend is None:
            return super().forward(query, key, value, bias, mask)
        return attend(fourier_call(self._call(query, key, value, bias, mask)))


def plain_operator(cos_coef: Tensor, sin_coef: Tensor, proj: Tensor) -> FourierKaratOperator:
    """Return an operator with copies of coefficients [h, r, N, G] and of W [h, N, r]."""
    num_heads, rank, num_tokens, grid = cos_coef.shape
    operator = FourierKaratOperator(num_tokens, num_heads, rank, grid, device=proj.device, dtype=proj.dtype)
    operator.load_state_dict({"cos_coef": cos_coef, "sin_coef": sin_coef, "proj": proj})
    return operator


def _check_basis(basis: Basis, base: str, init: str) -> None:
    if init == FOURIER_KAN and not isinstance(basis, Fourier):
        raise ValueError(f"init = {init!r} needs the Fourier basis, not {type(basis).__name__}")
    if init == WAV_KAN and not isinstance(basis, Wavelet):
        raise ValueError(f"init = {init!r} needs a basis of wavelets, not {type(basis).__name__}")
    if isinstance(basis, Fourier) and basis.gains and base != "zero":
        raise ValueError(f"base = {base!r}: gains need base = 'zero'")


def _can_start_like_softmax(basis: Basis, form: str, base: str) -> bool:
    """Return True if `init` may be "softmax_like"."""
    return isinstance(basis, Fourier) and form in ("modular", "full_rank") and base == "zero"


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} = {count!r}: expected an integer of at least 1")


class ResidualHeads(nn.Module):
    """Softmax plus what `operator` adds. Its `gate` [h] learns how much, and starts at `start`.

    At g = 0 the heads equal softmax exactly, and only the gate has a gradient; the operator's own parameters have one
    from the second step on. The cost is that of softmax attention and of the operator.
    """

    def __init__(self, operator: AttentionHeads, start: float = 0.0) -> None:
        super().__init__()
        self.operator, self.num_heads = operator, operator.num_heads
        like = next(operator.parameters(), torch.empty(0))
        self.gate = nn.Parameter(torch.full((operator.num_heads,), start, device=like.device, dtype=like.dtype))
        self.sees_input = operator.sees_input

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return O [B, h, N, d] for query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        learned: Tensor = self.operator(query, key, value, bias, mask, **layer_input(self.operator, x))
        return softmax_attention(query, key, value, bias, mask) + self._gate(learned) * learned

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return S [B, h, N, N], both parts together."""
        learned = self.operator.scores(query, key, bias, mask, **layer_input(self.operator, x))
        return softmax_scores(query, key, bias, mask).to(learned.dtype) + self._gate(learned) * learned

    def bounded(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionHeads`; softmax gets query and key themselves."""
        return self.operator.bounded(query, key)

    def _gate(self, like: Tensor) -> Tensor:
        return self.gate.to(like.dtype)[:, None, None]


class HybridHeads(nn.Module):
    """Attention whose first `softmax_heads` heads use softmax and have no parameters; `operator` computes the others.

    Raises ValueError when `softmax_heads` is not a positive integer.
    """

    def __init__(self, operator: AttentionHeads | ResidualHeads, softmax_heads: int) -> None:
        super().__init__()
        if not isinstance(softmax_heads, int) or isinstance(softmax_heads, bool) or softmax_heads < 1:
            raise ValueError(f"softmax_heads = {softmax_heads!r}: expected an integer of at least 1")
        self.operator, self.softmax_heads = operator, softmax_heads
        self.sees_input = operator.sees_input

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return O [B, h, N, d] for query, key and value [B, h, N, d]; bias and mask as in `karat_attention`."""
        self._check(query)
        alone, others = zip(*map(self._split, (query, key, value, bias, mask)), strict=True)
        return torch.cat((softmax_attention(*alone), self.operator(*others, **layer_input(self.operator, x))), 1)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Return softmax(A) of the first heads and S of the others, [B, h, N, N]."""
        self._check(query)
        alone, others = zip(*map(self._split, (query, key, bias, mask)), strict=True)
        learned = self.operator.scores(*others, **layer_input(self.operator, x))
        return torch.cat((softmax_scores(*alone).to(learned.dtype), learned), 1)

    def bounded(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionHeads`; query and key of softmax heads do not change."""
        alone = self.softmax_heads
        bounded = self.operator.bounded(query[:, alone:], key[:, alone:])
        return torch.cat((query[:, :alone], bounded[0]), 1), torch.cat((key[:, :alone], bounded[1]), 1)

    def extra_repr(self) -> str:
        """Return the settings, with the constructor's names."""
        return f"softmax_heads={self.softmax_heads}"

    def _split(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the parts of softmax's heads and of the others, of a tensor [..., h or 1, N, d or N]."""
        if tensor is None or tensor.dim() < 3 or tensor.shape[-3] == 1:
            return tensor, tensor
        # The backward pass of a split writes each gradient once; slices would each fill and add a whole tensor.
        alone, others = tensor.split((self.softmax_heads, self.operator.num_heads), -3)
        return alone, others

    def _check(self, query: Tensor) -> None:
        heads = self.softmax_heads + self.operator.num_heads
        if query.dim() != 4 or query.shape[1] != heads:
            raise ValueError(f"query has shape {list(query.shape)}: expected [B, h, N, d] with h = {heads}")
