"""What each ONNX operator makes of activations: one function each, by the operator's name."""

from lirpa_megatron.networks.onnx_operators import (  # noqa: F401
    activations,
    arithmetic,
    attention,
    comparisons,
    linear,
    moves,
    reductions,
)
from lirpa_megatron.networks.onnx_operators.node import HANDLERS, Node

__all__ = ["HANDLERS", "Node"]
