"""The distance of a head from the best fit of softmax by an operator of the same kind.

On the scores that occur, S is linear in the features f(A[k, q]) of a row: S = X Theta, where a row of X holds all F N
features and Theta = coefficients x W. The best fit of softmax is the Theta of rank r that is nearest to softmax(A) in
least squares. It follows from X^T X and X^T softmax(A), so the rows need not be kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import FeatureBasis

MAX_FEATURES = 4096
RIDGE = 1e-8


@dataclass(frozen=True)
class Distance:
    """`fit_error` is |softmax - fit| / |softmax|: how well the operator can fit softmax. `to_fit` and `to_softmax` are
    |S - c fit| / |S| and |S - c softmax| / |S| at the best factor c, between 0 (the same) and 1 (nothing in common).
    """

    fit_error: float
    to_fit: float
    to_softmax: float


def can_fit(operator: KaratOperator) -> bool:
    """True if S is linear in few enough features for a solution."""
    basis = operator.basis
    return (
        isinstance(basis, FeatureBasis)
        and operator.form in ("modular", "full_rank")
        and operator.base == "zero"
        and not operator.simplex
        and basis.num_features * operator.num_tokens <= MAX_FEATURES
    )


class SoftmaxFit:
    """One head's sums: X^T X [F N, F N], X^T Y [F N, N] and |Y|^2, with Y = softmax(A); float64."""

    def __init__(self, operator: KaratOperator, head: int) -> None:
        assert isinstance(operator.basis, FeatureBasis)
        self._operator, self._head, self._basis = operator, head, operator.basis
        tokens = operator.num_tokens
        size = self._basis.num_features * tokens
        device = next(operator.parameters()).device
        self._xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._xy = torch.zeros(size, tokens, dtype=torch.float64, device=device)
        self._yy = 0.0

    @staticmethod
    def bytes_of(operator: KaratOperator) -> int:
        """Bytes that the sums of one head take."""
        assert isinstance(operator.basis, FeatureBasis)
        size = operator.basis.num_features * operator.num_tokens
        return 8 * size * (size + operator.num_tokens)

    def add(self, scores: Tensor) -> None:
        """Add rows of A [rows, N]."""
        scores = scores.double()
        features = torch.cat(list(self._basis.value(scores)), 1)
        target = scores.softmax(-1)
        self._xx += features.mT @ features
        self._xy += features.mT @ target
        self._yy += float(target.square().sum())

    @torch.no_grad()
    def best(self) -> Tensor:
        """Return Theta [F N, N] of the operator's rank that is nearest to softmax."""
        ridge = RIDGE * self._xx.diagonal().mean() * torch.eye(len(self._xx), dtype=self._xx.dtype).to(self._xx)
        theta: Tensor = torch.linalg.solve(self._xx + ridge, self._xy)
        if self._operator.proj is None:
            return theta
        # Reduced-rank regression: the fit's rows onto their main directions.
        _, directions = torch.linalg.eigh(theta.mT @ self._xx @ theta)
        main = directions[:, -self._operator.rank :]
        projected: Tensor = theta @ main @ main.mT
        return projected

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Return Theta [F N, N] of the learned head."""
        coef = self._operator.basis.pack({k: v.double() for k, v in self._operator.basis_parameters().items()})
        theta = coef[self._head].transpose(1, 2).flatten(0, 1)
        return theta if self._operator.proj is None else theta @ self._operator.proj[self._head].double().mT

    def distance(self) -> Distance:
        """Return the three figures for the rows so far."""
        best, learned = self.best(), self.learned()
        size = float((learned * (self._xx @ learned)).sum())
        fit = float((best * (self._xx @ best)).sum())
        error = self._yy - 2 * float((best * self._xy).sum()) + fit
        return Distance(
            fit_error=(max(error, 0.0) / self._yy) ** 0.5,
            to_fit=_apart(float((learned * (self._xx @ best)).sum()), size, fit),
            to_softmax=_apart(float((learned * self._xy).sum()), size, self._yy),
        )


def _apart(inner: float, first: float, second: float) -> float:
    """Return the sine of the angle between two vectors from their inner product and squared lengths."""
    if not first or not second:
        return 1.0
    sine: float = max(1 - inner**2 / (first * second), 0.0) ** 0.5
    return sine
