"""The expressive score, z^2 / (1 + z^2) over its sum. Source: arXiv 2407.18601.

Where all scores of a row are so small that 1 + z^2 is 1 to the last bit, the weight is z^2, whose size the normaliser
cancels. Both forms below keep such rows exact: they measure queries, keys and scores in units of a power of two, which
changes no digit, so that neither products nor squares underflow.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from .score import Score, Slices

# --- the reference form -----------------------------------------------------------------------------------------------


def weights(q_BNLH: Tensor, k_BNSH: Tensor, bias: Tensor | None, hide: Tensor | None) -> Tensor:
    """a exp(bias) / sum over keys with a = z^2 / (1 + z^2) (2407.18601); a row without weight is zero."""
    # The units are detached: the result does not depend on them, so that as constants they give its derivative.
    unit_q, unit_k = _unit(q_BNLH, (-1,)), _unit(k_BNSH, (-2, -1))
    z_BNLS = (q_BNLH / unit_q) @ (k_BNSH / unit_k).transpose(-1, -2)
    if hide is not None:
        z_BNLS = z_BNLS.masked_fill(hide, 0.0)  # z = 0 is weight 0
    factor, one = _measure(z_BNLS.detach(), unit_q * unit_k)
    z_BNLS = z_BNLS * factor
    # Two ways to write a, so that neither it nor its derivative overflows or loses digits.
    near = z_BNLS.abs() <= 1.0
    # torch.where differentiates both branches, and the unused one must not be infinite: 0 * inf would be NaN.
    square = z_BNLS.masked_fill(~near, 0.0).square()
    a_BNLS = torch.where(near, square / (1.0 + one * square), 1.0 / (1.0 + z_BNLS.masked_fill(near, 1.0).pow(-2.0)))
    if bias is not None:
        a_BNLS = _with_bias(a_BNLS, bias, hide)
    # Divided by its total taken as a constant first: the normaliser cancels any constant, and where one key has all
    # the weight, a is now 1 and the two terms of its derivative cancel to the last bit.
    a_BNLS = a_BNLS / _total(a_BNLS.detach())
    return a_BNLS / _total(a_BNLS)


def _unit(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The unit for the numbers along ``dim``: 1, or where all are small a power of two in which they are not."""
    if any(x.shape[d] == 0 for d in dim):
        return torch.ones_like(x.detach().sum(dim, keepdim=True))
    tiny = torch.finfo(x.dtype).tiny
    # Two numbers below tiny^(1/4) have a product below tiny^(1/2), whose square has lost digits to underflow.
    largest = x.detach().abs().amax(dim, keepdim=True)
    # tiny is 2^-126 (float64: 2^-1022), so that its root is a power of two and a division by it is exact.
    return torch.ones_like(largest).masked_fill(largest < tiny**0.25, tiny**0.5)


def _measure(z_BNLS: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, the factor from scores in units to z, and the share of z^2 in 1 + z^2: 1, or 0 in a row of small scores.

    There the factor makes the largest score of the row 1, and the weight is z^2.
    """
    if z_BNLS.shape[-1] == 0:
        return unit, torch.ones_like(unit)
    largest_BNL1 = z_BNLS.abs().amax(dim=-1, keepdim=True)
    # For z below eps, z^2 is below eps^2 and disappears in 1 + z^2. A row of zeros stays one without weight.
    small = (largest_BNL1 > 0.0) & (largest_BNL1 * unit < torch.finfo(z_BNLS.dtype).eps)
    return torch.where(small, 1.0 / largest_BNL1, unit), 1.0 - small.to(z_BNLS.dtype)


def _with_bias(a_BNLS: Tensor, bias: Tensor, hide: Tensor | None) -> Tensor:
    """a exp(bias - c), c per row the largest log a + bias that is visible, so that no factor overflows."""
    tiny = torch.finfo(a_BNLS.dtype).tiny
    a_BNLS = a_BNLS.masked_fill(a_BNLS < tiny, 0.0)  # denormal weights would need factors beyond the dtype
    if a_BNLS.shape[-1] == 0:
        return a_BNLS
    log_weight = a_BNLS.detach().log() + bias.detach()
    if hide is not None:
        log_weight = log_weight.masked_fill(hide, -math.inf)
    largest_BNL1 = log_weight.amax(dim=-1, keepdim=True)
    largest_BNL1 = largest_BNL1.masked_fill(largest_BNL1 == -math.inf, 0.0)  # a row without weight
    # Where a is 0 the exponent may be anything; elsewhere it is at most -log(a), which this bound admits.
    return a_BNLS * (bias - largest_BNL1).clamp(max=-math.log(tiny)).exp()


def _total(a_BNLS: Tensor) -> Tensor:
    """The sum over keys, 1 in a row without weight."""
    total_BNL1 = a_BNLS.sum(dim=-1, keepdim=True)
    return total_BNL1.masked_fill(total_BNL1 == 0.0, 1.0)


# --- the tiled form, which shares nothing with the above --------------------------------------------------------------


class Tiles:
    """See :class:`.score.Tiles`. Three passes over a tile in the ordinary case, the careful way where digits are lost.

    :meth:`slopes` always takes the careful way, because small scores have large derivatives.
    """

    def __init__(self, q_BNLH: Tensor, k_BNSH: Tensor) -> None:
        self._given_q, self._given_k = q_BNLH, k_BNSH
        self._unit_q, self._unit_k = _power_of_two(q_BNLH, (-1,)), _power_of_two(k_BNSH, (-2, -1))
        self._faint = torch.finfo(q_BNLH.dtype).tiny ** 0.63  # below it a row of squares has lost digits to underflow

    @cached_property
    def q(self) -> Tensor:
        """The queries in their units."""
        return _in(self._unit_q, self._given_q)

    @cached_property
    def k(self) -> Tensor:
        """The keys in their units."""
        return _in(self._unit_k, self._given_k)

    def weights(self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None) -> tuple[Tensor, Tensor]:
        """z^2 / (1 + z^2) of a tile, and its sum over keys."""
        # A bias needs the careful way: it may lift weights that the plain one has rounded to 0.
        if bias is None:
            a = _plain(self._given_q[rows] @ self._given_k[keys].transpose(-1, -2), hide)
            total = _divisor(a)
            # An infinite divisor marks a row of zeros, which may be one whose squares have all underflowed.
            faint = (total < self._faint) | (total == math.inf)
            if not _any(faint):
                return a, total
            # Row by row: the bits of a row must not depend on what another one sees.
            careful, careful_total = self._careful_weights(rows, keys, bias, hide)
            return torch.where(faint, careful, a), torch.where(faint, careful_total, total)
        return self._careful_weights(rows, keys, bias, hide)

    def _careful_weights(
        self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        z, units = self._scores(rows, keys)
        a = _careful(z, units, bias, hide)
        return a, _divisor(a)

    def slopes(self, rows: Slices, keys: Slices, bias: Tensor | None, hide: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised weights, and 2 z / (1 + z^2)^2 over the same sum."""
        z, units = self._scores(rows, keys)
        a = _careful(z, units, bias, hide, derive=True)
        total = _divisor(a)
        return a.div_(total), z.div_(total)

    def gradients(self, dq_BNLH: Tensor, dk_BNSH: Tensor) -> tuple[Tensor, Tensor]:
        """Out of the units again."""
        return dq_BNLH / self._unit_q, dk_BNSH / self._unit_k

    def _scores(self, rows: Slices, keys: Slices) -> tuple[Tensor, Tensor]:
        """Scores of a tile in units, and these units, one for each row."""
        z = self.q[rows] @ self.k[keys].transpose(-1, -2)
        return z, self._unit_q[rows] * self._unit_k[rows[:2]]


def _power_of_two(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """A unit in which numbers too small for their products to have all digits are none; 1 for all others."""
    if 0 in x.shape:
        return x.new_ones([1 if d - x.dim() in dim else size for d, size in enumerate(x.shape)])
    limits = torch.finfo(x.dtype)
    # The infinity norm finds the largest number in one pass, without a copy of the absolute values.
    small: Tensor = torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=True) < limits.tiny**0.25
    return (~small).to(x.dtype).masked_fill_(small, limits.tiny**0.5)


def _any(there: Tensor) -> bool:
    """Whether any is true. On an accelerator yes: an answer would wait for its queue, and yes is right, only slower."""
    return there.device.type != "cpu" or bool(there.any())


def _in(units: Tensor, x: Tensor) -> Tensor:
    """``x`` measured in units; itself, not a copy, in the ordinary case that all of them are 1."""
    return x / units if _any(units != 1.0) else x


def _plain(z: Tensor, hide: Tensor | None) -> Tensor:
    """z^2 / (1 + z^2) in z's memory, as 1 / (1 + z^-2): three passes, and neither 0 nor infinity needs care."""
    if hide is not None:
        z.masked_fill_(hide, 0.0)
    return z.pow_(-2.0).add_(1.0).reciprocal_()


def _careful(z: Tensor, units: Tensor, bias: Tensor | None, hide: Tensor | None, *, derive: bool = False) -> Tensor:
    """Weights before division by their sum, from scores in ``units``; these become the derivative, if it is wanted."""
    limits = torch.finfo(z.dtype)
    if hide is not None:
        z.masked_fill_(hide, 0.0)  # z = 0 is weight 0
    # The rows are complete in a tile, so that this is the row's largest score.
    largest = torch.linalg.vector_norm(z, math.inf, dim=-1, keepdim=True)
    small = (largest > 0.0) & (largest * units < limits.eps)
    factor = torch.where(small, 1.0 / largest, units)
    if _any(factor != 1.0):
        z *= factor
    far = limits.max**0.48  # beyond, a is 1 and its derivative 0, to the last bit; z^2 is still finite
    if _any(largest * factor > far):
        z.clamp_(-far, far)
    square = z.square()
    inverse = ((square * ~small) if _any(small) else square).add(1.0).reciprocal_()
    a = square.mul_(inverse)
    if derive:
        # da/dz = 2 z / (1 + z^2)^2; the factor leads from z back to scores in units, by the chain rule.
        z.mul_(inverse).mul_(inverse).mul_(2.0 * factor)
    if bias is not None:
        faint = a < limits.tiny
        a.masked_fill_(faint, 0.0)
        shift = (a.log() + bias).amax(dim=-1, keepdim=True)
        shift.masked_fill_(shift == -math.inf, 0.0)
        # Where the weight is 0 the exponent may be anything, so it is bounded.
        grown = (bias - shift).clamp_(max=-math.log(limits.tiny)).exp_()
        a.mul_(grown)
        if derive:
            # A weight that was set to 0 has the derivative 0 as well, or the two terms of the gradient would disagree.
            z.mul_(grown).masked_fill_(faint, 0.0)
    return a


def _divisor(a: Tensor) -> Tensor:
    """The sum over keys, infinity in a row without weight."""
    total = a.sum(dim=-1, keepdim=True)
    return total.masked_fill_(total == 0.0, math.inf)


EXPRESSIVE = Score(
    name="expressive",
    label="Expressive",
    equations=("S_i = Z_i² / (1 + Z_i²), each row divided by its sum", "Z_i = {z}"),
    source="arXiv 2407.18601",
    lowest_hides=True,
    weights=weights,
    tiles=Tiles,
)
