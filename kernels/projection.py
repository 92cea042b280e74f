"""The layout of the Mix Block's one product: queries and keys, the value's column behind them, zeros at the end."""

from torch import Tensor

ROWS = 16
"""Projection and value are one product, whose columns are filled up to a multiple of this: then each of its rows begins
where matrix products and wide loads want it."""


def joined_rows(width: int) -> int:
    """Rows of the joined weight: D of queries and keys, one of the value, and zeros."""
    return -(-(width + 1) // ROWS) * ROWS


def split_projection(projection: Tensor, value: Tensor | None, width: int | None) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, N, D], and the value [B, N]: without `value` column D = `width` of the projection."""
    if value is not None:
        return projection, value
    queries, value, _ = projection.split([width, 1, projection.shape[2] - width - 1], dim=2)
    return queries, value.squeeze(2)
