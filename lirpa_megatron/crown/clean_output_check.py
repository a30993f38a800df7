"""Checks, before bounds are returned, that they contain the model's output at the clean input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.clean_values import clean_value
from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.errors import BoundsError
from lirpa_megatron.problem.perturbations import PerturbationInBox

SLACK = 1e3
"""Tolerance, in units of the number type's rounding error times the sum of magnitudes. The largest
value in all calls of the tests is 57."""


def check_outputs(
    graph: BoundGraph, final: auto_lirpa.Bound, C: torch.Tensor | None, lower: Any, upper: Any,
    bounds_too: bool,
) -> None:
    """Compares the graph's value at the clean input with the model's output, and with the bounds.

    Args:
        graph: the bound graph, during a call of `compute_bounds`.
        final: the node that was bounded.
        C: [B, S, features of the node], or None for the node itself.
        lower, upper: bounds; None if not requested.
        bounds_too: False if the caller knows that the bounded set may not contain the clean input.
    """
    outputs, name = {}, graph.final_name
    if graph.live is not None and graph.live.due:
        outputs[name] = clean_value(graph, graph[name])
        graph.live.compare(outputs[name])
    if not bounds_too or not _clean_is_inside(graph):
        return
    y = outputs.get(final.name)
    y = clean_value(graph, final) if y is None else y
    parts = graph.context.sharded[final.name] and C is not None
    total = graph.context.collectives.reduce_from if parts else lambda part: part
    check_contains(y, C, lower, upper, total)


def _clean_is_inside(graph: BoundGraph) -> bool:
    if graph.stages is not None:
        return graph.stages.clean_inside
    return clean_is_inside(auto_lirpa.perturbed_inputs(graph))


def clean_is_inside(inputs: Sequence[auto_lirpa.Bound]) -> bool:
    """Whether the perturbation sets are known to contain the clean values of their inputs.

    Balls, and boxes given by a radius, are centred there. A box given by its corners can lie
    anywhere; other sets (`PerturbationInBox`) decide themselves.

    Args:
        inputs: the graph's perturbed inputs; their values and sets are the same on every rank.
    """
    return all(_is_inside(node.value, node.perturbation) for node in inputs)


def _is_inside(x: torch.Tensor, ptb: Any) -> bool:
    if isinstance(ptb, PerturbationInBox):
        return ptb.holds(x)
    if not isinstance(ptb, auto_lirpa.PerturbationLpNorm):
        return False
    if ptb.x_L is None or ptb.x_U is None:
        return True
    return bool(((ptb.x_L <= x) & (x <= ptb.x_U)).all())


def check_contains(
    y: torch.Tensor,
    C: torch.Tensor | None,
    lower: torch.Tensor | None,
    upper: torch.Tensor | None,
    total: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Raises an error if bounds exclude the model's output by more than rounding explains.

    Sound bounds contain it: l <= C y <= u holds for every input in the set, including the clean
    one. The tolerance is SLACK eps (|C| (1 + |y|)) with eps of the number type (2^-23, 2^-52). The
    1 is there because rounding errors scale with hidden values, which can be larger than outputs.
    An output that is NaN has no finite bound, and an infinite one none on its side: it would be
    one of the function in exact arithmetic, not of the model that runs.

    Args:
        y: outputs at the clean input, [B, *output shape]; the rank's own features where the output
            is sharded.
        C: [B, S, *output shape], or None for the outputs themselves.
        lower, upper: [B, S], or [B, *output shape] without C; None if not requested.
        total: sums C y over ranks for a sharded output; the identity otherwise.

    Raises:
        BoundsError: with the output, the bound and the model's value.
    """
    y, scale = _values(y.detach(), C, total)
    slack = SLACK * torch.finfo(y.dtype).eps * scale
    for name, sign, bound in (("lower", 1, lower), ("upper", -1, upper)):
        if bound is None:
            continue
        bound = bound.detach().reshape(y.shape)
        excess = sign * (bound - y)
        beyond = torch.where(y.isnan() & bound.isfinite(), torch.inf, excess - slack)
        if bool((beyond > 0).any()):
            sample, output = divmod(int(beyond.nan_to_num(-1.0).argmax()), beyond.shape[1])
            value, allowed = y[sample, output], slack[sample, output]
            hint = "compute in float64, and report it if it happens there too"
            if not bool(value.isfinite()):
                hint = "the model overflows in its number type"
            raise BoundsError(
                f"the {name} bound {bound[sample, output]:g} of output {output} of sample {sample} "
                f"excludes the model's own output {value:g} at the clean input (rounding explains "
                f"{allowed:.1g}): do not use these bounds; {hint}"
            )


def _values(
    y: torch.Tensor, C: torch.Tensor | None, total: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(C y, |C| (1 + |y|)), [B, S] each; infinite outputs count in the rows that read them."""
    finite = torch.where(y.isfinite(), y, 0.0)
    scale = 1 + finite.abs()
    if C is None:
        return y.reshape(len(y), -1), scale.reshape(len(y), -1)
    plus, minus = C > 0, C < 0
    rises = _applied(plus, y == torch.inf) + _applied(minus, y == -torch.inf)
    falls = _applied(minus, y == torch.inf) + _applied(plus, y == -torch.inf)
    lost = _applied(plus | minus, y.isnan())
    parts = [_applied(C, finite), _applied(C.abs(), scale), rises, falls, lost]
    value, scale, rises, falls, lost = total(torch.stack([part.to(y) for part in parts]))
    value = torch.where(rises > 0, torch.inf, torch.where(falls > 0, -torch.inf, value))
    none = (lost > 0) | ((rises > 0) & (falls > 0))
    return torch.where(none, torch.nan, value), scale


def _applied(C: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    number = y.dtype if y.is_floating_point() else torch.float32
    return torch.einsum("bsf,bf->bs", C.detach().to(number).flatten(2), y.to(number).flatten(1))
