"""Which nodes of a bound graph are sharded: it follows from the operators alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.operator import Operator, Sharding


def mark_sharded(nodes: Iterable[auto_lirpa.Bound], ranks: int) -> dict[str, bool]:
    """Node name -> whether its value is feature-sharded.

    Args:
        nodes: of the bound graph.
        ranks: tensor-parallel size.

    Raises:
        NotImplementedError: layers whose sharding does not fit together, by name.
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
                # Megatron marks no weight that it did not initialise itself.
                value = node.name in shards or getattr(node.param, "tensor_model_parallel", False)
            else:
                value = _is_sharded(node, inputs, ranks)
            sharded[node.name] = value
        return sharded[node.name]

    for node in nodes:
        visit(node)
    return sharded


def _is_sharded(node: auto_lirpa.Bound, inputs: Sequence[bool], ranks: int) -> bool:
    """Whether a node's value is sharded, from its inputs'."""
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
