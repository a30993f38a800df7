"""Hidden states that enter a later layer, compared with those of the live model."""

from __future__ import annotations

import torch
from torch import nn

from lirpa_megatron.adapters.live.modules import entering_layer, is_sequence_parallel
from lirpa_megatron.adapters.live.submodules import difference, values
from lirpa_megatron.adapters.live.undisturbed import undisturbed
from lirpa_megatron.adapters.traceable import collectives_of
from lirpa_megatron.errors import LiveModelError
from lirpa_megatron.operators.parameters import widened
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.foreign import agreed_collectives

ROUNDING = 1e3
"""Roundings of the largest number by which both may differ, as in `clean_output_check`."""


def check_entering(
    model: nn.Module, embedded: torch.Tensor, mask: torch.Tensor | None, layer: int,
    hidden: torch.Tensor,
) -> None:
    """Raises on every rank unless the live model's layers before `layer` make `hidden`.

    Args:
        model: a GPTModel, HybridModel or BertModel.
        embedded: what enters the first layer, [B, S, h], replicated.
        mask: [B or 1, 1, S, S], nonzero where masked, or None.
        layer: from 1 on.
        hidden: what enters it by the facade, [B, S, h].

    Raises:
        LiveModelError: with both values.
    """
    tp = collectives_of(model)
    modes = dict.fromkeys(model.modules(), False)
    with spmd.guard(tp.group, "perturb_tokens"):
        with widened(model), undisturbed(model, modes), agreed_collectives(tp.group):
            live = entering_layer(model, embedded, mask, layer, tp).transpose(0, 1)
        if is_sequence_parallel(model.config, tp):
            hidden = hidden.chunk(tp.size, 1)[tp.rank]
        share = max(spmd.gather_objects(difference(live, hidden), tp.group))
        if share > ROUNDING * torch.finfo(hidden.dtype).eps:
            raise LiveModelError(
                f"what enters layer {layer}: the model itself computes "
                f"{values(live, hidden, 'its facade')}: see what changes its output (hooks, "
                "replaced methods, a patched class)"
            )
