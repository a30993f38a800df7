"""Checks of what is perturbed, and L1 and L2 balls where the host takes them for points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron import host


def described(x: Sequence[Any]) -> dict[str, torch.Tensor | str | None]:
    """Everything that the ranks must agree on about the inputs: name -> value."""
    values: dict[str, torch.Tensor | str | None] = {"the number of inputs": str(len(x))}
    for i, value in enumerate(x):
        if not isinstance(value, torch.Tensor):
            continue
        values[f"input {i}"] = value
        ptb = getattr(value, "ptb", None)
        values[f"the perturbation of input {i}"] = type(ptb).__name__
        for name in ("x_L", "x_U", "eps", "norm"):
            part = getattr(ptb, name, None)
            values[f"{name} of input {i}"] = part if isinstance(part, torch.Tensor) else str(part)
    return values


def is_ball(ptb: Any) -> bool:
    """Whether the perturbation is an L1 or L2 ball."""
    return isinstance(ptb, host.PerturbationLpNorm) and ptb.norm != float("inf")


def check_perturbations(module: Any, x: Sequence[Any], method: str) -> None:
    """Refuses perturbations that have no sound bound here.

    Raises:
        ValueError: a negative radius, an empty or NaN box, a batch that differs between inputs.
        NotImplementedError: perturbed parameters; an L1 or L2 ball with an IBP method where
            something other than a linear layer reads it.
    """
    for node in host.roots(module):
        if isinstance(node, host.BoundParams) and node.perturbation is not None:
            raise NotImplementedError(
                f"parameter {node.ori_name!r} is perturbed: only inputs can be on a sharded model"
            )
    for i, value in enumerate(x):
        ptb = getattr(value, "ptb", None)
        if not isinstance(ptb, host.PerturbationLpNorm):
            continue
        if ptb.x_L is not None and ptb.x_U is not None:
            # Also catches NaN, which compares false.
            if not bool((ptb.x_L <= ptb.x_U).all()):
                worst = (ptb.x_L - ptb.x_U).max().item()
                raise ValueError(
                    f"input {i}: the box is empty or NaN (x_L exceeds x_U by up to {worst:g})"
                )
        elif not bool((torch.as_tensor(ptb.eps) >= 0).all()):
            raise ValueError(f"input {i}: eps is {ptb.eps}, it must be at least 0")
        if is_ball(ptb) and method in ("IBP", "CROWN-IBP"):
            _check_ball_for_ibp(module, i, ptb)


def _check_ball_for_ibp(module: Any, index: int, ptb: Any) -> None:
    """The host's IBP knows an L1 or L2 ball only in the first linear layer."""
    nodes = module.named_nodes()
    names = [n for n, i in zip(module.input_name, module.input_index, strict=True) if i == index]
    todo = [nodes[consumer] for name in names for consumer in nodes[name].output_name]
    while todo:
        node = todo.pop()
        if type(node).__name__ in ("BoundFlatten", "BoundReshape", "BoundIdentity"):
            todo += [nodes[name] for name in node.output_name]
        elif not isinstance(node, host.BoundLinear):
            raise NotImplementedError(
                f"IBP of an L{ptb.norm:g} ball that {type(node).__name__} reads directly: "
                "auto_LiRPA would take the ball for its center; use CROWN or an L-inf box"
            )


def enclose_balls(roots: Sequence[host.Bound]) -> None:
    """Gives an L1 or L2 ball the box around it as bounds of the input node.

    The host sets lower = upper = center there, and an activation or product that reads the input
    directly would be relaxed at that one point, which is unsound. |x_i - c_i| <= eps holds for
    every Lp ball. The ball itself is used where A is concretized.
    """
    for node in roots:
        ptb = getattr(node, "perturbation", None)
        if is_ball(ptb) and node.lower is node.upper:
            node.lower, node.upper = node.center - ptb.eps, node.center + ptb.eps
            node.interval = (node.lower, node.upper)
