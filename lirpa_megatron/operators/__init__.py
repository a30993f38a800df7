"""Bound operators for Megatron's parallel layers, and their registration with the host."""

from lirpa_megatron import host
from lirpa_megatron.operators.column import BoundColumnParallelLinear
from lirpa_megatron.operators.gather import BoundGatherFromRegion, BoundScatterToRegion
from lirpa_megatron.operators.linear import BoundReplicatedLinear
from lirpa_megatron.operators.row import BoundRowParallelLinear

__all__ = [
    "BoundColumnParallelLinear",
    "BoundGatherFromRegion",
    "BoundReplicatedLinear",
    "BoundRowParallelLinear",
    "BoundScatterToRegion",
    "CUSTOM_OPS",
]

CUSTOM_OPS: dict[str, type[host.Bound]] = {
    "lirpa_megatron::ColumnParallelLinear": BoundColumnParallelLinear,
    "lirpa_megatron::RowParallelLinear": BoundRowParallelLinear,
    "lirpa_megatron::ReplicatedLinear": BoundReplicatedLinear,
    "lirpa_megatron::GatherFromRegion": BoundGatherFromRegion,
    "lirpa_megatron::ScatterToRegion": BoundScatterToRegion,
}
"""Operators of the traced graph -> Bound classes; handed to each host module, not global."""
