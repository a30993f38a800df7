"""HybridModel with layers of attention and MLP alone, batch first.

megatron-core calls GPTModel deprecated since 0.19: a dense GPT is a HybridModel with the pattern
`*-*-`, in which `*` is attention with its norm and residual, and `-` an MLP with its own. The two
may stand in any order. Up to 0.17 the class is called MambaModel.
"""

from __future__ import annotations

from lirpa_megatron.adapters import refusals
from lirpa_megatron.adapters.language_models import GPTFacade
from lirpa_megatron.adapters.refusals import joined
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.adapters.transformer import TransformerBlockFacade
from lirpa_megatron.compat.megatron_hybrid import HybridModel, HybridStack

ATTENTION, MLP = "*", "-"
LETTERS = {
    "M": "a Mamba layer", "E": "an MoE layer (of experts)", "G": "a gated delta net",
    "D": "sparse attention", "L": "multi-latent attention", "+": "multi-latent attention",
    "/": "multi-token prediction",
}
"""Letters of patterns, of all releases, that are not supported."""


class HybridStackFacade(TransformerBlockFacade):
    """HybridStack: as TransformerBlockFacade; the norm at its end has another name."""

    block_class, last_norm = HybridStack, "final_norm"

    def __init__(
        self, block: HybridStack, name: str, copy: Copy, start_layer: int = 0,
        position: int | None = None,
    ) -> None:
        # Early releases keep the pattern alone. A list that is wrong changes nothing: the layers
        # themselves are looked at below.
        letters = getattr(block, "layer_type_list", None) or getattr(
            block, "hybrid_override_pattern", None
        )
        for index, letter in enumerate(letters or ()):
            if letter not in (ATTENTION, MLP):
                what = LETTERS.get(letter, "a layer of an unknown kind")
                raise refusals.refusal(
                    block, joined(name, f"layers.{index}"), f"{letter} is {what}: not supported "
                    f"(only attention {ATTENTION} and MLP {MLP} are)"
                )
        super().__init__(block, name, copy, start_layer, position)

    @staticmethod
    def has_last_norm(block: HybridStack) -> bool:
        return bool(block.post_process and block.post_layer_norm)


class HybridFacade(GPTFacade):
    """HybridModel: as GPTFacade."""

    model_class = HybridModel

    def __init__(
        self, model: HybridModel, name: str, copy: Copy, start_layer: int = 0,
        position: int | None = None,
    ) -> None:
        if getattr(model.config, "use_mup", False):
            raise refusals.refusal(model, name, "muP in hybrid models is not supported")
        super().__init__(model, name, copy, start_layer, position)


register(HybridStack, HybridStackFacade)
register(HybridModel, HybridFacade)
