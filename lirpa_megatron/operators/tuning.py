"""Measured sizes above which work is split differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Tuning:
    """How work is split into parts. Bounds differ only by the order of sums.

    Mappings are keyed by device type. Must be the same on every rank.
    """

    pairs: Mapping[str, int] = field(default_factory=lambda: {"cpu": 1, "cuda": 2**26})
    """How many coefficients of pairs of two forms are computed at once. On a CPU, those of one
    query; on a GPU many small operators would be slow."""
    whole_form: Mapping[str, int] = field(default_factory=lambda: {"cpu": 2**16})
    """Norms process larger forms position by position, to stay in a processor's cache; on a GPU
    many small operators would be slow."""
    few: int = 2**17
    """On a CPU, the largest size of A for which both sides are bounded in one call, which starts
    half as many small operators: of 256 rows of 512 numbers (chunks of pipeline stages) a norm
    then takes 0.8 and attention 0.9 of the time."""
    turn: Mapping[str, int] = field(default_factory=lambda: {"cuda": 128})
    """Minimum number of rows for chunks that alternate, so that one computes while another
    communicates. Without an entry chunks never alternate: on a CPU, transfers compete with
    computation for the cores (docs/measurements.md)."""

    chunks_for_stages: int = 4
    """A pass that goes on in the pipeline stages below has so many chunks for each stage, so that
    these are idle for a small part of it,"""
    numbers_for_stages: int = 2**19
    """unless its chunk on a stage would have less than the stage's share of these numbers: visiting
    a node costs as much as some thousands of them (docs/measurements.md)."""
    relaxed_numbers_for_stages: int = 2**20
    """The same where operators relax every row by itself (norms, attention), in many small
    calls."""

    def pairs_at_once(self, A: torch.Tensor) -> int:
        """`pairs` for forms on A's device."""
        return self.pairs.get(A.device.type, 1)
