"""Decisions about distances between many rows: as fast as a matrix product, as exact as differences.

|x|^2 + |y|^2 - 2 x.y is 20 times as fast as the sum of (x - y)^2 at 2,048 dimensions, but rounds: a point is not at 0
from its copy, and which of two equal distances is less depends on the block. So the product only rules out what is too
far by more than its rounding can be, and the few pairs left are measured by differences, which give a pair of rows the
same distance in either order, wherever they stand, and 0 if and only if they are equal.

Legend: N rows x, M rows y, D dimensions, n rows of x in a block, p pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .feature_sets import rows_at_once

# Rounding moves the squared distance by the product, that by differences and the squared radius against each other by
# about 6 (D + 3) u (|x|^2 + |y|^2) at most, u = 2^-53, in whatever order they are summed (Higham 2002, section 3.1);
# more than twice as much costs nothing.
ROUNDING = 16 * 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Block:
    """Lower bounds of the squared distances of some rows x to all rows y."""

    start: int  # of the rows of x
    lower: Tensor  # [n,M] at most the squared distance, and less by twice the slack of the pair at most
    slack_x: Tensor  # [n,1]
    slack_y: Tensor  # [M]; the slack of a pair is the sum of both


class DistanceBlocks:
    """The distances of rows x [N,D] to rows y [M,D], both float64, in blocks of `rows_at_once`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y
        centre = y.mean(dim=0)  # rows far from 0 but near each other would have a large slack
        self._centred_x, self._centred_y = x - centre, y - centre
        self._square_x, self._square_y = (rows.square().sum(dim=1) for rows in (self._centred_x, self._centred_y))
        self._rounding = ROUNDING * (x.shape[1] + 3)
        _, equal = torch.cat([x, y]).unique(dim=0, return_inverse=True)
        self._equal_x, self._equal_y = equal[: len(x)], equal[len(x) :]  # equal rows have equal numbers

    def __iter__(self) -> Iterator[Block]:
        """Yield all rows of x in order."""
        rows, squares_x, squares_y = rows_at_once(len(self._y)), self._square_x[:, None], self._square_y
        slack_x, slack_y = self._rounding * squares_x, self._rounding * squares_y
        for start in range(0, len(self._x), rows):
            part = slice(start, start + rows)
            products = torch.addmm(squares_y - slack_y, self._centred_x[part], self._centred_y.T, alpha=-2)
            lower = products.add_(squares_x[part] - slack_x[part])
            yield Block(start=start, lower=lower, slack_x=slack_x[part], slack_y=slack_y)

    def nearest(self, block: Block, count: int) -> Tensor:
        """Return distances [n,M] of a block: exact to the `count` nearest rows y and their ties, else infinity."""
        lowest, columns = block.lower.topk(count, dim=1, largest=False)
        limits = (lowest + 2 * (block.slack_x + block.slack_y[columns])).amax(dim=1, keepdim=True)
        rows, columns = (block.lower <= limits).nonzero(as_tuple=True)
        distances = torch.full_like(block.lower, torch.inf)
        distances[rows, columns] = self._exact(block.start + rows, columns)
        return distances

    def within(self, block: Block, radii: Tensor) -> Tensor:
        """Return which distances of a block are at most `radii`, bool [n,M]; the radii are exact, [n,1] or [M]."""
        squares = radii.square()
        inside = block.lower <= squares
        certain = block.lower + 2 * block.slack_y <= squares - 2 * block.slack_x
        rows, columns = (inside & ~certain).nonzero(as_tuple=True)
        limits = radii.expand_as(inside)[rows, columns]
        inside[rows, columns] = self._exact(block.start + rows, columns) <= limits
        return inside

    def _exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the distances [p] of x[rows] to y[columns]; each pair of different rows is measured once."""
        keys = self._equal_x[rows] * (len(self._x) + len(self._y)) + self._equal_y[columns]
        unique, which = keys.unique(return_inverse=True)
        pairs = keys.new_zeros(len(unique)).scatter_(0, which, torch.arange(len(keys)))  # of several, any one
        at_once = rows_at_once(self._x.shape[1])
        parts = [_distances(self._x[rows[part]], self._y[columns[part]]) for part in pairs.split(at_once)]
        return torch.cat(parts)[which]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance [p] of each row of x [p,D] to that of y [p,D], by differences; p changes none of them."""
    return torch.cdist(x[:, None], y[:, None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0, 0]
