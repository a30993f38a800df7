"""What is asked about each sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lirpa_megatron.errors import UserError

QUESTIONS = ("certify", "radius", "synonyms")
NORMS = {"inf": math.inf, "2": 2.0, "1": 1.0}


@dataclass(frozen=True)
class SentenceOptions:
    """Options of a run over sentences; every field has the name of its command-line option."""

    # CROWN, ...: one of lirpa_megatron.METHODS, or auto
    method: str = "CROWN"
    # a key of networks.network.DTYPES; None: what the checkpoint stores, at least float32
    dtype: str | None = None
    # "classification", "label-tokens", "next-token"; None: what the model is made for
    task: str | None = None
    # one of QUESTIONS
    question: str = "radius"
    # radius that is certified, or that is added around substitutes
    eps: float | None = None
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
    # gradient steps and starting points of the attack; 0 steps: no attack
    attack_steps: int = 40
    attack_restarts: int = 20
    seed: int = 0
    # gradient steps and step size of alpha-CROWN
    alpha_iterations: int = 20
    lr_alpha: float = 0.1
    # seconds for each sentence
    timeout: float | None = None
    # most rows of A that a rank carries at once
    max_spec_rows: int | None = None
    # the model's own forward is not compared with its bounds (`OwnOptions.check_live`)
    no_live_check: bool = False
    # of the checkpoint; None: what its tracker names
    iteration: str | None = None
    # only the first so many lines of the data
    limit: int | None = None
    # bounds that hold in real arithmetic (`lirpa_megatron.rounding`), in float64
    outward: bool = False

    def __post_init__(self) -> None:
        if self.outward and self.dtype in (None, "float64"):
            object.__setattr__(self, "dtype", "float64")

    @property
    def rounding(self) -> str:
        """`OwnOptions.rounding`."""
        return "outward" if self.outward else "nearest"

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
        if self.outward and self.dtype != "float64":
            raise UserError(
                f"--outward computes bounds in float64, --dtype says {self.dtype}: leave it out"
            )
        if "{text}" not in self.prompt:
            raise UserError(f"--prompt {self.prompt!r} has no {{text}}, the place of the sentence")
        if self.prompt.count("{text}") > 1:
            raise UserError(f"--prompt {self.prompt!r} has {{text}} more than once")

    def bound_opts(self) -> dict[str, Any]:
        """Options of `BoundedModule`."""
        return {
            "max_spec_rows": self.max_spec_rows,
            "rounding": self.rounding,
            "check_live": not self.no_live_check,
            "optimize_bound_args": {"iteration": self.alpha_iterations, "lr_alpha": self.lr_alpha},
        }

    def key(self) -> dict[str, Any]:
        """What tells the results of one question from those of another, as they are written."""
        asked: dict[str, Any] = {
            "method": self.method, "question": self.question, "norm": self.norm, "eps": self.eps,
            "words": self.words,
        }
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
        if self.question == "radius":
            asked["tolerance"] = self.tolerance
        return asked
