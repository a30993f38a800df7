"""Bounds over a set of few dimensions, piece by piece, until all of it is proved.

A set that is not proved is cut in two, across the direction that moves the margin most; pieces go
through as a batch, proved ones leave (`covering`). What is left open after so many cuts says how
much of the set is proved. All decisions are made from the first rank's numbers, so every rank
bounds the same pieces in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete.covering import Leaf, cover
from lirpa_megatron.complete.pieces import Piece, Set, cut_into_pieces
from lirpa_megatron.crown.clean_values import value_at
from lirpa_megatron.crown.options import FORWARD, check_method
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.model_ranks import ModelRanks

Margin = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(Rows [P, S], the samples they are of [P]) -> margins [P]. It is given lower bounds, and values
at points; above 0: proved, or no counterexample. It must not decrease where rows increase."""

_NUMBERS = 2**23
"""Numbers that a node of all pieces together may have."""
_MOST_PIECES, _POINTS = 64, 256
"""Pieces that are bounded, and points that are computed at once."""


@dataclass(frozen=True)
class SplitBounds:
    """What `bound_by_splits` finds. The same on every rank.

    Attributes:
        lower, upper: bounds over all pieces of a sample's set, [B, S] or [B, *output shape]; upper
            None if it was not asked for.
        margin: the smallest lower bound of the margin over the pieces, [B] float64.
        proved: share of each set's volume that is proved, [B] float64; 1: all of it.
        pieces: how many a set was cut into, [B].
        counterexamples: sample -> a point of its set [*shape] at which the model's own forward has
            a margin of at most 0 (without a live check: `margin_at`).
        is_over: the time ended first.
    """

    lower: torch.Tensor
    upper: torch.Tensor | None
    margin: torch.Tensor
    proved: torch.Tensor
    pieces: torch.Tensor
    counterexamples: dict[int, torch.Tensor] = field(default_factory=dict)
    is_over: bool = False


def bound_by_splits(
    bounded: Any, x: Any, C: torch.Tensor | None = None, *, splits: int, method: str = "CROWN",
    margin: Margin | None = None, margin_at: Margin | None = None,
    is_over: Callable[[], bool] = lambda: False, at_once: int | None = None,
    stop_at_counterexample: bool = True, bound_upper: bool = True, **kwargs: Any,
) -> SplitBounds:
    """Bounds over a set of at most 16 dimensions, which is cut in two where it is not proved.

    Every rank calls it with the same arguments. The results have no gradients.

    Args:
        bounded: a BoundedModule whose output is replicated.
        x: its inputs; one of them is perturbed by a box, directions or a hull.
        C: as for `compute_bounds`.
        splits: most cuts of each sample's set; 0: the set as a whole.
        method: of `compute_bounds`, for each piece.
        margin: what is to be proved; None: that all rows are above 0.
        margin_at: the model's margins at points of the set: points [N, *shape], the samples they
            are of [N] -> [N]. None: by the graph of `bounded`, or over pipeline stages not at all.
        is_over: whether to stop, asked on every rank before each batch, which must say the same.
        at_once: pieces in a batch; None: by the size of the model's nodes.
        stop_at_counterexample: whether a sample is left where it is once there is one.
        bound_upper: whether upper bounds are computed, too.
        **kwargs: of `compute_bounds`.

    Raises:
        UserError: `splits` below 0, no perturbed input or several, a set that cannot be cut, or of
            too many dimensions.
        NotImplementedError: a sharded output; a hull with rounding="outward".
        Whatever `compute_bounds` raises.
    """
    x = (x,) if isinstance(x, torch.Tensor) else tuple(x)
    ranks = ModelRanks(bounded.context.collectives.group, bounded.pipeline)
    with ranks.guard("bound_by_splits"):
        if not isinstance(splits, int) or isinstance(splits, bool) or splits < 0:
            raise UserError(f"splits is {splits!r}: give a whole number of at least 0")
        spmd.check_replicated(
            ranks.group, {"splits": f"{splits} {at_once}"}, "every rank must pass the same"
        )
        search = _Search(
            bounded, ranks, x, C, method, margin or _smallest, margin_at, at_once,
            stop_at_counterexample, {"bound_upper": bound_upper, **kwargs},
        )
        return search.run(splits, is_over)


def _smallest(rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return rows.reshape(len(rows), -1).amin(1)


class _Search:
    """The pieces of one call."""

    def __init__(
        self, bounded: Any, ranks: ModelRanks, x: tuple[Any, ...], C: torch.Tensor | None,
        method: str, margin: Margin, margin_at: Margin | None, at_once: int | None, stops: bool,
        kwargs: dict[str, Any],
    ) -> None:
        self.bounded, self.x, self.C, self.margin = bounded, x, C, margin
        self.method, self.kwargs, self.stops = check_method(method), kwargs, stops
        self.ranks, self.margin_at = ranks, margin_at
        if not kwargs.get("bound_lower", True):
            raise ValueError("pieces are proved by lower bounds: leave out bound_lower=False")
        if bounded.has_output and bounded.sharded[bounded.final_name]:
            raise NotImplementedError(
                "splits of a sharded output: build the layer with gather_output=True"
            )
        perturbed = [i for i, value in enumerate(x) if getattr(value, "ptb", None) is not None]
        if len(perturbed) != 1:
            raise UserError(f"splits are for one perturbed input, here are {len(perturbed)}")
        (self.index,) = perturbed
        self.set: Set = cut_into_pieces(x[self.index])
        if bounded.rounding is not None and not hasattr(self.set, "low"):
            raise NotImplementedError("rounding='outward' with splits is for boxes")
        self.at_once = self._at_once() if at_once is None else max(1, at_once)
        self.found: dict[int, torch.Tensor] = {}

    def _at_once(self) -> int:
        """Pieces whose tensors have a bearable size; the same for a call on every rank."""
        nodes = self.bounded.named_nodes().values()
        tp = self.bounded.context.collectives.size
        largest = max(
            math.prod(node.output_shape[1:]) * (tp if self.bounded.sharded[node.name] else 1)
            for node in nodes if node.from_input and node.output_shape is not None
        )
        d, each = max(self.set.dimensions), largest
        if self.method in FORWARD:
            each *= math.comb(d + self.bounded.own_options.order, d)
        most = min(_MOST_PIECES, max(1, _NUMBERS // each))
        x = self.x[self.index]
        if self.method not in ("IBP", "forward") and x.ndim > 2:
            # Norms and attention have affine forms up to a size of the whole batch.
            form = largest * x[0].numel()
            limit = self.bounded.own_options.form_limit
            most = min(most, max(1, limit // form)) if form <= limit else most
        return most if self.bounded.stages is None else self.ranks.broadcast_object(most)

    # ------------------------------------------------------------------------ the search

    def run(self, splits: int, is_over: Callable[[], bool]) -> SplitBounds:
        roots = self._bound([(piece, None) for piece in self.set.whole()])
        cut = cover(roots, self._bound, self._cut, splits, self.at_once, is_over)
        samples = range(len(roots))
        leaves = [cut.of(sample) for sample in samples]
        lower = torch.stack([_over(own, 0).amin(0) for own in leaves])
        upper = None
        if roots[0].bounds[1] is not None:
            upper = torch.stack([_over(own, 1).amax(0) for own in leaves])
        return SplitBounds(
            lower, upper,
            torch.tensor([min(leaf.margin for leaf in own) for own in leaves], dtype=torch.float64),
            torch.tensor([cut.share(sample) for sample in samples], dtype=torch.float64),
            torch.tensor([len(own) for own in leaves]), self.found, cut.is_over,
        )

    def _inputs(self, first: Any, samples: list[int]) -> tuple[Any, ...]:
        batch = len(self.x[self.index])
        return tuple(
            first if i == self.index
            else value[samples] if isinstance(value, torch.Tensor) and value.shape[:1] == (batch,)
            else value
            for i, value in enumerate(self.x)
        )

    def _bound(self, pieces: list[tuple[Piece, Leaf[Piece] | None]]) -> list[Leaf[Piece]]:
        """Bounds of pieces; never worse than those of what they were cut from."""
        leaves: list[Leaf[Piece]] = []
        for first in range(0, len(pieces), self.at_once):
            some = pieces[first : first + self.at_once]
            samples = [piece.sample for piece, _ in some]
            threshold = self.kwargs.get("decision_thresh")
            words = dict(self.kwargs)
            if isinstance(threshold, torch.Tensor) and threshold.ndim:
                words["decision_thresh"] = threshold[samples]
            optimized = self.method in ("CROWN-Optimized", "auto")
            with contextlib.nullcontext() if optimized else torch.no_grad():
                found = self.bounded.compute_bounds(
                    self._inputs(self.set.perturbed([piece for piece, _ in some]), samples),
                    C=None if self.C is None else self.C[samples], method=self.method, **words,
                )
            lower, upper = (
                None if side is None else self.ranks.broadcast_tensor(side, "bounds of pieces")
                for side in found[:2]
            )
            for i, (_, parent) in enumerate(some):
                if parent is not None:
                    lower[i] = torch.maximum(lower[i], parent.bounds[0])
                    if upper is not None:
                        upper[i] = torch.minimum(upper[i], parent.bounds[1])
            margins = self._agreed(self.margin(lower, torch.tensor(samples, device=lower.device)))
            leaves += [
                Leaf(piece, margins[i], (lower[i], None if upper is None else upper[i]))
                for i, (piece, _) in enumerate(some)
            ]
        return leaves

    def _agreed(self, margins: torch.Tensor) -> list[float]:
        """The first rank's; NaN proves nothing."""
        margins = torch.where(margins.isnan(), -math.inf, margins).double()
        return self.ranks.broadcast_tensor(margins, "margins of pieces").tolist()

    # --------------------------------------------------------------------------- cutting

    def _cut(self, leaves: list[Leaf[Piece]]) -> list[tuple[Piece, Piece] | None]:
        """The halves of each piece, across the cut that the margin depends on most."""
        halves: dict[int, tuple[Piece, Piece]] = {}
        rest = {
            i: leaf.piece for i, leaf in enumerate(leaves)
            if self.set.dimensions[leaf.piece.sample] and not self._is_refuted(leaf.piece)
        }
        points = {i: self.set.ends(piece) for i, piece in rest.items()}
        margins = self._values(rest, points)
        for i, piece in rest.items():
            self._try(piece.sample, points[i], margins[i])
        for i, piece in rest.items():
            if not self._is_refuted(piece):
                halves[i] = self.set.cut(piece, _widest(margins[i], points[i]))
        return [halves.get(i) for i in range(len(leaves))]

    def _is_refuted(self, piece: Piece) -> bool:
        return self.stops and piece.sample in self.found

    def _values(
        self, pieces: dict[int, Piece], points: dict[int, torch.Tensor]
    ) -> dict[int, list[float] | None]:
        """Margins at points of each piece; None where the model cannot be run as a whole."""
        if not pieces or (self.margin_at is None and self.bounded.stages is not None):
            return dict.fromkeys(pieces)
        of = [piece.sample for i, piece in pieces.items() for _ in points[i]]
        every, margins = torch.cat(list(points.values())), []
        for first in range(0, len(of), _POINTS):
            some = of[first : first + _POINTS]
            margins += self._at(every[first : first + _POINTS], some, self.margin_at)
        left = iter(margins)
        return {i: list(itertools.islice(left, len(own))) for i, own in points.items()}

    def _at(
        self, points: torch.Tensor, samples: list[int], margin_at: Margin | None,
        live: bool = False,
    ) -> list[float]:
        """Margins at points, of the graph or of the `live` model where no function is given."""
        inputs = self._inputs(points, samples)
        of = torch.tensor(samples, device=points.device)
        with torch.no_grad(), auto_lirpa.running(inputs), full_precision(self.bounded.device):
            if margin_at is not None:
                return self._agreed(margin_at(points, of))
            y = self.bounded.live.value(inputs) if live else value_at(self.bounded, inputs)
        y = y.detach().as_subclass(torch.Tensor)
        if self.C is not None:
            y = torch.einsum("nsf,nf->ns", self.C[samples].flatten(2).to(y), y.reshape(len(y), -1))
        return self._agreed(self.margin(y, of))

    def _try(self, sample: int, points: torch.Tensor, margins: list[float] | None) -> None:
        """The point with the smallest margin, if the model itself says that it is one."""
        if margins is None or sample in self.found:
            return
        worst = min(range(len(margins)), key=margins.__getitem__)
        if not -math.inf < margins[worst] <= 0:
            return
        live = self.bounded.live is not None and self.bounded.stages is None
        if not live and self.margin_at is None:
            return  # nobody could confirm it
        point = points[worst : worst + 1]
        (margin,) = self._at(point, [sample], None if live else self.margin_at, live=live)
        if -math.inf < margin <= 0:
            self.found[sample] = point[0].detach()


def _over(leaves: Sequence[Leaf[Piece]], side: int) -> torch.Tensor:
    return torch.stack([leaf.bounds[side] for leaf in leaves])


def _widest(margins: list[float] | None, points: torch.Tensor) -> int:
    """The cut across which the margin moves most, in a line or bent; else the longest way.

    Args:
        margins: at the centre and on both sides of each cut, [1 + 2 E]; None: not known.
        points: where, [1 + 2 E, *shape].
    """
    ends = points[1:].flatten(1)
    lengths = torch.linalg.vector_norm(ends[0::2] - ends[1::2], dim=1).tolist()
    if margins is None or not all(map(math.isfinite, margins)):
        return max(range(len(lengths)), key=lengths.__getitem__)
    middle, sides = margins[0], margins[1:]
    moved = [
        abs(a - b) + abs(a + b - 2 * middle) for a, b in zip(sides[::2], sides[1::2], strict=True)
    ]
    return max(range(len(moved)), key=lambda e: (moved[e], lengths[e]))
