"""Activation functions and modules, by what they compute."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import activations
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer import utils
from torch import nn

_KINDS: list[tuple[Any, str]] = [
    (F.gelu, "gelu"),
    (F.silu, "silu"),
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.tanh, "tanh"),
    (torch.tanh, "tanh"),
    (activations.squared_relu, "squared_relu"),
    (activations.quick_gelu, "quick_gelu"),
    (getattr(fused_bias_geglu, "quick_gelu", activations.quick_gelu), "quick_gelu"),
    (activations.fast_gelu, "gelu_tanh"),
    (utils.openai_gelu, "gelu_tanh"),
    (utils.gelu_impl, "gelu_tanh"),
]
_MODULES = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh"}


def kind_of(function: Any) -> str | None:
    """The name in `traced_ops.activation` of a function or activation module; None if not known."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if isinstance(function, functools.partial) and function.func is F.gelu and not function.args:
        approximate = {"approximate": "none", **function.keywords}
        if set(approximate) == {"approximate"}:
            return "gelu_tanh" if approximate["approximate"] == "tanh" else "gelu"
    if type(function) in _MODULES:
        return _MODULES[type(function)]
    return next((kind for known, kind in _KINDS if function is known), None)
