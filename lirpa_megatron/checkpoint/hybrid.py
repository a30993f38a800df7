"""HybridModel's checkpoints, where their layers are those of a GPTModel.

HybridModel (megatron-core calls GPTModel deprecated since 0.19) has a letter for each layer: `*` is
attention, `-` an MLP. A layer of GPTModel is the two in a row, `*-`, with the same norms and
residuals, so a model with the pattern `*-*-` is one of two layers:

    decoder.layers.2i.self_attention, input_layernorm      layers.i of GPTModel
    decoder.layers.2i+1.mlp, pre_mlp_layernorm             layers.i of GPTModel
    decoder.final_norm                                     decoder.final_layernorm

`|` in a pattern is where a pipeline stage ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint import names
from lirpa_megatron.checkpoint.description import ParameterDescription
from lirpa_megatron.errors import UserError

_LETTERS = {
    "M": "Mamba layers", "E": "MoE (expert) layers", "G": "gated delta nets",
    "D": "sparse attention", "L": "multi-latent attention", "/": "multi-token prediction",
}
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
_SECOND = ("mlp.", "pre_mlp_layernorm.")
_FIRST = ("self_attention.", "input_layernorm.")
_FINAL, _GPT_FINAL = "decoder.final_norm.", "decoder.final_layernorm."


def as_gpt(stored: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The arguments of the GPTModel that a HybridModel's arguments describe.

    None if they are not of a HybridModel with a pattern.

    Raises:
        UserError: layers that GPTModel has not, by their letter, or in another order.
    """
    found = [stored[name] for name in _PATTERNS if stored.get(name)]
    if not found:
        return None
    pattern = found[0]
    if len(found) > 1 or not isinstance(pattern, str) or len(pattern) > 200_000:
        raise UserError(f"checkpoint {where}: its pattern of hybrid layers is malformed")
    for letter in pattern:
        if letter in _LETTERS:
            raise UserError(
                f"checkpoint {where} (hybrid layers {pattern[:80]}): {letter} is "
                f"{_LETTERS[letter]}, which are not supported"
            )
    layers = pattern.replace("|", "")
    if not re.fullmatch(r"(\*-)+", layers):
        raise UserError(
            f"checkpoint {where} (hybrid layers {pattern[:80]}): only attention and MLP in turn, "
            "*-*-, is supported"
        )
    if stored.get("use_rope_scaling") or stored.get("mtp_num_layers"):
        raise UserError(
            f"checkpoint {where}: hybrid models with use_rope_scaling or mtp_num_layers are not "
            "supported"
        )
    kept = {name: value for name, value in stored.items() if name not in _PATTERNS}
    return kept | {"num_layers": len(layers) // 2, "is_hybrid_model": False}


class PairedLayers:
    """The weights of a HybridModel under GPTModel's names; the protocol is `Weights`."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self._stored = {self._gpt_name(name): name for name in weights.names()}
        if len(self._stored) != len(weights.names()):
            raise UserError(f"checkpoint {weights.directory} stores a hybrid layer's tensor twice")

    @property
    def directory(self) -> Path:
        return self._weights.directory

    @property
    def format(self) -> str:
        return self._weights.format

    def names(self) -> set[str]:
        """The parameters that are stored; those that no pair has keep a name of their own."""
        return set(self._stored)

    def shape(self, name: str, parameter: ParameterDescription | None = None) -> tuple[int, ...]:
        """As the stored weights' own."""
        return self._weights.shape(self._stored[name], parameter)

    def dtypes(self) -> set[torch.dtype]:
        """As the stored weights' own."""
        return self._weights.dtypes()

    def read(self, name: str, *block: Any) -> torch.Tensor:
        """As the stored weights' own."""
        return self._weights.read(self._stored[name], *block)

    def common(self) -> dict[str, Any]:
        """As the stored weights' own."""
        return self._weights.common()

    def parallel_sizes(self) -> tuple[int | None, int | None]:
        """As the stored weights' own."""
        return self._weights.parallel_sizes()

    def drop_copy_of_embeddings(self) -> None:
        """As the stored weights' own."""
        self._weights.drop_copy_of_embeddings()
        held = self._weights.names()
        self._stored = {name: own for name, own in self._stored.items() if own in held}

    @staticmethod
    def _gpt_name(name: str) -> str:
        if name.startswith(_FINAL):
            return _GPT_FINAL + name.removeprefix(_FINAL)
        split = names.split_layer(name)
        if split is None:
            return f"{name} (of a hybrid model)" if name.startswith(_GPT_FINAL) else name
        block, index, rest = split
        if rest.startswith(_SECOND if index % 2 else _FIRST):
            return names.layer_name(block, index // 2, rest)
        return f"{name} (of a hybrid layer)"
