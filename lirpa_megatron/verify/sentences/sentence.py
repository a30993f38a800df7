"""One sentence: what the model says, what is certified about it, and what an attack finds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.adapters.embeddings import embed
from lirpa_megatron.adapters.stages import pipeline_of
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.complete.input_splits import SplitBounds, bound_by_splits
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.problem.token_perturbations import perturb_tokens
from lirpa_megatron.verify.properties.instance import Deadline
from lirpa_megatron.verify.sentences.attack import find_words, smallest_success
from lirpa_megatron.verify.sentences.options import NORMS, SentenceOptions
from lirpa_megatron.verify.sentences.search import largest_certified, smallest_attacked
from lirpa_megatron.verify.sentences.task import Task

_KEPT = 4
"""Bound graphs that are kept, each for sentences of one length."""


class OutOfTime(Exception):
    """The time limit of a sentence is over."""


@dataclass
class Finding:
    """What was found of one set of perturbations."""

    # "unsat" (certified), "sat" (attacked), "unknown"
    result: str
    # smallest lower bound of the margin: at eps, or over the substitutes
    margin: float | None = None
    certified_radius: float | None = None
    attacked_radius: float | None = None
    # ids of a sentence on which the model is wrong
    sentence: list[int] | None = None
    # with splits: the share of the set's volume that is proved (at the certified radius: all of
    # it), and how many pieces it was cut into
    proved_share: float | None = None
    pieces: int | None = None


@dataclass
class Verdict:
    """The outcome for a sentence."""

    # one of results.RESULT_WORDS, or "misclassified"
    result: str
    predicted: int
    # margin of the clean sentence
    clean_margin: float
    finding: Finding | None = None
    # position -> what was found of it alone
    positions: dict[int, Finding] = field(default_factory=dict)


class SentenceVerifier:
    """Answers one question about one sentence after another; bound graphs are reused.

    Args:
        model: GPTModel, HybridModel or BertModel, in eval mode.
        task: how its output is read.
        options: the question.
        group: the tensor-parallel group; every rank, of all pipeline stages of the model, calls
            `verify` with the same sentences.
        vectors: [d, h] for the question "direction".
    """

    def __init__(
        self, model: nn.Module, task: Task, options: SentenceOptions,
        group: dist.ProcessGroup | None, vectors: torch.Tensor | None = None,
    ) -> None:
        self.vectors, self._cover = vectors, None
        self.model, self.task, self.options, self.group = model, task, options, group
        self.norm, self.pipeline = NORMS[options.norm], pipeline_of(model)
        self._graphs: dict[int, BoundedModule] = {}
        self._deadline = Deadline(None, ModelRanks(group, self.pipeline))

    def verify(
        self, ids: Sequence[int], places: Sequence[int], label: int | None,
        substitutes: dict[int, list[int]], seconds: float | None = None,
    ) -> Verdict:
        """Answers the question about a sentence.

        Args:
            ids: token ids.
            places: positions that are words and may move.
            label: the right class; None: the prediction is what has to stay.
            substitutes: position -> ids, for the question "synonyms".
            seconds: time limit, looked at between bounds.
        """
        self._deadline = Deadline(seconds, ModelRanks(self.group, self.pipeline))
        tokens = torch.tensor([list(ids)], device=next(self.model.parameters()).device)
        self._cover: SplitBounds | None = None
        with torch.no_grad():
            if self.options.layer:
                hidden = perturb_tokens(
                    self.model, tokens, eps=0.0, start_layer=self.options.layer,
                    **self._types(tokens),
                )[0].data
            else:
                hidden = embed(self.model, tokens, **self._types(tokens))
            scores = self.task.scores(self.task.net(hidden))[0].double().tolist()
        scores = spmd.broadcast_object(scores, self.group)
        if not all(map(math.isfinite, scores)):
            raise ArithmeticError("the model's scores are not finite")
        predicted = max(range(len(scores)), key=scores.__getitem__)
        label = predicted if label is None else label
        clean = scores[label] - max(s for k, s in enumerate(scores) if k != label)
        verdict = Verdict("misclassified", predicted, clean)
        if predicted != label or clean <= 0:
            return verdict
        try:
            if self.options.words == "all":
                verdict.finding = self._find(tokens, hidden, label, list(places), substitutes)
                verdict.result = verdict.finding.result
            else:
                self._each(verdict, tokens, hidden, label, places, substitutes)
        except OutOfTime:
            verdict.result = "timeout"
            if self._cover is not None and self.options.words == "all":
                verdict.finding = Finding("unknown", **self._share())
        return verdict

    def _each(
        self, verdict: Verdict, tokens: torch.Tensor, hidden: torch.Tensor, label: int,
        places: Sequence[int], substitutes: dict[int, list[int]],
    ) -> None:
        """One word at a time; the sentence is as strong as its weakest word."""
        synonyms = self.options.question == "synonyms"
        for place in places:
            others = {place: substitutes[place]} if place in substitutes else {}
            if synonyms and not others:
                continue
            verdict.positions[place] = self._find(tokens, hidden, label, [place], others)
        words = [found.result for found in verdict.positions.values()]
        verdict.result = "sat" if "sat" in words else "unknown" if "unknown" in words else "unsat"
        if not words:  # no word has a substitute: there is the clean sentence alone
            margin = verdict.clean_margin
            if self.options.outward:  # which was computed with rounding
                margin = self._margin(tokens, label, eps=0.0)
            verdict.finding = Finding("unsat", margin=_finite(margin))
            verdict.result = "unsat" if margin > 0 else "unknown"
            verdict.finding.result = verdict.result

    def _find(
        self, tokens: torch.Tensor, hidden: torch.Tensor, label: int, places: list[int],
        substitutes: dict[int, list[int]],
    ) -> Finding:
        if self.options.question == "synonyms":
            return self._synonyms(tokens, label, places, substitutes)
        where = torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        where[places] = True
        words: dict[str, Any] = {"positions": places, "norm": self.norm}
        space = _Space(lambda points: self.task.margin(points, label), hidden.detach(), where)
        if self.options.question == "direction":
            words = {"positions": places, "directions": self.vectors,
                     "start_layer": self.options.layer}
            space = space.along(self.vectors)
        proved: dict[str, Any] = {}

        def margin_at(eps: float) -> float:
            margin = self._margin(tokens, label, eps=eps, **words)
            if margin > 0:
                proved.update(self._share())
            if margin > 0 and self.options.splits and self.options.asks_radius:
                return math.inf  # pieces are cut until they are proved, and say no more of it
            return margin

        def attack(radius: float) -> float | None:
            return self._attack(space, radius)

        if not self.options.asks_radius:
            eps = float(self.options.eps or 0.0)
            margin = margin_at(eps)
            if margin > 0:
                return Finding("unsat", _finite(margin), **proved)
            broken = attack(eps)
            if broken is None and self._cover is not None and self._cover.counterexamples:
                broken = eps  # one of the pieces has a point at which the model is wrong
            return Finding("unknown" if broken is None else "sat", _finite(margin),
                           attacked_radius=broken, **self._share())
        clean, linear = self._tangent(space)
        tolerance = self.options.tolerance
        certified = largest_certified(margin_at, clean, linear, tolerance)
        attacked = None
        if self.options.attack_steps:
            attacked = smallest_attacked(attack, max(linear, certified))
        return Finding(
            "unsat" if certified > 0 else "unknown", certified_radius=certified,
            attacked_radius=attacked, **proved,
        )

    def _synonyms(
        self, tokens: torch.Tensor, label: int, places: list[int],
        substitutes: dict[int, list[int]],
    ) -> Finding:
        chosen = {place: ids for place, ids in substitutes.items() if place in places}
        words: dict[str, Any] = {"substitutes": chosen, "shape": self.options.shape}
        if self.options.eps is not None:
            words |= {"eps": self.options.eps, "positions": places}
        margin = self._margin(tokens, label, **words)
        if margin > 0:
            return Finding("unsat", _finite(margin), **self._share())
        found = None
        if self.options.attack_steps:
            self._check_time()
            found = find_words(
                lambda h: self.task.margin(h, label),
                lambda ids: embed(self.model, ids, **self._types(ids)), tokens, chosen, self.group,
            )
        return Finding("unknown" if found is None else "sat", _finite(margin), sentence=found,
                       **self._share())

    # -------------------------------------------------------------------- numbers

    def _check_time(self) -> None:
        if self._deadline.is_over():
            raise OutOfTime

    def _types(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Further arguments of `embed`: token type 0 everywhere, for a model that has types."""
        embedding = getattr(self.model, "embedding", None)  # on the first pipeline stage
        has = getattr(embedding, "tokentype_embeddings", None) is not None
        types = {"tokentype_ids": torch.zeros_like(tokens)} if has else {}
        return {"check_live": not self.options.no_live_check, **types}

    def _margin(self, tokens: torch.Tensor, label: int, **perturbation: Any) -> float:
        """A lower bound of the label's margin over a set; -inf where there is none."""
        self._check_time()
        inputs = perturb_tokens(
            self.model, tokens, **perturbation, **self._types(tokens),
            rounding=self.options.rounding,
        )
        inputs = (*inputs, *(x.to(tokens.device) for x in self.task.further_inputs(label)))
        length = tokens.shape[1]
        if length not in self._graphs:
            if len(self._graphs) >= _KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[length] = BoundedModule(
                self.task.view, inputs, bound_opts=self.options.bound_opts()
            )
        # Only alpha needs gradients; recording them otherwise costs memory.
        optimized = self.options.method == "CROWN-Optimized"
        further = {"decision_thresh": 0.0} if optimized else {}
        C = self.task.specification(label, inputs[0].data)
        if self.options.splits:
            return self._by_splits(self._graphs[length], inputs, C, label, further)
        with contextlib.nullcontext() if optimized else torch.no_grad():
            lower, _ = self._graphs[length].compute_bounds(
                inputs, C=C, method=self.options.method, bound_upper=False, **further
            )
        value = float(self.task.smallest(lower.detach(), label))
        value = spmd.broadcast_object(value, self.group)
        return value if math.isfinite(value) else -math.inf

    def _by_splits(
        self, graph: BoundedModule, inputs: tuple[Any, ...], C: torch.Tensor | None, label: int,
        further: dict[str, Any],
    ) -> float:
        """The same by pieces of the set; `_cover` says what was found of them."""
        self._cover = found = bound_by_splits(
            graph, inputs, C, splits=self.options.splits, method=self.options.method,
            margin=lambda rows, _: torch.stack([
                torch.as_tensor(self.task.smallest(row[None], label)) for row in rows
            ]),
            margin_at=lambda points, _: self.task.margin(points, label),
            is_over=self._deadline.is_over, bound_upper=False, **further,
        )
        if found.is_over and found.margin.item() <= 0:
            raise OutOfTime
        return found.margin.item()

    def _share(self) -> dict[str, Any]:
        """What a finding says of the pieces."""
        if self._cover is None:
            return {}
        return {"proved_share": float(self._cover.proved), "pieces": int(self._cover.pieces)}

    def _attack(self, space: _Space, radius: float) -> float | None:
        self._check_time()
        options = self.options
        if options.attack_steps < 1:
            return None
        return smallest_success(
            space.margin, space.origin, space.where, self.norm, radius,
            options.attack_steps, options.attack_restarts, options.seed, self.group,
            smaller=self.options.tolerance if self.options.asks_radius else 1.0,
        )

    def _tangent(self, space: _Space) -> tuple[float, float]:
        """The clean margin, and the radius at which its tangent there is 0."""
        points = space.origin.requires_grad_(True)
        margin = space.margin(points)
        (gradient,) = torch.autograd.grad(margin.sum(), points)
        dual = {math.inf: 1.0, 1.0: math.inf, 2.0: 2.0}[self.norm]
        moved = gradient * space.where.view(1, -1, 1)
        slope = torch.linalg.vector_norm(moved.flatten(), ord=dual)
        clean = float(margin.detach().sum())
        radius = clean / max(float(slope), 1e-20)
        radius = min(max(radius, 1e-12), 1e6) if math.isfinite(radius) else 1.0
        return spmd.broadcast_object((clean, radius), self.group)


@dataclass(frozen=True)
class _Space:
    """Where an attack looks: points [N, S, h], of which those at `where` [S] move from the origin.
    """

    margin: Callable[[torch.Tensor], torch.Tensor]
    origin: torch.Tensor
    where: torch.Tensor

    def along(self, vectors: torch.Tensor) -> _Space:
        """The shares t [N, 1, d] of vectors [d, h] that are added at all positions that move."""
        vectors = vectors.to(self.origin)
        moves = self.where.to(self.origin).view(1, -1, 1)

        def margin(t: torch.Tensor) -> torch.Tensor:
            return self.margin(self.origin + moves * (t @ vectors))

        return _Space(margin, self.origin.new_zeros(1, 1, len(vectors)), self.where.new_ones(1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
