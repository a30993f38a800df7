"""Patterns of HybridModel, which has a letter for each layer: `*` is attention, `-` an MLP.

megatron-core calls GPTModel deprecated since 0.19: what GPTModel has as one layer is `*-` here, two
of them, each with a norm and a residual of its own. `|` is where a pipeline stage ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lirpa_megatron.adapters.hybrid import ATTENTION, LETTERS, MLP
from lirpa_megatron.errors import UserError

PATTERN = "hybrid_layer_pattern"
OLD_PATTERN = "hybrid_override_pattern"
_SPECS = (
    ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
)
"""Megatron's own specifications (--spec), without which it builds no hybrid model."""


def with_pattern(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments with the letters of the layers under `PATTERN`; as they are without a pattern.

    Args:
        given: by name.
        where: for messages.

    Raises:
        UserError: layers that are not supported, by their letter, or what HybridModel has not.
    """
    values = dict(given)
    found = [values.pop(name) for name in (PATTERN, OLD_PATTERN) if name in values]
    found = [pattern for pattern in found if pattern]
    if not found:
        return values
    pattern = found[0]
    if len(found) > 1 or not isinstance(pattern, str) or len(pattern) > 200_000:
        raise UserError(f"{where}: its pattern of hybrid layers is malformed")
    for letter in pattern:
        if letter not in (ATTENTION, MLP, "|"):
            what = LETTERS.get(letter, "a layer of an unknown kind")
            raise UserError(
                f"{where} (hybrid layers {pattern[:80]!r}): {letter!r} is {what}: only attention "
                f"{ATTENTION} and MLP {MLP} are supported"
            )
    letters = pattern.replace("|", "")
    if not letters:
        raise UserError(f"{where}: its pattern of hybrid layers has no layers")
    if values.get("use_rope_scaling") or values.get("mtp_num_layers"):
        raise UserError(
            f"{where}: hybrid models with use_rope_scaling or mtp_num_layers are not supported"
        )
    spec = values.get("spec")
    if isinstance(spec, (list, tuple)) and list(spec) in _SPECS:
        values["spec"] = None
    # HybridModel has no scale of rotary positions.
    return values | {
        PATTERN: letters, "num_layers": len(letters), "is_hybrid_model": False,
        "use_rope_scaling": False,
    }
