"""Derives from the operators which nodes of a bound graph are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.operator import Operator, Sharding


def mark_sharded(nodes: Iterable[auto_lirpa.Bound], ranks: int) -> dict[str, bool]:
    """Node name -> whether its value is feature-sharded.

    Args:
        nodes: the nodes of the bound graph.
        ranks: tensor-parallel size.

    Raises:
        NotImplementedError: names layers whose shardings do not fit together.
    """
    sharded: dict[str, bool] = {}
    shards = {
        x.name for node in nodes if isinstance(node, Operator)
        for x in node.inputs[node.weight_shards]
    }

    def visit(node: auto_lirpa.Bound) -> bool:
        if node.name not in sharded:
            inputs = [visit(x) for x in node.inputs]
            if isinstance(node, auto_lirpa.BoundParams):
                # Megatron does not mark weights that it did not initialise.
                value = node.name in shards or getattr(node.param, "tensor_model_parallel", False)
            else:
                value = _is_sharded(node, inputs, ranks)
            sharded[node.name] = value
        return sharded[node.name]

    for node in nodes:
        visit(node)
    return sharded


def _is_sharded(node: auto_lirpa.Bound, inputs: Sequence[bool], ranks: int) -> bool:
    """Whether a node's value is sharded, given whether its inputs are."""
    how = getattr(node, "sharding", Sharding.AS_INPUTS)
    if how is Sharding.SPLITS:
        if inputs[0]:
            raise NotImplementedError(
                f"{node.name}: a ColumnParallelLinear whose input is sharded already"
            )
        return True
    if how is Sharding.JOINS and not inputs[0] and ranks > 1:
        raise NotImplementedError(
            f"{node.name}: a RowParallelLinear with input_is_parallel=True whose input is not "
            "sharded"
        )
    if how is not Sharding.AS_INPUTS:
        return False
    value = any(inputs)
    if value and ranks > 1 and isinstance(node, Operator):
        node.check_sharded(inputs, f"{node.name} ({type(node).__name__.removeprefix('Bound')})")
    return value
