"""What is asked about each sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.options import RunOptions

QUESTIONS = ("certify", "radius", "synonyms", "direction")
NORMS = {"inf": math.inf, "2": 2.0, "1": 1.0}


@dataclass(frozen=True)
class SentenceOptions(RunOptions):
    """Options of a run over sentences; every field has the name of its command-line option."""

    # "classification", "label-tokens", "next-token"; None: what the model is made for
    task: str | None = None
    # one of QUESTIONS
    question: str = "radius"
    # radius that is certified, or that is added around substitutes
    eps: float | None = None
    # of the question "direction": a file of vectors, and the layer whose input moves along them
    vectors: Path | None = None
    layer: int = 0
    # a key of NORMS
    norm: str = "inf"
    # "all": the words move together; "each": one word at a time, the others stay
    words: str = "all"
    # of sets of substitutes: "box" or "hull"
    shape: str = "hull"
    # relative: a radius is found to within this share of itself
    tolerance: float = 0.02
    # "bad,awful|good,great": the words that stand for class 0, 1, ...
    label_tokens: str | None = None
    # names of class 0, 1, ..., which labels of the data may be, and results have
    labels: Sequence[str] | None = None
    # the text that a GPT is asked, around "{text}"
    prompt: str = "{text}"
    # step size of alpha-CROWN
    lr_alpha: float = 0.1
    # of the checkpoint; None: what its tracker names
    iteration: str | None = None
    # layers of each pipeline stage; None: balanced
    pipeline_layers: Sequence[int] | None = None
    # only the first so many lines of the data
    limit: int | None = None

    def check(self) -> None:
        """Raises UserError for options that do not go together."""
        if self.question == "certify" and self.eps is None:
            raise UserError("--question certify needs the radius: give --eps")
        if self.question == "radius" and self.eps is not None:
            raise UserError("--question radius searches for eps: leave --eps out, or ask certify")
        if self.question == "synonyms" and self.norm != "inf":
            raise UserError(f"--question synonyms uses a box or a hull, not --norm {self.norm}")
        if self.question == "synonyms" and self.eps is not None and self.shape == "hull":
            raise UserError("--eps around substitutes needs --shape box")
        self._check_direction()
        super().check()
        if "{text}" not in self.prompt:
            raise UserError(f"--prompt {self.prompt!r} has no {{text}}, the place of the sentence")
        if self.prompt.count("{text}") > 1:
            raise UserError(f"--prompt {self.prompt!r} has {{text}} more than once")

    def _check_direction(self) -> None:
        along = self.question == "direction"
        if along and self.vectors is None:
            raise UserError("--question direction needs the vectors: give --vectors FILE")
        if along and self.norm != "inf":
            raise UserError(f"--question direction limits each vector's share, not --norm "
                            f"{self.norm}: leave it out")
        if along and self.outward:
            raise UserError("--outward does not cover directions: leave it out")
        if not along and (self.vectors is not None or self.layer):
            name = "--layer" if self.vectors is None else "--vectors"
            raise UserError(f"{name} is of --question direction")
        few = along or (self.question == "synonyms" and self.shape == "hull")
        if self.splits and not few:
            raise UserError(
                "--splits is for sets of few dimensions: --question direction, or synonyms with "
                "--shape hull"
            )
        if self.splits and self.outward:
            raise UserError("--outward with --splits covers properties alone: leave one out")

    @property
    def asks_radius(self) -> bool:
        """Whether the largest radius is asked for."""
        return self.question == "radius" or (self.question == "direction" and self.eps is None)

    def key(self) -> dict[str, Any]:
        """What tells the results of one question from those of another, as they are written."""
        asked: dict[str, Any] = {
            "method": self.method, "question": self.question, "norm": self.norm, "eps": self.eps,
            "words": self.words,
        }
        if self.order > 1:
            asked["order"] = self.order
        if self.splits:
            asked["splits"] = self.splits
        if self.outward:
            asked["rounding"] = self.rounding
        if self.no_live_check:
            asked["live_check"] = False
        if self.prompt != "{text}":
            asked["prompt"] = self.prompt
        if self.label_tokens is not None:
            asked["label_tokens"] = self.label_tokens
        if self.question == "synonyms":
            asked["shape"] = self.shape
        if self.question == "direction":
            asked["layer"] = self.layer
        if self.asks_radius:
            asked["tolerance"] = self.tolerance
        return asked
