"""Sets of few dimensions and the pieces that they are cut into.

The pieces of a set cover it, and each is half as large as what it was cut from, so that the share
of the volume that is proved is a sum of powers of 1/2.

    B  samples    P  pieces, each of one sample    d  dimensions    E  cuts that are possible

==========  =====================================  ==========================================
set         a piece                                a cut
==========  =====================================  ==========================================
box         ends of the d coordinates that move    at the middle of a coordinate: both parts
                                                   have the same number as end
directions  ends of t in [-1, 1]^d                 the same of t
hull        its vertices, as mixtures of the       an edge between two vertices of a word's
            set's: a simplex for each word         simplex, at its middle
==========  =====================================  ==========================================

Nothing here depends on ranks: the inputs are replicated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.problem.perturbations import PerturbationHull, PerturbationSegments, is_box

MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Piece:
    """Part of one sample's set."""

    sample: int
    place: torch.Tensor
    """Of a box and of directions [2, d]: lower and upper ends. Of a hull [m, K, K]: for each word
    that moves the mixtures of the set's vertices that are the piece's."""
    share: float = 1.0
    """Of the volume of the sample's set."""


def cut_into_pieces(x: Any) -> Set:
    """The set of a perturbed input.

    Args:
        x: a BoundedTensor [B, *shape].

    Raises:
        UserError: a set that pieces are not made of, by name, or one of too many dimensions.
    """
    ptb = getattr(x, "ptb", None)
    if isinstance(ptb, PerturbationSegments):
        found: Set = _Directions(ptb)
    elif isinstance(ptb, PerturbationHull):
        found = _Hull(ptb)
    elif is_box(ptb):
        found = _Box(x, ptb)
    else:
        name = f"an L{ptb.norm:g} ball" if auto_lirpa.is_ball(ptb) else type(ptb).__name__
        raise UserError(
            f"{name} cannot be cut into pieces of its kind: splits are for boxes (norm inf), "
            "directions and hulls"
        )
    most = max(found.dimensions)
    if most > MOST_DIMENSIONS:
        raise UserError(
            f"splits are for sets of at most {MOST_DIMENSIONS} dimensions, this one has {most}: "
            "perturb fewer numbers, or directions or substitutes, or leave splits out"
        )
    return found


class Set:
    """The sets of a batch of samples."""

    dimensions: list[int]
    """Of each sample."""

    def whole(self) -> list[Piece]:
        """Each sample's set as one piece."""
        raise NotImplementedError

    def perturbed(self, pieces: Sequence[Piece]) -> auto_lirpa.BoundedTensor:
        """Pieces as an input to be bounded, [P, *shape]."""
        raise NotImplementedError

    def ends(self, piece: Piece) -> torch.Tensor:
        """The piece's centre, and for each cut two points of the piece that it separates:
        [1 + 2 E, *shape]."""
        raise NotImplementedError

    def cut(self, piece: Piece, which: int) -> tuple[Piece, Piece]:
        """The two halves."""
        raise NotImplementedError


class _Intervals(Set):
    """Pieces with two ends in each of d dimensions."""

    def cut(self, piece: Piece, which: int) -> tuple[Piece, Piece]:
        low, high = piece.place
        middle = low[which] + (high[which] - low[which]) / 2
        left, right = piece.place.clone(), piece.place.clone()
        left[1, which] = right[0, which] = middle
        half = piece.share / 2
        return Piece(piece.sample, left, half), Piece(piece.sample, right, half)


class _Box(_Intervals):
    """Boxes, of which the coordinates that have a width move."""

    def __init__(self, x: torch.Tensor, ptb: Any) -> None:
        x = x.detach().as_subclass(torch.Tensor)
        if ptb.x_L is None or ptb.x_U is None:
            eps = torch.as_tensor(ptb.eps).to(x)
        self.low = x - eps if ptb.x_L is None else ptb.x_L.detach()
        self.high = x + eps if ptb.x_U is None else ptb.x_U.detach()
        self.moved = [
            (a < b).flatten().nonzero().flatten()
            for a, b in zip(self.low, self.high, strict=True)
        ]
        self.dimensions = [len(places) for places in self.moved]

    def whole(self) -> list[Piece]:
        return [
            Piece(b, torch.stack((low.flatten()[places], high.flatten()[places])))
            for b, (low, high, places) in enumerate(
                zip(self.low, self.high, self.moved, strict=True)
            )
        ]

    def _placed(self, piece: Piece, values: torch.Tensor) -> torch.Tensor:
        """Values of the moving coordinates [n, d] -> points [n, *shape]."""
        rest = self.low[piece.sample].flatten().expand(len(values), -1)
        points = rest.index_copy(1, self.moved[piece.sample], values)
        return points.view(-1, *self.low.shape[1:])

    def perturbed(self, pieces: Sequence[Piece]) -> auto_lirpa.BoundedTensor:
        both = torch.stack([self._placed(piece, piece.place) for piece in pieces], 1)
        low, high = both
        ptb = auto_lirpa.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        return auto_lirpa.BoundedTensor(low + (high - low) / 2, ptb)

    def ends(self, piece: Piece) -> torch.Tensor:
        low, high = piece.place
        return self._placed(piece, _faces(low + (high - low) / 2, low, high))


class _Directions(_Intervals):
    """x + sum t_i D_i with t in a box."""

    def __init__(self, ptb: PerturbationSegments) -> None:
        self.centre, self.directions = ptb.centre.detach(), ptb.directions.detach()
        self.dimensions = [self.directions.shape[1]] * len(self.centre)

    def whole(self) -> list[Piece]:
        ones = self.centre.new_ones(self.directions.shape[1])
        return [Piece(b, torch.stack((-ones, ones))) for b in range(len(self.centre))]

    def _points(self, piece: Piece, t: torch.Tensor) -> torch.Tensor:
        """Values of t [n, d] -> points [n, *shape]."""
        along = torch.tensordot(t, self.directions[piece.sample], 1)
        return self.centre[piece.sample] + along

    def perturbed(self, pieces: Sequence[Piece]) -> auto_lirpa.BoundedTensor:
        samples = [piece.sample for piece in pieces]
        low, high = torch.stack([piece.place for piece in pieces], 1)
        half = ((high - low) / 2).view(*low.shape, *[1] * (self.centre.ndim - 1))
        middle = (low + high) / 2
        centre = torch.cat([
            self._points(piece, t.unsqueeze(0)) for piece, t in zip(pieces, middle, strict=True)
        ])
        ptb = PerturbationSegments(centre, self.directions[samples] * half)
        return auto_lirpa.BoundedTensor(centre, ptb)

    def ends(self, piece: Piece) -> torch.Tensor:
        low, high = piece.place
        return self._points(piece, _faces((low + high) / 2, low, high))


def _faces(middle: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The middle of a box and of its faces, two for each dimension: [1 + 2 d, d]."""
    d = len(middle)
    points = middle.repeat(1 + 2 * d, 1)
    each = torch.arange(d, device=middle.device)
    points[1 + 2 * each, each] = low
    points[2 + 2 * each, each] = high
    return points


class _Hull(Set):
    """At each word that moves a simplex; a repeated vertex is the first one again."""

    def __init__(self, ptb: PerturbationHull) -> None:
        self.vertices = ptb.vertices.detach()  # [B, S, K, h]
        apart = (self.vertices != self.vertices[:, :, :1]).any(-1)  # [B, S, K]
        self.words = [sample.any(-1).nonzero().flatten().tolist() for sample in apart]
        self.corners = [
            [[0, *apart[b, s].nonzero().flatten().tolist()] for s in words]
            for b, words in enumerate(self.words)
        ]
        self.dimensions = [sum(len(own) - 1 for own in sample) for sample in self.corners]

    def whole(self) -> list[Piece]:
        K = self.vertices.shape[2]
        one = torch.eye(K, dtype=self.vertices.dtype, device=self.vertices.device)
        return [Piece(b, one.repeat(len(words), 1, 1)) for b, words in enumerate(self.words)]

    def _edges(self, piece: Piece) -> list[tuple[int, int, int]]:
        """(word, vertex, vertex)."""
        return [
            (w, i, j) for w, own in enumerate(self.corners[piece.sample])
            for i, j in itertools.combinations(own, 2)
        ]

    def _vertices(self, piece: Piece) -> torch.Tensor:
        """[S, K, h] of a piece."""
        found = self.vertices[piece.sample].clone()
        words = self.words[piece.sample]
        found[words] = piece.place @ self.vertices[piece.sample][words]
        return found

    def perturbed(self, pieces: Sequence[Piece]) -> auto_lirpa.BoundedTensor:
        vertices = torch.stack([self._vertices(piece) for piece in pieces])
        return auto_lirpa.BoundedTensor(vertices[:, :, 0].clone(), PerturbationHull(vertices))

    def ends(self, piece: Piece) -> torch.Tensor:
        vertices, words = self._vertices(piece), self.words[piece.sample]
        centre = vertices[:, 0].clone()
        for s, own in zip(words, self.corners[piece.sample], strict=True):
            centre[s] = vertices[s, own].mean(0)
        points = [centre]
        for w, *both in self._edges(piece):
            for vertex in both:
                point = centre.clone()
                point[words[w]] = vertices[words[w], vertex]
                points.append(point)
        return torch.stack(points)

    def cut(self, piece: Piece, which: int) -> tuple[Piece, Piece]:
        w, *both = self._edges(piece)[which]
        middle = (piece.place[w, both[0]] + piece.place[w, both[1]]) / 2
        own = self.corners[piece.sample][w]
        halves = []
        for vertex in both:
            place = piece.place.clone()
            place[w, vertex] = middle
            for k in range(place.shape[1]):  # repeats of the first
                if k not in own:
                    place[w, k] = place[w, 0]
            halves.append(Piece(piece.sample, place, piece.share / 2))
        return halves[0], halves[1]
