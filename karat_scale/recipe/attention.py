"""The `attention` section of a recipe, and what it says in words."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karat_scale.foundation.console import plural
from karat_scale.foundation.tables import ATTENTIONS, BASES, AttentionRow
from karat_scale.recipe.base import Count, Effect, OneOf, Positive, Section

# Forms of ours, beside the paper's.
VARIANTS = ("content", "smooth")


class AttentionConfig(Section):
    """Softmax, a KArAt operator, or a control. The default operator is the paper's: S = Phi(A) W^T with Fourier series.

    A basis uses those of `grid`, `degree`, `range` and `orders` that its constructor takes.
    """

    kind: Annotated[str, OneOf(ATTENTIONS, places=True), Effect.SHAPES] = "softmax"
    """`softmax`. `karat`: a KArAt operator. Controls without learned functions: `static`, where S is a learned
    constant matrix of each head; `static_softmax`, softmax plus a gate of each head, which starts at 1, times such a
    matrix; `scaled_softmax`, softmax times a gain of each head, which starts at the square root of the number of
    tokens; and `softmax_bias`, softmax(A + B) with a learned bias B of each pair of positions, which starts at 0.
    Published rivals: `sigmoid`, sigmoid(A - log N) (arXiv 2409.04431); `polynomial`, A^3 / sqrt(N) (2410.18613);
    `gated`, softmax with a sigmoid gate of each head and token (2505.06708); and `differential`, the difference of two
    softmaxes (2410.05258). Ours: `query_only`, functions of the query alone, without scores; and `centred`, KArAt less
    what all queries share, plus a constant matrix of rank r. `package.module:Class` is your own (CONTRIBUTING.md)."""
    basis: Annotated[str, OneOf(BASES, places=True), Effect.SHAPES] = "fourier"
    """The basis of the functions phi: a name, or `package.module:Class` for your own."""
    form: Annotated[
        Literal["modular", "project_first", "two_operators", "full_rank", "content", "smooth"], Effect.SHAPES
    ] = "modular"
    """`modular` is the paper's S = Phi(A) W^T. `content` adds a learned function of each score, and `smooth`
    makes the functions vary smoothly over the image; docs/attention.md describes all forms."""
    scores: bool = True
    """False replaces the scores A by 0, so that the operator sees neither queries nor keys: a control."""
    mode: Annotated[Literal["blockwise", "universal"], Effect.SHAPES] = "blockwise"
    """`blockwise`: each block has its own functions. `universal`: all blocks share them."""
    softmax_heads: Annotated[int, Field(ge=0), Effect.SHAPES] = 0
    """The first heads of each block that use softmax instead of KArAt."""
    residual: Annotated[bool, Effect.SHAPES] = False
    """S is softmax(A) plus the learned S times a gate of each head. The gate starts at 0, so the model starts as
    softmax. It costs the time and memory of both."""
    simplex: bool | Literal["hidden"] = False
    """Project onto the probability simplex. `true`: each row of S (the paper's section 3). `hidden`: each row of H,
    before W (its Algorithm 2)."""
    grid: Annotated[int, Field(ge=1, le=16), Effect.SHAPES] = 3
    """G: the harmonics of a Fourier series, or the grid size of another basis."""
    degree: Annotated[int, Field(ge=1, le=5), Effect.SHAPES] = 3
    """Degree k of a B-spline or polynomial."""
    range: Positive = 3.0
    """I: a B-spline has its knots in [-I, I]."""
    orders: Annotated[tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]], Effect.SHAPES] = (
        5,
        4,
    )
    """Orders (m, n) of the numerator and denominator of a rational function."""
    rank: Annotated[Count, Effect.SHAPES] = 12
    """Rank r of the operator."""
    modes: Annotated[Annotated[int, Field(ge=2)], Effect.SHAPES] = 16
    """K: the modes of the patch grid from which `form: smooth` builds its functions."""
    base: Literal["zero", "identity", "silu", "gelu"] = "zero"
    """The base activation b(x), which is added to each function."""
    gains: Annotated[bool, Effect.SHAPES] = False
    """KAN's two gains for each function of a Fourier series: w_b b(x) + w_s (the series). With b = 0 only w_s has an
    effect. Both together give the paper's numbers of parameters."""
    init: Literal["paper", "fourier_kan", "variance_preserving", "softmax_like"] = "variance_preserving"
    """Initial coefficients. `paper`: N(0, 1). `fourier_kan`: Fourier coefficients from N(0, 1 / (N G)), as in
    FourierKAN. `variance_preserving`: the output has the values' variance. `softmax_like` starts the Fourier operator
    near softmax."""
    implementation: Annotated[Literal["auto", "reference", "streaming", "cpu", "triton", "flex"], Effect.ROUNDING] = (
        "auto"
    )
    """The implementation of the operator. `auto` uses the fastest that supports the operator, the device and the
    precision. `flex` is PyTorch's FlexAttention, to check and to compare the kernels with."""
    transfer_from: Annotated[str, Effect.SHAPES] = ""
    """The directory of a trained run whose attention matrices this model uses (the paper's attention transfer). The
    model then has no query and key, and learns only what to do with the values. Needs `kind: softmax`."""
    transfer_heads: Literal["same", "repeat", "cycle", "interpolate"] = "same"
    """How the heads of `transfer_from` serve those of this model. `same`: one to one. For a multiple of them, `repeat`
    serves neighbours (0, 0, 1, 1), `cycle` goes round (0, 1, 0, 1), and `interpolate` blends two matrices linearly."""

    @property
    def is_series(self) -> bool:
        """True if phi is a Fourier series."""
        return self.basis in BASES and BASES[self.basis].is_series

    @property
    def is_modular_series(self) -> bool:
        """True for S = Phi(A) W^T of Fourier series, which has kernels, and for the forms that build on it."""
        return self.is_series and self.form in ("modular", *VARIANTS) and not self.simplex

    @property
    def row(self) -> AttentionRow | None:
        """The table's row of this kind; None for a class of the user's."""
        return ATTENTIONS.get(self.kind)

    @property
    def has_functions(self) -> bool:
        """True if functions of the scores are learned, which has implementations."""
        return self.kind != "softmax" and self.row is not None and "implementation" in self.row.keys

    @property
    def classes(self) -> dict[str, str]:
        """The values of the keys that may be the place of a class, by key."""
        return {"attention.kind": self.kind, "attention.basis": self.basis}

    def refuse_keys(self, taken: Collection[str]) -> None:
        """Raise ValueError for a key that names another model, but is not among the keys that the kind takes."""
        if "implementation" not in taken and self.implementation in ("cpu", "triton", "flex"):
            raise ValueError(
                f"attention.implementation = {self.implementation} supports only attention.kind=karat, not "
                f"{self.kind}; use auto"
            )
        for key in ("scores", "residual", "softmax_heads", "form", "basis", "simplex", "gains"):
            value = getattr(self, key)
            if key not in taken and value != type(self).model_fields[key].default:
                raise ValueError(f"attention.{key} = {value} has no effect with attention.kind = {self.kind}")

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> "AttentionConfig":
        if self.row is not None:  # what a class of the user's takes is known only where it is built
            self.refuse_keys(self.row.keys)
        return self

    @model_validator(mode="after")
    def _implementation_has_the_operator(self) -> "AttentionConfig":
        if not self.is_modular_series and self.implementation not in ("auto", "reference", "streaming"):
            raise ValueError(
                f"attention.implementation = {self.implementation} supports only the modular Fourier operator without "
                "simplex; use auto"
            )
        return self

    @model_validator(mode="after")
    def _operator_can_start_like_softmax(self) -> "AttentionConfig":
        near = self.is_series and self.form in ("modular", "full_rank") and self.base == "zero"
        if self.init == "softmax_like" and not near:
            raise ValueError(
                "attention.init = softmax_like needs attention.basis=fourier, attention.form=modular or full_rank and "
                "attention.base=zero; use variance_preserving"
            )
        return self

    @model_validator(mode="after")
    def _only_the_modular_form_has_hidden_units(self) -> "AttentionConfig":
        if self.simplex == "hidden" and self.form != "modular":
            raise ValueError(f"attention.simplex = hidden needs attention.form=modular, not {self.form}")
        return self

    @model_validator(mode="after")
    def _operator_is_a_series(self) -> "AttentionConfig":
        if self.init == "fourier_kan" and not self.is_series:
            raise ValueError(f"attention.init = fourier_kan needs attention.basis=fourier, not {self.basis}")
        if self.gains and not (self.is_series and self.base == "zero"):
            raise ValueError("attention.gains = true needs attention.basis=fourier and attention.base=zero")
        return self

    @model_validator(mode="after")
    def _variants_are_of_the_plain_series(self) -> "AttentionConfig":
        if self.kind == "karat" and self.form in VARIANTS:
            plain = {
                "basis": "fourier",
                "simplex": False,
                "base": "zero",
                "gains": False,
                "init": "variance_preserving",
            }
            for key, only in plain.items():
                if (value := getattr(self, key)) != only:
                    raise ValueError(f"attention.form = {self.form} has attention.{key}={only} only, not {value}")
        return self

    @model_validator(mode="after")
    def _only_a_plain_model_takes_matrices(self) -> "AttentionConfig":
        if self.transfer_heads != "same" and not self.transfer_from:
            raise ValueError(f"attention.transfer_heads = {self.transfer_heads} has no effect without transfer_from")
        if self.transfer_from and self.kind != "softmax":
            raise ValueError(
                f"attention.kind = {self.kind} computes its own matrices, but attention.transfer_from = "
                f"{self.transfer_from} uses another model's; use attention.kind=softmax or remove transfer_from"
            )
        return self


def describe_attention(attention: AttentionConfig) -> str:
    """Return a phrase such as `softmax attention times a learned gain (blockwise, 1 softmax head)`."""
    if attention.transfer_from:
        return f"attention transferred from {attention.transfer_from}"
    name = attention.row.words if attention.row else f"attention of the class {attention.kind}"
    if attention.kind == "softmax":
        return name
    is_ours = attention.kind == "karat" and (attention.form in VARIANTS or not attention.scores)
    return f"{'a variant of ' if is_ours else ''}{name} ({', '.join(_details(attention))})"


def _details(attention: AttentionConfig) -> list[str]:
    taken = attention.row.keys if attention.row else ()
    details = {
        attention.basis: "basis" in taken,
        attention.form: "form" in taken,
        attention.mode: True,
        f"grid {attention.grid}": "grid" in taken,
        f"rank {attention.rank}": "rank" in taken and attention.form != "full_rank",
        "on the simplex": attention.simplex is True,
        "hidden units on the simplex": attention.simplex == "hidden",
        "without scores": not attention.scores,
        "residual": attention.residual,
        plural(attention.softmax_heads, "softmax head"): attention.softmax_heads > 0,
    }
    return [detail for detail, applies in details.items() if applies]
