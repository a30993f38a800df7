"""Shape and broadcasting rules of ONNX operators; shapes are without the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from lirpa_megatron.errors import UserError

Shape = tuple[int, ...]


def sample_shape(value: onnx.ValueInfoProto) -> Shape:
    """Shape of one input sample; the first dimension must be a batch, 1 or symbolic."""
    dims = value.type.tensor_type.shape.dim
    shown = [d.dim_param or d.dim_value for d in dims]
    has_batch = len(dims) > 1 and (bool(dims[0].dim_param) or dims[0].dim_value in (0, 1))
    shape = tuple(d.dim_value for d in dims[1:])
    if not has_batch or any(n < 1 for n in shape):
        raise UserError(
            f"input {value.name!r} has shape {shown}; expected a batch dimension (1 or symbolic) "
            "followed by fixed sizes"
        )
    return shape


def flattened(shape: Shape, axis: int, where: str) -> Shape:
    """Result of Flatten, which must leave the batch alone."""
    rank = 1 + len(shape)
    axis = axis + rank if axis < 0 else axis
    if axis < 1 or math.prod(shape[: axis - 1]) != 1:
        raise UserError(f"{where} with axis={axis} mixes the batch with features")
    return (math.prod(shape),)


def reshaped(shape: Shape, target: Sequence[int], allowzero: int, where: str) -> Shape:
    """Result of Reshape to `target` (batch first; 0 and -1 allowed), which must keep the batch."""
    full = (1, *shape)
    if not allowzero:
        target = [full[i] if n == 0 and i < len(full) else n for i, n in enumerate(target)]
    known = math.prod(n for n in target if n != -1)
    if list(target).count(-1) == 1 and known > 0 and math.prod(full) % known == 0:
        target = [math.prod(full) // known if n == -1 else n for n in target]
    if math.prod(target) != math.prod(full) or any(n < 1 for n in target):
        raise UserError(f"{where} cannot reshape {('batch', *shape)} to {tuple(target)}")
    if len(target) < 2 or target[0] != 1:
        raise UserError(f"{where} to {tuple(target)} does not keep the batch dimension")
    return tuple(target[1:])


def matmul_width(shape: Shape, weight_shape: Shape, where: str) -> int:
    """Output width of `x @ weight.T`, weight [n_out, n_in], for one vector a sample."""
    if math.prod(shape[:-1]) != 1:
        raise UserError(
            f"{where} on an activation of shape {('batch', *shape)}: only one vector for each "
            "sample is supported"
        )
    if shape[-1] != weight_shape[1]:
        raise UserError(
            f"{where}: the activation has {shape[-1]} features, "
            f"the weight expects {weight_shape[1]}"
        )
    return weight_shape[0]


def scaled(factor: float, array: np.ndarray) -> np.ndarray:
    """factor * array, in float64 unless nothing changes."""
    return array if factor == 1.0 else factor * array.astype(np.float64)


def broadcast(constant, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A constant operand of an activation of this shape, as a flat float64 vector."""
    constant = np.asarray(constant, dtype=np.float64)
    try:
        return np.broadcast_to(constant, (1, *shape)).reshape(-1).copy()
    except ValueError:
        raise UserError(
            f"{where}: a constant of shape {constant.shape} does not fit an activation of shape "
            f"{('batch', *shape)}"
        ) from None
