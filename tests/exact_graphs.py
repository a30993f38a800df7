"""Bound graphs evaluated in 200 bits (mpmath): what real arithmetic makes of their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import torch

from lirpa_megatron.operators.context import CallState, OperatorInputs

mp.mp.prec = 200

_of = np.frompyfunc(mp.mpf, 1, 1)
_exp, _sqrt = np.frompyfunc(mp.exp, 1, 1), np.frompyfunc(mp.sqrt, 1, 1)


def exact(x: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor as they are."""
    return _of(x.detach().double().numpy())


def logistic(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


CURVES: dict[str, Callable] = {
    "Relu": lambda x: max(x, mp.mpf(0)), "Silu": lambda x: x * logistic(x),
    "GeluErf": lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2, "Tanh": mp.tanh,
}


def evaluate(module: Any, *inputs: np.ndarray) -> np.ndarray:
    """The final node of a BoundedModule for its perturbed input (and others as given)."""
    values: dict[str, np.ndarray] = {}
    for node in _in_order(module[module.final_name]):
        kind = type(node).__name__.removeprefix("Bound")
        if kind == "Input":
            values[node.name] = inputs[int(node.ori_name.removeprefix("input_"))]
        elif not node.inputs:
            values[node.name] = exact(module.get_forward_value(node))
        else:
            x = [values[i.name] for i in node.inputs]
            values[node.name] = _apply(kind, node, x)
    return values[module.final_name]


def _in_order(final: Any) -> list:
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if node.name not in found:
            for x in node.inputs:
                visit(x)
            found[node.name] = node

    visit(final)
    return sorted(found.values(), key=lambda node: bool(node.inputs))


def _apply(kind: str, node: Any, x: list) -> np.ndarray:
    if kind in CURVES:
        return np.frompyfunc(CURVES[kind], 1, 1)(x[0])
    if "Linear" in kind:
        w, b = x[1], x[2] if len(x) > 2 else None
        if hasattr(node, "has_rows"):
            parts = node.sharded_relaxation(OperatorInputs.of(node, node.context, CallState()))
            w, b = (None if part is None else exact(part) for part in parts)
        y = x[0] @ (w.T if getattr(node, "transB", 1) else w)
        return y if b is None else y + b
    return _OPERATORS[kind](node, x)


def _norm(node: Any, x: list) -> np.ndarray:
    z = x[0].reshape(*x[0].shape[:-1], node.groups, -1)
    if not node.rms:
        z = z - z.sum(-1, keepdims=True) / z.shape[-1]
    q = (z * z).sum(-1, keepdims=True) / z.shape[-1] + mp.mpf(node.eps)
    y = z / _sqrt(q) * x[1] + (x[2] if len(x) > 2 else mp.mpf(0))
    return y.reshape(x[0].shape)


def _heads(x: np.ndarray, d: int, repeat: int = 1) -> np.ndarray:
    """[B, T, n d] -> [B, n, T, d], each head `repeat` times."""
    return x.reshape(*x.shape[:-1], -1, d).swapaxes(1, 2).repeat(repeat, 1)


def _scores(node: Any, x: list) -> np.ndarray:
    q, d = x[0], node.head_dim
    k = _heads(x[1], d, q.shape[-1] // x[1].shape[-1])
    return _heads(q, d) @ k.swapaxes(-1, -2) * mp.mpf(node.scale)


def _softmax(s: np.ndarray) -> np.ndarray:
    e = _exp(s)
    return e / e.sum(-1, keepdims=True)


def _attend(node: Any, x: list) -> np.ndarray:
    s = x[0]
    if len(x) > 2:
        mask = x[2] if node.query < 0 else x[2][:, :, node.query : node.query + 1]
        s = np.where(np.broadcast_to(mask != 0, s.shape), mp.mpf(node.fill), s)
    v = _heads(x[1], node.head_dim)
    y = _softmax(s) @ v.repeat(s.shape[1] // v.shape[1], 1)
    return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)


def _select(node: Any, x: list) -> np.ndarray:
    y = x[0][:, node.position]
    return y[:, None] if node.keep else y


def _rotary(node: Any, x: list) -> np.ndarray:
    y, cos, sin = x[0].reshape(*x[0].shape[:-1], node.heads, -1), x[1], x[2]
    assert not node.interleaved
    r = cos.shape[-1]
    turned, kept = y[..., :r], y[..., r:]
    half = np.concatenate((-turned[..., r // 2 :], turned[..., : r // 2]), -1)
    turned = turned * cos[:, None] + half * sin[:, None]
    return np.concatenate((turned, kept), -1).reshape(x[0].shape)


def _margins(node: Any, x: list) -> np.ndarray:
    h, w, targets = x[0], x[1], x[-1].astype(int)
    assert not node.shared and not node.has_bias
    return (h * w[targets]).sum(-1, keepdims=True) - h @ w.T


_OPERATORS: dict[str, Callable] = {
    "Norm": _norm, "Scores": _scores, "SoftmaxValues": _attend, "SelectPosition": _select,
    "Rotary": _rotary, "VocabularyMargins": _margins,
    "Softmax": lambda node, x: _softmax(x[0].swapaxes(node.dim, -1)).swapaxes(node.dim, -1),
    "Product": lambda node, x: x[0] * x[1], "Add": lambda node, x: x[0] + x[1],
    "GatherFromRegion": lambda node, x: x[0],
}
