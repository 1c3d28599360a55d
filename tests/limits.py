"""Queries on which the bound of exact skipping is as tight as it can be made, or broken by a little.

All keys before a cut are one vector, those from it on zero, and queries are along that vector: what lies before the cut
then weighs what the bound says, but for its spare 1/16 bit and the rounding that it allows for.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import alibi

LARGEST = 2.0**-24  # of a row's total, what is skipped


class Layout(NamedTuple):
    """How keys to skip are looked for: `tile` queries have one first key, a multiple of `block`. A row's total is
    bounded from its keys in its own `band` keys and those before; without a band, from the block before its tile's on.
    """

    tile: int
    block: int
    band: int | None
    rho: float  # relative error of a product q.k

    @property
    def length(self) -> int:
        """Of a call that skips in several tiles, of which the last one is a part."""
        return 4 * self.block + self.tile + 10

    def near(self, row: Tensor) -> Tensor:
        """The first of the keys from which a row's total is bounded."""
        first, size = (row // self.tile * self.tile, self.block) if self.band is None else (row, self.band)
        return (first // size - 1).clamp(min=0) * size


def along(slopes: Tensor, s: int, where: Layout, dtype: torch.dtype, *, beyond: bool) -> tuple[int, Tensor]:
    """A cut, and scale * q.k (heads, s) with the keys before it, for heads that share them: as large as lets the cut
    pass. beyond: for one query of each tile it is larger, so that what lies before the cut weighs more than it may, and
    that tile cannot be cut there.
    """
    slopes, row = slopes.double(), torch.arange(s)
    last, near = (s - 1) // where.tile * where.tile, where.near(row)

    def sizes(cut: int) -> Tensor:
        return torch.stack([longest(m, row - cut + 1, near_sum(m, row - near + 1), where.rho) for m in slopes])

    cuts = range(int(near[last]) // where.block * where.block, 0, -where.block)
    cut = next((cut for cut in cuts if (sizes(cut)[:, last] > 0).all()), where.block)
    found = rounded(sizes(cut).clamp(min=0), dtype)
    if beyond:
        larger = torch.stack([past(m, row - cut + 1, cut) for m in slopes])
        chosen = (row % where.tile == 3) & (larger > 0)
        found = torch.where(chosen, rounded(larger, dtype, up=True), found)
    return cut, found


def least(dtype: torch.dtype, rho: float) -> float:
    """Of what may be lost at most, what is lost at least where queries are as long as the cut allows: 2^-1/16, less
    their rounding in dtype and, of the larger ones, 2 rho.
    """
    return 0.5 if rho > alibi._RHO else 0.85 if dtype == torch.bfloat16 else 0.9


def near_sum(slope: Tensor, count: Tensor) -> Tensor:
    """The log of what a query's own key and those before it, `count` in all, weigh together where q.k = 0."""
    return torch.log(torch.expm1(-slope * count) / torch.expm1(-slope))


def longest(slope: Tensor, away: Tensor, near: Tensor, rho: float) -> Tensor:
    """The largest scale * |q||k| with which keys, the nearest `away` before the query, may be dropped from a total of
    at least exp(near): the bound solved for it, less 1/1000 for its rounding.
    """
    terms = torch.log(1 / slope + 0.5 + slope / 12)
    return (slope * away - (24 + 1 / 16) * math.log(2) - terms + near) / (1 + 2 * rho) - 1e-3


def past(slope: Tensor, away: Tensor, keys: int) -> Tensor:
    """The scale * q.k with which `keys` keys, the nearest `away` before the query, weigh 1.05 * 2^-24 of all, where it
    is 0 for those after them.
    """
    after, before = near_sum(slope, away - 1), near_sum(slope, torch.tensor(keys))
    return slope * away + math.log(1.05 * LARGEST) + after - before


def rounded(x: Tensor, dtype: torch.dtype, *, up: bool = False) -> Tensor:
    """To what dtype holds, towards zero or away from it; x in float64."""
    mantissa, exponent = torch.frexp(x)
    places = 1 - math.log2(torch.finfo(dtype).eps)
    whole = mantissa * 2**places
    return torch.ldexp((whole.ceil() if up else whole.floor()) / 2**places, exponent)
