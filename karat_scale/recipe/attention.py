"""The `attention` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from karat_scale.recipe.base import Count, Positive, Section

# The names of `karat_scale.attention.BASES`; a recipe is read without importing torch.
BASIS_NAMES = ("fourier", "bspline", "chebyshev", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon")


class AttentionConfig(Section):
    """Softmax, or a KArAt operator of the paper: by default the modular one, S = Phi(A) W^T, in its Fourier basis.

    `basis` is a name or `package.module:Class`, built with those of grid, degree, range and orders that its
    constructor takes: G; the spline's degree k and range [-I, I]; (m, n) of the rational function.

    `init: softmax_like` starts the Fourier operator near softmax. With `residual` S is softmax(A) plus the learned S
    times a gate of each head, which starts at 0: softmax exactly at first, at the cost of both.

    `transfer_from` is the directory of a trained run: its attention matrices drive this model, which has no query and
    key of its own and learns only what is done with the values (the paper's attention transfer). Needs kind: softmax.
    """

    kind: Literal["softmax", "karat"] = "softmax"
    basis: str = "fourier"
    form: Literal["modular", "project_first", "two_operators", "full_rank"] = "modular"
    mode: Literal["blockwise", "universal"] = "blockwise"
    softmax_heads: Annotated[int, Field(ge=0)] = 0
    residual: bool = False
    simplex: bool = False
    grid: Annotated[int, Field(ge=1, le=16)] = 3
    degree: Annotated[int, Field(ge=1, le=5)] = 3
    range: Positive = 3.0
    orders: tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]] = (5, 4)
    rank: Count = 12
    base: Literal["zero", "identity", "silu", "gelu"] = "zero"
    init: Literal["paper", "variance_preserving", "softmax_like"] = "variance_preserving"
    implementation: Literal["auto", "reference", "streaming", "cpu", "triton"] = "auto"
    transfer_from: str = ""

    @field_validator("basis")
    @classmethod
    def _is_a_name_or_a_place(cls, value: str) -> str:
        module, colon, name = value.partition(":")
        if value in BASIS_NAMES or (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
            return value
        raise ValueError(f"should be one of {', '.join(BASIS_NAMES)}, or package.module:Class")

    @model_validator(mode="after")
    def _implementation_has_the_operator(self) -> "AttentionConfig":
        plain = self.basis == "fourier" and self.form == "modular" and not self.simplex
        if not plain and self.implementation not in ("auto", "reference", "streaming"):
            raise ValueError(
                f"attention.implementation = {self.implementation} has the modular Fourier operator only, without "
                "simplex; use auto"
            )
        return self

    @model_validator(mode="after")
    def _operator_can_start_like_softmax(self) -> "AttentionConfig":
        near = self.basis == "fourier" and self.form in ("modular", "full_rank") and self.base == "zero"
        if self.init == "softmax_like" and not near:
            raise ValueError(
                "attention.init = softmax_like needs attention.basis=fourier, attention.form=modular or full_rank and "
                "attention.base=zero; use variance_preserving"
            )
        return self

    @model_validator(mode="after")
    def _only_a_plain_model_takes_matrices(self) -> "AttentionConfig":
        if self.transfer_from and self.kind != "softmax":
            raise ValueError(
                f"attention.kind = {self.kind} learns its own matrices, but attention.transfer_from = "
                f"{self.transfer_from} brings another model's; use attention.kind=softmax or leave transfer_from out"
            )
        return self
