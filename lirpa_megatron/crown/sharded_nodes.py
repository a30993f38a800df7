"""Which nodes of a bound graph are sharded: it follows from the operators alone."""

from __future__ import annotations

from collections.abc import Iterable

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators import BoundColumnParallelLinear
from lirpa_megatron.operators.attention.softmax import BoundLogSoftmax, BoundSoftmax
from lirpa_megatron.operators.linear.borders import (
    BoundGatherFromRegion,
    BoundScatterToRegion,
    BoundSelectFromRegion,
)
from lirpa_megatron.operators.linear.row import BoundRowParallelLinear
from lirpa_megatron.operators.linear.structure import BoundConcat, BoundRearrange, BoundSum
from lirpa_megatron.operators.linear.sums import BoundCombine
from lirpa_megatron.operators.linear.vocabulary_margins import (
    BoundTokenMargins,
    BoundVocabularyMargins,
    Margins,
)

_SPLITS = (
    BoundColumnParallelLinear, BoundScatterToRegion, BoundSelectFromRegion, BoundVocabularyMargins,
)
"""Operators that make sharded values of replicated ones."""


def mark_sharded(nodes: Iterable[auto_lirpa.Bound], ranks: int) -> dict[str, bool]:
    """Node name -> whether its value is feature-sharded.

    Args:
        nodes: of the bound graph.
        ranks: tensor-parallel size.

    Raises:
        NotImplementedError: layers whose sharding does not fit together, by name.
    """
    sharded: dict[str, bool] = {}
    shards: set[str] = set()
    for node in nodes:
        if isinstance(node, (BoundColumnParallelLinear, Margins)):
            shards |= {x.name for x in node.inputs[1:]}
        elif isinstance(node, BoundRowParallelLinear):
            shards.add(node.inputs[1].name)

    def visit(node: auto_lirpa.Bound) -> bool:
        if node.name not in sharded:
            inputs = [visit(x) for x in node.inputs]
            if isinstance(node, _SPLITS):
                value = True
                if inputs[0]:
                    raise NotImplementedError(
                        f"{node.name}: a ColumnParallelLinear whose input is sharded already"
                    )
            elif isinstance(node, BoundTokenMargins):
                value = False
            elif isinstance(node, (BoundRowParallelLinear, BoundGatherFromRegion)):
                value = False
                if not inputs[0] and ranks > 1:
                    raise NotImplementedError(
                        f"{node.name}: a RowParallelLinear with input_is_parallel=True whose "
                        "input is not sharded"
                    )
            elif isinstance(node, auto_lirpa.BoundParams):
                # Megatron marks no weight that it did not initialise itself.
                value = node.name in shards or getattr(
                    node.param, "tensor_model_parallel", False
                )
            else:
                value = any(inputs)
                if value and ranks > 1:
                    _check_structure(node, inputs)
                if value and isinstance(node, (BoundSoftmax, BoundLogSoftmax)) and node.dim == -1:
                    raise NotImplementedError(
                        f"{node.name}: a softmax over features that are sharded; gather them "
                        "first (gather_output=True)"
                    )
            sharded[node.name] = value
        return sharded[node.name]

    for node in nodes:
        visit(node)
    return sharded


def _check_structure(node: auto_lirpa.Bound, sharded: list[bool]) -> None:
    """Refuses what would need features of other ranks, or has one operand's features alone."""
    structure = (BoundConcat, BoundRearrange, BoundSum)
    where = f"{node.name} ({type(node).__name__.removeprefix('Bound')})"
    if isinstance(node, structure) and not node.keeps_features:
        raise NotImplementedError(
            f"{where}: slices, joins or adds up features that are sharded over the ranks: build "
            "the layer before it with gather_output=True"
        )
    if isinstance(node, (BoundConcat, BoundCombine)):
        of_inputs = [s for x, s in zip(node.inputs, sharded, strict=True) if x.from_input]
        if len(set(of_inputs)) > 1:
            raise NotImplementedError(
                f"{where}: one value is sharded over the ranks, another is not: build the layer "
                "before the sharded one with gather_output=True"
            )
