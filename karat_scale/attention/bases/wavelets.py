"""Wavelets w psi((x - tau) / s); each function has its own weight, translation and scale."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karat_scale.attention.bases.base import ElementwiseBasis, Shape, is_paper, normal_mean

# |s| is taken as at least this, so that no wavelet becomes a spike between scores.
SMALLEST_SCALE = 0.05
WAV_KAN = "wav_kan"


class Wavelet(ElementwiseBasis):
    """A subclass gives the mother wavelet psi and its derivative.

    Parameters `weight` w, `translation` tau and `scale` s, each [h, p, q].
    """

    amplitudes = ("weight",)

    @abstractmethod
    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""

    @abstractmethod
    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return psi(t) and psi'(t), in new memory."""

    def shapes(self, heads: int, units: int, keys: int) -> dict[str, Shape]:
        """See `Basis`."""
        return dict.fromkeys(("weight", "translation", "scale"), (heads, units, keys))

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """w ~ N(0, 1), or N(0, 1 / (q E psi(x)^2)), with which H has variance 1; tau = 0 and s = 1.

        With "wav_kan", w is uniform in +-1 / sqrt(q), as in the public code of Wav-KAN (arXiv 2405.12832).
        """
        weight = parameters["weight"]
        if scheme == WAV_KAN:
            limit = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -limit, limit)
        else:
            power = float(normal_mean(lambda x: self.mother(x).square()))
            nn.init.normal_(weight, std=1.0 if is_paper(scheme) else (weight.shape[2] * power) ** -0.5)
        nn.init.zeros_(parameters["translation"])
        nn.init.ones_(parameters["scale"])

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """w, tau and 1 / s, [h, 3, p, q]."""
        scale = parameters["scale"]
        rate = torch.where(scale < 0, -1.0, 1.0) / scale.abs().clamp_min(SMALLEST_SCALE)
        return torch.stack((parameters["weight"], parameters["translation"], rate), 1)

    def value(self, x: Tensor, *theta: Tensor) -> Tensor:
        """w psi((x - tau) rate)."""
        weight, translation, rate = theta
        return self.mother((x - translation) * rate) * weight

    def derivative(self, x: Tensor, *theta: Tensor) -> Sequence[Tensor]:
        """Return the derivatives with respect to x, w, tau and rate = 1 / s."""
        weight, translation, rate = theta
        shifted = x - translation
        mother, slope = self.mother_and_slope(shifted * rate)
        by_x = slope * (weight * rate)
        return by_x, mother, -by_x, slope * shifted * weight

    def sum_over_keys(self, x: Tensor, theta: Tensor) -> Tensor:
        """Compute the sum as a matrix product with w."""
        weight, translation, rate = theta
        hidden: Tensor = self.mother(torch.addcmul(-translation * rate, x, rate)) @ weight
        return hidden

    def pull_back(self, x: Tensor, upstream: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Like `derivative`, with w, tau and rate applied after the sums over rows."""
        weight, translation, rate = theta
        mother, slope = self.mother_and_slope(torch.addcmul(-translation * rate, x, rate))
        by_weight, by_argument = mother.mul_(upstream).sum(0), slope.mul_(upstream).sum(0)
        by_rate = torch.mul(x, slope, out=mother).sum(0).sub_(translation * by_argument).mul_(weight)
        factor = weight * rate
        return slope.mul_(factor), torch.stack((by_weight, by_argument.mul_(factor).neg_(), by_rate))


@dataclass(frozen=True)
class MexicanHat(Wavelet):
    """psi(t) = c (t^2 - 1) exp(-t^2 / 2), where c = 2 / (pi^(1/4) sqrt(3))."""

    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""
        square = t * t
        psi: Tensor = (square - 1) * _bell(square) * _HAT
        return psi

    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi'(t) = c t (3 - t^2) exp(-t^2 / 2)."""
        square = t * t
        bell = _bell(square).mul_(_HAT)
        return (square - 1).mul_(bell), square.neg_().add_(3).mul_(t).mul_(bell)


@dataclass(frozen=True)
class Morlet(Wavelet):
    """psi(t) = cos(omega_0 t) exp(-t^2 / 2)."""

    omega: float = 5.0

    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""
        return _bell(t * t) * (t * self.omega).cos()

    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi'(t) = -(omega_0 sin(omega_0 t) + t cos(omega_0 t)) exp(-t^2 / 2)."""
        bell, phase = _bell(t * t), t * self.omega
        wave = phase.cos().mul_(bell)
        return wave, phase.sin_().mul_(bell).mul_(-self.omega).addcmul_(wave, t, value=-1)


@dataclass(frozen=True)
class DerivativeOfGaussian(Wavelet):
    """psi(t) = t exp(-t^2 / 2)."""

    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""
        return _bell(t * t) * t

    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi'(t) = (1 - t^2) exp(-t^2 / 2)."""
        square = t * t
        bell = _bell(square)
        return bell * t, square.neg_().add_(1).mul_(bell)


@dataclass(frozen=True)
class Meyer(Wavelet):
    """psi(t) = sin(pi y) m(y), where y = |t|.

    m is 1 up to y = 1/2, 0 from y = 1, and cos(pi / 2 nu(2 y - 1)) between, where
    nu(z) = z^4 (35 - 84 z + 70 z^2 - 20 z^3).
    """

    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""
        y = t.abs()
        return _meyer_angle((2 * y - 1).clamp(0, 1)).cos().clamp(min=0) * (math.pi * y).sin()

    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi'(t) = sign(t) (pi cos(pi y) m(y) + sin(pi y) m'(y)), where nu'(z) = 140 z^3 (1 - z)^3."""
        y = t.abs()
        z = y.mul(2).sub_(1).clamp_(0, 1)
        angle, phase = _meyer_angle(z), y.mul_(math.pi)
        wave, window = phase.sin(), angle.cos().clamp_(min=0)
        slope = phase.cos_().mul_(window).mul_(math.pi)
        edge = z.mul_(1 - z).pow_(3).mul_(-140 * math.pi).mul_(angle.sin_())
        return window.mul_(wave), slope.addcmul_(edge, wave).mul_(t.sign())


@dataclass(frozen=True)
class Shannon(Wavelet):
    """psi(t) = sin(t) / t, times a symmetric Hamming window over the keys."""

    def initialise(self, parameters: Mapping[str, Tensor], scheme: str) -> None:
        """Like `Wavelet`, divided by the window's root mean square."""
        super().initialise(parameters, scheme)
        if scheme == "variance_preserving":
            weight = parameters["weight"]
            weight.div_(_hamming(weight).square().mean().sqrt())

    def pack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Like `Wavelet`, with the window inside w."""
        weight = parameters["weight"]
        return super().pack({**parameters, "weight": weight * _hamming(weight)})

    def mother(self, t: Tensor) -> Tensor:
        """psi(t)."""
        y = t.abs().clamp(min=_TINY)
        return y.sin() / y

    def mother_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi'(t) = (cos(t) - psi(t)) / t, or near 0, where that cancels, its series."""
        y, square = t.abs().clamp_(min=_TINY), t * t
        wave = y.sin().div_(y)
        direct = y.cos().sub_(wave).div_(y)
        small = square.clamp(max=1)  # infinity times 0 would be NaN
        series = (small / 88).sub_(1).mul_(small / 54).add_(1).mul_(small / 28).sub_(1).mul_(small / 10).add_(1)
        series.mul_(y).div_(-3)
        # A blend in place of `where`, which is slow: 1 below t^2 = 0.5, 0 above.
        near = (0.5 - square).mul_(1e30).clamp_(0, 1)
        return wave, direct.lerp_(series, near).mul_(t.sign())


# So small that sin(y) / y is 1.
_TINY = 1e-20
_HAT = 2 / (math.pi**0.25 * math.sqrt(3))


def _hamming(weight: Tensor) -> Tensor:
    """The window over the keys of `weight` [h, p, q].

    The formula is written out because exporters do not support `hamming_window`, and centred so that a single key has
    weight 1.
    """
    keys = weight.shape[2]
    places = torch.arange(keys, dtype=weight.dtype, device=weight.device) - (keys - 1) / 2
    return 0.54 + 0.46 * (places * (2 * math.pi / max(keys - 1, 1))).cos()


def _bell(square: Tensor) -> Tensor:
    return (square * -0.5).exp_()


def _meyer_angle(z: Tensor) -> Tensor:
    """pi / 2 nu(z)."""
    square = z * z  # pow(4) is slow
    return square * square * (((70 - 20 * z) * z - 84) * z + 35) * (math.pi / 2)
