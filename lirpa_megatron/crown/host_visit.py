"""Runs auto_LiRPA's own operators in a pass by temporarily swapping attributes of graph nodes.

These operators read bounds, values and alpha from the nodes. Only this module changes them during a
pass, and only while one operator runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import OperatorInputs, Visit


def visit_host(
    node: auto_lirpa.Bound, A: LowerUpper, visit: Visit, start: auto_lirpa.Bound
) -> Propagated:
    """`Operator.bound_backward` for an operator of the host.

    Args:
        node: the operator.
        A: [R, B, *node shape] for each side.
        visit: the visit of the pass.
        start: the start node of the pass; the host keeps alpha under its name.
    """
    with _shown(visit.inputs), _shown_alpha(node, visit, start):
        As, lower, upper = auto_lirpa.bound_backward(node, A.lower, A.upper, start, visit.rows)
    As = As[: len(node.inputs)]
    return Propagated(tuple(LowerUpper(*sides) for sides in As), LowerUpper(lower, upper))


@contextlib.contextmanager
def _shown(inputs: OperatorInputs) -> Iterator[None]:
    saved = []
    for x in inputs.views:
        shown = {"lower": x.lower, "upper": x.upper}
        if getattr(x.node, "forward_value", None) is not None:
            shown["forward_value"] = x.value
        for name, value in shown.items():
            own = getattr(x.node, name, None)
            if own is not value:
                saved.append((x.node, name, own))
                setattr(x.node, name, value)
    try:
        yield
    finally:
        for node, name, own in reversed(saved):
            setattr(node, name, own)


@contextlib.contextmanager
def _shown_alpha(node: auto_lirpa.Bound, visit: Visit, start: auto_lirpa.Bound) -> Iterator[None]:
    if visit.alpha is None:
        with auto_lirpa.without_alpha(node):
            yield
        return
    own = node.alpha[start.name]
    node.alpha[start.name] = visit.alpha
    try:
        yield
    finally:
        node.alpha[start.name] = own
