"""Inputs of a network from points behind the normalisation at its input.

Each number behind it is a monotone function of one input (`networks.normalisation`). Between the
two ends of an input it is taken to be a line, which it is but for rounding in a normalisation
(x - m) / d. What comes out is a proposal, to be tried on the network itself.
"""

from __future__ import annotations

import numpy as np
import torch

from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.property import Region

_MOST = 64
"""Inputs that move, each of which is moved once to see what depends on it."""


class Preimages:
    """Of points of a region's box.

    Args:
        loaded: a network with a normalisation, in one pipeline stage.
        region: whose box it is.
    """

    def __init__(self, loaded: Loaded, region: Region) -> None:
        low, high = region.lower, region.upper
        self.moving = np.nonzero(low < high)[0].tolist()
        self.known = len(self.moving) <= _MOST
        self.base = torch.from_numpy(low)
        if not self.known:
            return
        at_low = loaded.image(low)
        self.places, starts, ends = [], [], []
        for i in self.moving:
            moved = low.copy()
            moved[i] = high[i]
            image = loaded.image(moved)
            place = int((image - at_low).abs().argmax())
            self.places.append(place)
            starts.append(at_low[place])
            ends.append(image[place])
        self.start, self.length = torch.stack(starts), torch.stack(ends) - torch.stack(starts)
        self.width = torch.from_numpy(high - low)[self.moving]

    def of(self, points: torch.Tensor) -> torch.Tensor | None:
        """[P, n] behind the normalisation -> [P, n_in] float64; None: too many inputs move."""
        if not self.known:
            return None
        share = (points[:, self.places].double().cpu() - self.start) / self.length
        inputs = self.base.repeat(len(points), 1)
        inputs[:, self.moving] += share.nan_to_num(nan=0.5).clamp(0, 1) * self.width
        return inputs
