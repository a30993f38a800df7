"""What is to be certified, as specifications: classes, next tokens, label tokens.

A *margin* is logit[t] - logit[j]; where its lower bound over the perturbed inputs is above 0, t
wins over j for all of them. Margins are bounded as what they are, one linear function each, and not
as a difference of two bounded logits.

    inputs = (*perturb_tokens(model, ids, eps=0.01), targets)
    lower, _ = BoundedModule(next_token_margins(model), inputs).compute_bounds(inputs)
    certified = smallest_margin(lower, targets, vocab_size=50257) > 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lirpa_megatron.adapters.margins import TokenMargins
from lirpa_megatron.adapters.views import View
from lirpa_megatron.errors import UserError


def classification_margins(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The specification C of a classifier: the label's logit minus each other logit.

    Args:
        labels: [B], integers from 0 to K-1.
        num_classes: K, at least 2.

    Returns:
        C [B, K-1, K] for `compute_bounds`, in torch's default dtype: row j has 1 at the label and
        -1 at the j-th other class, in their order.

    Raises:
        UserError: labels that are not classes, or fewer than two classes.
    """
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}: a margin needs at least 2")
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(f"labels have shape {tuple(labels.shape)}, {labels.dtype}: give [B], int64")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} "
            "classes"
        )
    one = torch.eye(num_classes, device=labels.device)
    C = one[labels].unsqueeze(1) - one  # [B, K, K], row `label` is zero
    other = torch.arange(num_classes, device=labels.device) != labels.unsqueeze(1)
    return C[other].view(len(labels), num_classes - 1, num_classes)


def next_token_margins(
    model: nn.Module, against: Sequence[int] | None = None, *, gather_output: bool = True
) -> nn.Module:
    """logit[t] - logit[j] of a language model at one position, as a model to be bounded.

    Its inputs are those of the model's view, followed by the targets t, int64 [B]: (hidden,
    targets) or (hidden, mask, targets). Pass them to every `compute_bounds`. Its output is [B, V],
    one margin for each entry j of the vocabulary: 0 at j = t, and meaningless at entries that only
    pad the vocabulary; `smallest_margin` skips both. With `against` the output is [B, m].

    Each rank bounds the margins over its own part of the vocabulary. The ranks exchange only the
    targets' rows of the output layer's weight and the bounds, so [B, V] is the better choice even
    if `against` is a large part of V.

    Args:
        model: a GPTModel, HybridModel or BertModel (its 'lm' head: the word at a position), or a
            view of one; without `at_position` the last position is meant.
        against: token ids j; None for the whole vocabulary.
        gather_output: False leaves on each rank the margins over its own entries, [B, V/p], as
            Megatron's parallel_output does with logits.

    Returns:
        A module that shares the model's parameters.

    Raises:
        UserError: token ids out of the vocabulary, a model without one.
    """
    return _margins(model, None, against, gather_output)


def label_token_margins(model: nn.Module, labels: Sequence[int]) -> nn.Module:
    """`next_token_margins` of several targets, the same for all samples: output [B, T, V].

    For prompts that ask for one of some words, such as " yes" and " Yes": `some_label_wins` says
    what follows from its lower bounds. Inputs are (hidden,) or (hidden, mask).

    Args:
        model: as for `next_token_margins`.
        labels: T different token ids.
    """
    if len(set(labels)) != len(labels):
        raise UserError(f"the label tokens {list(labels)} are not all different")
    return _margins(model, labels, None)


def _margins(
    model: nn.Module, targets: Sequence[int] | None, against: Sequence[int] | None,
    gather_output: bool = True,
) -> TokenMargins:
    if not isinstance(model, View):
        return TokenMargins(model, targets, against, gather_output=gather_output)
    return TokenMargins(
        model.model, targets, against, model.start_layer, model.position, model.head, gather_output
    )


def smallest_margin(
    lower: torch.Tensor, targets: torch.Tensor, vocab_size: int | None = None
) -> torch.Tensor:
    """The margin of the target over its strongest rival, from lower bounds of `next_token_margins`.

    Args:
        lower: [B, V].
        targets: [B].
        vocab_size: entries from here on pad the vocabulary and are no rivals; None: all are.

    Returns:
        [B]; above 0: the target has the largest logit for every input of the set. NaN and infinite
        bounds certify nothing (-inf).
    """
    lower = _sound(lower, vocab_size)
    entries = torch.arange(lower.shape[-1], device=lower.device)
    own = entries == targets.to(lower.device).unsqueeze(-1)
    return lower.masked_fill(own, torch.inf).amin(-1)


def some_label_wins(
    lower: torch.Tensor, labels: Sequence[int], vocab_size: int | None = None
) -> torch.Tensor:
    """By how much one of the label tokens certainly wins over all others.

    Let L be the labels and l_tj a lower bound of logit_t(x) - logit_j(x) for all x of the set. If
    for every token j outside of L there is some t in L with l_tj > 0, then for every x and every
    such j: max_L logit(x) >= logit_t(x) > logit_j(x). So the largest logit belongs to a label,
    though which one may depend on x. Certified is therefore min over j outside of L of max over t
    in L of l_tj. (Two labels that change places do no harm; asking for one t with l_tj > 0 for all
    j, as `smallest_margin` does, is the stronger property.)

    Args:
        lower: lower bounds of `label_token_margins`, [B, T, V], also flattened.
        labels: the T label tokens.
        vocab_size: entries from here on pad the vocabulary and are no rivals; None: all are.

    Returns:
        [B]; above 0: for every input of the set a label has the largest logit. NaN and infinite
        bounds certify nothing (-inf).
    """
    lower = _sound(lower.reshape(len(lower), len(labels), -1), vocab_size)
    entries = torch.arange(lower.shape[-1], device=lower.device)
    label = torch.isin(entries, torch.as_tensor(labels, device=lower.device))
    return lower.amax(1).masked_fill(label, torch.inf).amin(-1)


def _sound(lower: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """Lower bounds of the real entries, -inf where they are NaN or infinite."""
    if vocab_size is not None and not 1 <= vocab_size <= lower.shape[-1]:
        raise UserError(
            f"vocab_size is {vocab_size}, but there are margins over {lower.shape[-1]} entries"
        )
    lower = lower[..., :vocab_size]
    return torch.where(lower.isfinite(), lower, -torch.inf)
