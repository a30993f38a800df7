"""Method 'auto': tries IBP, CROWN-IBP, CROWN and CROWN-Optimized until one of them succeeds.

Of a network with norms or attention the forward method (with affine forms) comes before CROWN: it
has a pass for each coordinate that the set moves, CROWN has rows for each input of each norm and
each score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.options import METHODS, check_forward, check_output
from lirpa_megatron.parallel.collectives import Collectives
from lirpa_megatron.problem.perturbations import check_perturbations


def cheaper_first(
    module: auto_lirpa.HostBoundedModule, x: Any, aux: Any, C: torch.Tensor | None,
    kwargs: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tries methods, cheapest first, until all lower bounds are positive; returns the best bounds.

    Methods that are not available for this output or set are skipped. The ranks agree on whether
    all bounds are positive.

    Args:
        module: a BoundedModule.
        x, aux, C, kwargs: of its `compute_bounds`; with `decision_thresh` [B, S] or a number, what
            lower bounds have to exceed instead of 0.

    Returns:
        (lower, upper), shaped and sharded as `compute_bounds` gives them; upper None if not asked.

    Raises:
        ValueError: lower bounds were not requested, or `return_A` was (A belongs to one method).
        NotImplementedError: a module or operator that cannot be bounded, by name.
    """
    if kwargs.get("return_A") or not kwargs.get("bound_lower", True):
        raise ValueError("method 'auto' asks whether lower bounds are positive: choose a method "
                         "for return_A or bound_lower=False")
    kwargs = dict(kwargs)
    threshold = kwargs.pop("decision_thresh", 0.0)
    best: list[torch.Tensor | None] = [None, None]
    available = [
        m for m in _in_turn(module) if _is_available(module, x, C, {**kwargs, "method": m})
    ]
    if module.stages is not None:
        available = module.stages.on_every_stage("methods", available)
    for method in available or METHODS[-1:]:
        # alpha needs gradients even where the caller wants none.
        with torch.enable_grad() if method == METHODS[-1] else contextlib.nullcontext():
            given = {**kwargs, "method": method}
            if method == METHODS[-1]:
                given["decision_thresh"] = threshold
            found = module.compute_bounds(x=x, aux=aux, C=C, **given)
        for side, (bound, tighter) in enumerate(zip(found, (torch.maximum, torch.minimum),
                                                    strict=True)):
            known = best[side]
            best[side] = bound if known is None or bound is None else tighter(known, bound)
        if _all_proved(best[0] - threshold, module.context.collectives):
            break
    return best[0], best[1]


def _in_turn(module: auto_lirpa.HostBoundedModule) -> list[str]:
    """All methods, cheapest first."""
    methods = list(METHODS)
    if module.relaxes_rows and module.own_options.order == 1:  # polynomials are for small sets
        methods.insert(methods.index("CROWN"), "forward")
    return methods


def _is_available(
    module: auto_lirpa.HostBoundedModule, x: Any, C: Any, kwargs: Mapping[str, Any]
) -> bool:
    """Follows from the graph and the kind of set; if ranks differed, `compute_bounds` would say."""
    try:
        check_forward(module, kwargs)
        check_perturbations(module, x or (), kwargs["method"])
        final = module[kwargs.get("final_node_name") or module.final_name]
        if module.has_output:
            check_output(final, module.sharded[final.name], C, kwargs["method"])
    except NotImplementedError:
        return False
    return True


def _all_proved(lower: Any, tp: Collectives) -> bool:
    """Whether all numbers are positive and finite, including features on other ranks."""
    here = bool(((lower > 0) & lower.isfinite()).all())
    return not tp.largest(torch.tensor(0.0 if here else 1.0, device=lower.device)).item()
