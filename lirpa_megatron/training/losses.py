"""Cross-entropy of the worst case that lower bounds of margins allow."""

from __future__ import annotations

import torch

from lirpa_megatron.parallel.collectives import Collectives

_NO_RIVAL = -1e30
"""Logit of an entry that is none; exp of it is 0, and so is its gradient."""


def margin_cross_entropy(
    lower: torch.Tensor, own: torch.Tensor | None = None, tp: Collectives | None = None
) -> torch.Tensor:
    """An upper bound of the cross-entropy over a set of inputs, from lower bounds of margins.

    With l_j a lower bound of logit_t(x) - logit_j(x) for all x of the set,

        -log softmax(logits(x))_t = log sum_j exp(logit_j - logit_t) <= log (1 + sum_j exp(-l_j)),

    j over the classes other than t: the robust cross-entropy of Wong & Kolter (ICML 2018), as
    CROWN-IBP (Zhang et al., ICLR 2020) uses it. The 1 is of t itself, whose margin is 0.

    Args:
        lower: [B, K-1], replicated: classes other than the target (`classification_margins`). With
            `own` [B, V/p], this rank's entries of the vocabulary.
        own: [B, V/p] bool, with `lower` by entries of the vocabulary: those that are rivals. The
            target's own entry and padding are not.
        tp: with `own`, the collectives of the ranks that share the vocabulary; what they exchange
            is [B].

    Returns:
        [B], replicated.
    """
    worst = -lower
    if own is not None:
        worst = torch.where(own, worst, _NO_RIVAL)
    # The largest exponent is taken out, as in logsumexp.
    top = worst.detach().amax(-1).clamp(min=0)
    if tp is not None:
        top = tp.largest(top)
    total = (worst - top.unsqueeze(-1)).exp().sum(-1)
    if tp is not None:
        total = tp.reduce_from(total)
    return top + (total + (-top).exp()).log()
