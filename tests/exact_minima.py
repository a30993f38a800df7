"""Minima of small ReLU networks of two inputs, by enumeration of all activation patterns.

The box is a polygon. Each neuron's line cuts the polygons of the layer before; in every piece that
is left the network is affine, so its minimum is at a corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Layer = tuple[np.ndarray, np.ndarray]


def pieces(layers: Sequence[Layer], low: np.ndarray, high: np.ndarray) -> list[tuple]:
    """(corners [n, 2], W, b) of each piece of the box; there the network is W x + b."""
    box = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
    found = [(box, np.eye(2), np.zeros(2))]
    for i, (weight, bias) in enumerate(layers):
        found = [(p, weight @ W, weight @ b + bias) for p, W, b in found]
        if i == len(layers) - 1:
            break
        for j in range(len(bias)):
            cut = []
            for p, W, b in found:
                z = p @ W[j] + b[j]
                for sign in (1, -1):
                    part = clipped(p, sign * z)
                    if part is not None:
                        W2, b2 = W.copy(), b.copy()
                        if sign < 0:
                            W2[j], b2[j] = 0, 0
                        cut.append((part, W2, b2))
            found = cut
    return found


def clipped(polygon: np.ndarray, height: np.ndarray) -> np.ndarray | None:
    """The part of a convex polygon with height >= 0, a function linear on it; None: none."""
    if (height >= 0).all():
        return polygon
    if (height <= 0).all():
        return None
    kept = []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if height[i] >= 0:
            kept.append(polygon[i])
        if height[i] * height[j] < 0:
            t = height[i] / (height[i] - height[j])
            kept.append(polygon[i] + t * (polygon[j] - polygon[i]))
    return np.array(kept)


def minimum(
    layers: Sequence[Layer], low: np.ndarray, high: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """The least of each row's c . y over the box: rows [S, outputs] -> [S]."""
    return np.min([(rows @ (W @ p.T + b[:, None])).min(1) for p, W, b in pieces(layers, low, high)],
                  axis=0)


def least_of_larger(
    layers: Sequence[Layer], low: np.ndarray, high: np.ndarray, rows: np.ndarray, ends: np.ndarray
) -> float:
    """The least over the box of the larger of both rows' c . y - end: rows [2, outputs], ends [2].

    In a piece it is at a corner, or where an edge has both equal.
    """
    least = np.inf
    for corners, W, b in pieces(layers, low, high):
        values = (corners @ W.T + b) @ rows.T - ends
        least = min(least, values.max(1).min())
        for one, other in zip(values, np.roll(values, -1, 0), strict=True):
            d, e = one[0] - one[1], other[0] - other[1]
            if d * e < 0:
                least = min(least, (one + d / (d - e) * (other - one)).max())
    return float(least)
