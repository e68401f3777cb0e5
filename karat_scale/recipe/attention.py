"""The `attention` section of a recipe, and what it says in words."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails

from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import did_you_mean
from karat_scale.foundation.tables import ATTENTIONS, BASES, AttentionRow
from karat_scale.recipe.base import Count, Effect, OneOf, Positive, Section, setting_text

# Forms of ours, beside the paper's.
VARIANTS = ("content", "smooth")
# What holds for all blocks of a model.
_OF_ALL = ("mode", "implementation", "transfer_from", "transfer_heads", "blocks")
# Keys that name another model: a kind refuses those that it does not take.
_NAMING = ("scores", "residual", "softmax_heads", "form", "basis", "simplex", "gains", "bound")
# Those that work with each class of the user's. It takes others by naming them in its constructor.
OF_EACH_CLASS = ("softmax_heads", "residual")


class AttentionConfig(Section):
    """Softmax, a KArAt operator, or a control. The default operator is the paper's: S = Phi(A) W^T with Fourier series.

    A basis uses those of `grid`, `degree`, `range` and `orders` that its constructor takes.
    """

    kind: Annotated[str, OneOf(ATTENTIONS, places=True), Effect.SHAPES] = "softmax"
    """`softmax`. `karat`: a KArAt operator. Controls without learned functions: `static`, where S is a learned
    constant matrix of each head; `static_softmax`, softmax plus such a matrix times each head's learned gate, which
    starts at 1; `scaled_softmax`, softmax times a gain of each head, which starts at the square root of the number of
    tokens; and `softmax_bias`, softmax(A + B) with a learned bias B of each pair of positions, which starts at 0.
    Published rivals: `sigmoid`, sigmoid(A - log N) (arXiv 2409.04431); `polynomial`, A^3 / sqrt(N) (2410.18613);
    `gated`, softmax with a sigmoid gate of each head and token (2505.06708); and `differential`, the difference of two
    softmaxes (2410.05258). Ours: `query_only`, functions of the query alone, without scores; and `centred`, KArAt
    without the part that all queries share, plus a constant matrix of rank r. `package.module:Class` is your own
    (CONTRIBUTING.md)."""
    basis: Annotated[str, OneOf(BASES, places=True), Effect.SHAPES] = "fourier"
    """The basis of the functions phi: a name, or `package.module:Class` for your own."""
    form: Annotated[
        Literal["modular", "project_first", "two_operators", "full_rank", "content", "smooth"], Effect.SHAPES
    ] = "modular"
    """`modular` is the paper's S = Phi(A) W^T. `content` adds a learned function of each score, and `smooth`
    makes the functions vary smoothly over the image; docs/attention.md describes all forms."""
    scores: bool = True
    """False replaces the scores A with 0, so that the operator sees neither queries nor keys: a control."""
    bound: Annotated[Positive | None, Effect.SHAPES] = None
    """The largest |A|. Each head learns a tau below it, and A = tau cos(q, k), for every form and basis. Null: no
    bound, A = q k / sqrt(d)."""
    mode: Annotated[Literal["blockwise", "universal"], Effect.SHAPES] = "blockwise"
    """`blockwise`: each block has its own functions. `universal`: all blocks share them."""
    softmax_heads: Annotated[int, Field(ge=0), Effect.SHAPES] = 0
    """Number of heads of each block, the first ones, that use softmax instead of KArAt."""
    residual: Annotated[bool, Effect.SHAPES] = False
    """S is softmax(A) plus the learned S times a gate of each head. The gate starts at 0, so the model starts as
    softmax. It costs the time and memory of both."""
    simplex: bool | Literal["hidden"] = False
    """Project onto the probability simplex. `true`: each row of S (the paper's section 3). `hidden`: each row of H,
    before W (its Algorithm 2)."""
    grid: Annotated[int, Field(ge=1, le=16), Effect.SHAPES] = 3
    """G: harmonics of a Fourier series, intervals of a B-spline, or the Chebyshev degree."""
    degree: Annotated[int, Field(ge=1, le=5), Effect.SHAPES] = 3
    """Degree k of a B-spline."""
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
    init: Literal["paper", "fourier_kan", "wav_kan", "variance_preserving", "softmax_like"] = "variance_preserving"
    """Initial coefficients. `paper`: N(0, 1). `fourier_kan`: Fourier coefficients from N(0, 1 / (N G)), as in
    FourierKAN. `wav_kan`: weights of wavelets uniform in +-1 / sqrt(N), as in Wav-KAN. `variance_preserving`: the
    output has the values' variance. `softmax_like` starts the Fourier operator near softmax."""
    implementation: Annotated[Literal["auto", "reference", "streaming", "cpu", "triton", "flex"], Effect.ROUNDING] = (
        "auto"
    )
    """The implementation of the operator. `auto` uses the fastest that supports the operator, the device and the
    precision. `flex` is PyTorch's FlexAttention, to check and to compare with; also for `sigmoid` and `polynomial`."""
    blocks: Annotated[dict[str, dict[str, Any]], Effect.SHAPES] = Field(default={})
    """Blocks that differ from the section, by their numbers, counted from 0, such as `{8-11: {kind: karat, grid: 5}}`.
    A range may have any key of the section but mode, implementation, transfer_from and transfer_heads."""
    transfer_from: Annotated[str, Effect.SHAPES] = ""
    """The directory of a trained run whose attention matrices this model uses (the paper's attention transfer). The
    model then has no query and key, and learns only what to do with the values. Needs `kind: softmax`."""
    transfer_heads: Literal["same", "repeat", "cycle", "interpolate"] = "same"
    """How this model's heads use those of `transfer_from`. `same`: one to one. With a multiple of heads, `repeat` takes
    them as 0, 0, 1, 1, `cycle` as 0, 1, 0, 1, and `interpolate` blends two matrices linearly."""

    def of_block(self, number: int) -> "AttentionConfig":
        """Return the section of one block, with its own keys."""
        return next((own for _, numbers, own in self.ranges() if number in numbers), self._with({}))

    @property
    def sections(self) -> "tuple[AttentionConfig, ...]":
        """Return the section of the blocks that are in no range, then that of each range."""
        return (self._with({}), *(own for *_, own in self.ranges()))

    @property
    def learns(self) -> bool:
        """True if a block has other attention than softmax."""
        return any(section.kind != "softmax" for section in self.sections)

    def ranges(self) -> Iterator[tuple[str, Sequence[int], "AttentionConfig"]]:
        """Yield each range as `blocks` has it, its numbers and its section."""
        for text, own in self.blocks.items():
            yield text, _numbers(text), self._with(own)

    def _with(self, own: dict[str, Any]) -> "AttentionConfig":
        if not own:
            return self.changed(blocks={}) if self.blocks else self
        taken = self.model_dump(exclude={"blocks"})
        if "kind" in own:
            row = ATTENTIONS.get(own["kind"]) if isinstance(own["kind"], str) else None
            kept = row.keys if row else OF_EACH_CLASS
            taken = {key: value for key, value in taken.items() if key in kept or key not in _NAMING}
            if _has_no_kernel(row, kept, self.implementation):  # it is for the other blocks
                del taken["implementation"]
        return AttentionConfig(**{**taken, **own})

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
    def keys_in_use(self) -> set[str]:
        """The keys that have an effect with this kind, form and basis."""
        # With softmax, a teacher's matrices need an implementation.
        of_each_kind = {"kind", "implementation", "transfer_from", "transfer_heads"}
        if not self.learns:
            return of_each_kind
        if self.blocks or self.row is None:
            return set(type(self).model_fields)
        keys = {*of_each_kind, *self.row.keys, "mode", "blocks"}
        if self.kind == "karat":
            if self.basis in BASES:
                keys -= {"grid", "degree", "range", "orders"}.difference(BASES[self.basis].keys)
            keys -= {"modes"} if self.form != "smooth" else set()
            keys -= {"rank"} if self.form == "full_rank" else set()
        return keys

    @property
    def has_functions(self) -> bool:
        """True if functions of the scores are learned, which has implementations."""
        return self.kind != "softmax" and self.row is not None and "implementation" in self.row.keys

    @property
    def classes(self) -> dict[str, str]:
        """The values of the keys that may be the place of a class, by key."""
        own = {f"blocks.{text}.{key}": value for text, keys in self.blocks.items() for key, value in keys.items()}
        places = {"kind": self.kind, "basis": self.basis, **own}
        return {f"attention.{key}": value for key, value in places.items() if key.endswith(("kind", "basis"))}

    def refuse_keys(self, taken: Collection[str]) -> None:
        """Raise ValueError for a key that names another model, but is not among the keys that the kind takes."""
        if _has_no_kernel(self.row, taken, self.implementation):
            named = f"attention.implementation = {self.implementation}"
            raise ValueError(f"{named} does not support attention.kind={self.kind}; use auto")
        for key in _NAMING:
            value = getattr(self, key)
            if key not in taken and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"attention.{key} = {setting_text(value)} has no effect with attention.kind = {self.kind}; remove "
                    "it, or use attention.kind=karat"
                )

    def _refusals(self) -> Iterator[str]:
        if self.row is not None:  # what a class of the user's takes is known only where it is built
            self.refuse_keys(self.row.keys)

        if not self.is_modular_series and self.implementation not in ("auto", "reference", "streaming"):
            yield (
                f"attention.implementation = {self.implementation} needs attention.basis=fourier, "
                "attention.form=modular, content or smooth, and attention.simplex=false; use auto"
            )

        near = self.is_series and self.form in ("modular", "full_rank") and self.base == "zero"
        if self.init == "softmax_like" and not near:
            yield (
                "attention.init = softmax_like needs attention.basis=fourier, attention.form=modular or full_rank and "
                "attention.base=zero; use variance_preserving"
            )
        if self.simplex == "hidden" and self.form != "modular":
            yield f"attention.simplex = hidden needs attention.form=modular, not {self.form}"

        if self.init == "fourier_kan" and not self.is_series:
            yield f"attention.init = fourier_kan needs attention.basis=fourier, not {self.basis}"
        if self.gains and not (self.is_series and self.base == "zero"):
            yield "attention.gains = true needs attention.basis=fourier and attention.base=zero"

        if self.kind == "karat" and self.form in VARIANTS:
            plain = {"basis": "fourier", "simplex": False, "base": "zero", "gains": False}
            for key, only in {**plain, "init": "variance_preserving"}.items():
                if (value := getattr(self, key)) != only:
                    yield (
                        f"attention.{key} = {setting_text(value)} does not work with attention.form = {self.form}; "
                        f"use {setting_text(only)}"
                    )

        if self.bound is not None and not self.scores:
            yield f"attention.bound = {self.bound:g} has no effect with attention.scores = false; remove one of them"

        if self.blocks and self.transfer_from:
            yield "attention.blocks has no effect with attention.transfer_from; remove one of them"
        own_keys = [key for key in type(self).model_fields if key not in _OF_ALL]
        taken: dict[int, str] = {}
        for text, own in self.blocks.items():
            key = f"attention.blocks.{text}"
            if not re.fullmatch(r"\d{1,3}(-\d{1,3})?", text):
                yield f"{key}: should be the number of a block, such as 8, or a range, such as 8-11"
            numbers = _numbers(text)
            if not numbers or not own:
                fix = "has no keys; give it some, such as {kind: karat}"
                yield f"{key}: {fix if numbers else 'its last block is before its first; swap the two'}"
            if both := [number for number in numbers if number in taken]:
                yield f"{key}: block {both[0]} is also in {taken[both[0]]}; leave it in one of them"
            taken |= dict.fromkeys(numbers, text)
            for name in own:
                if name in _OF_ALL and name != "blocks":
                    yield f"{key}.{name}: holds for all blocks; set attention.{name}"
                if name not in own_keys:
                    hint = did_you_mean(name, own_keys, f"the keys are {', '.join(own_keys)}")
                    yield f"{key}.{name}: unknown key; {hint}"
            try:
                self._with(own)
            except ValidationError as error:
                found = error.errors()
                if not found[0]["loc"]:  # the keys do not fit together
                    yield f"{key}: {found[0]['msg'].removeprefix('Value error, ')}"
                details = [
                    InitErrorDetails(
                        type=one["type"], loc=("blocks", text, *one["loc"]), input=one["input"], ctx=one.get("ctx", {})
                    )
                    for one in found
                ]
                raise ValidationError.from_exception_data(error.title, details) from None

        if self.transfer_heads != "same" and not self.transfer_from:
            yield f"attention.transfer_heads = {self.transfer_heads} has no effect without transfer_from; remove it"
        if self.transfer_from and self.kind != "softmax":
            yield (
                f"attention.kind = {self.kind} computes its own matrices, but attention.transfer_from = "
                f"{self.transfer_from} uses another model's; use attention.kind=softmax or remove transfer_from"
            )


def _has_no_kernel(row: AttentionRow | None, taken: Collection[str], implementation: str) -> bool:
    """Return whether an implementation with kernels has none for a kind that takes these keys."""
    by_flex = row is not None and row.by_rows and implementation == "flex"
    return implementation in ("cpu", "triton", "flex") and "implementation" not in taken and not by_flex


def _numbers(text: str) -> range:
    """The blocks of a range such as 8-11, or the one of a number."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def describe_attention(attention: AttentionConfig) -> str:
    """Return a phrase such as `softmax attention times a learned gain (blockwise, 1 softmax head)`.

    Blocks with a section of their own follow: `softmax attention; block 3: ...; blocks 8-11: ...`.
    """
    own = [
        f"block{'s' * (len(numbers) > 1)} {text}: {describe_attention(section)}"
        for text, numbers, section in attention.ranges()
    ]
    return "; ".join([_describe(attention.sections[0]), *own])


def _describe(attention: AttentionConfig) -> str:
    if attention.transfer_from:
        return f"attention transferred from {attention.transfer_from}"
    name = attention.row.words if attention.row else f"attention of the class {attention.kind}"
    if attention.kind == "softmax":
        return name
    is_ours = attention.kind == "karat" and (attention.form in VARIANTS or not attention.scores)
    return f"{'a variant of ' if is_ours else ''}{name} ({', '.join(_details(attention))})"


def _details(attention: AttentionConfig) -> list[str]:
    taken = attention.keys_in_use if attention.row else set()
    first, second = attention.orders
    details = {
        attention.basis: "basis" in taken,
        attention.form: "form" in taken,
        attention.mode: True,
        f"grid {attention.grid}": "grid" in taken,
        f"degree {attention.degree}": "degree" in taken,
        f"orders {first} and {second}": "orders" in taken,
        f"rank {attention.rank}": "rank" in taken,
        "on the simplex": attention.simplex is True,
        "hidden units on the simplex": attention.simplex == "hidden",
        "without scores": not attention.scores,
        f"scores below {attention.bound or 0:g}": "bound" in taken and attention.bound is not None,
        "residual": attention.residual,
        plural(attention.softmax_heads, "softmax head"): attention.softmax_heads > 0,
    }
    return [detail for detail, applies in details.items() if applies]
