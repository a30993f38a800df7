"""Bound operators for Megatron's parallel layers, and their registration with the host."""

from lirpa_megatron import host
from lirpa_megatron.operators.activations import (
    BoundGeluErf,
    BoundGeluTanh,
    BoundQuickGelu,
    BoundSilu,
    BoundSquaredRelu,
    BoundTanh,
)
from lirpa_megatron.operators.attend import BoundAttend
from lirpa_megatron.operators.column import BoundColumnParallelLinear
from lirpa_megatron.operators.columns import COLUMN_OPS
from lirpa_megatron.operators.gather import (
    BoundGatherFromRegion,
    BoundScatterToRegion,
    BoundSelectFromRegion,
)
from lirpa_megatron.operators.linear import BoundReplicatedLinear
from lirpa_megatron.operators.norm import BoundNorm
from lirpa_megatron.operators.positions import BoundRotary, BoundSelectPosition
from lirpa_megatron.operators.product import BoundProduct
from lirpa_megatron.operators.row import BoundRowParallelLinear
from lirpa_megatron.operators.scores import BoundScores
from lirpa_megatron.operators.structure import STRUCTURE_OPS
from lirpa_megatron.operators.sums import SUM_OPS
from lirpa_megatron.operators.vocabulary import BoundTokenMargins, BoundVocabularyMargins

__all__ = [
    "BoundAttend",
    "BoundColumnParallelLinear",
    "BoundGatherFromRegion",
    "BoundGeluErf",
    "BoundGeluTanh",
    "BoundNorm",
    "BoundProduct",
    "BoundQuickGelu",
    "BoundReplicatedLinear",
    "BoundRotary",
    "BoundRowParallelLinear",
    "BoundScatterToRegion",
    "BoundScores",
    "BoundSelectFromRegion",
    "BoundSelectPosition",
    "BoundSilu",
    "BoundSquaredRelu",
    "BoundTanh",
    "BoundTokenMargins",
    "BoundVocabularyMargins",
    "CUSTOM_OPS",
]

CUSTOM_OPS: dict[str, type[host.Bound]] = {
    "lirpa_megatron::ColumnParallelLinear": BoundColumnParallelLinear,
    "lirpa_megatron::RowParallelLinear": BoundRowParallelLinear,
    "lirpa_megatron::ReplicatedLinear": BoundReplicatedLinear,
    "lirpa_megatron::GatherFromRegion": BoundGatherFromRegion,
    "lirpa_megatron::ScatterToRegion": BoundScatterToRegion,
    "lirpa_megatron::SelectFromRegion": BoundSelectFromRegion,
    "lirpa_megatron::GeluErf": BoundGeluErf,
    "lirpa_megatron::GeluTanh": BoundGeluTanh,
    "lirpa_megatron::Silu": BoundSilu,
    "lirpa_megatron::QuickGelu": BoundQuickGelu,
    "lirpa_megatron::SquaredRelu": BoundSquaredRelu,
    "lirpa_megatron::Tanh": BoundTanh,
    "lirpa_megatron::Product": BoundProduct,
    "lirpa_megatron::VocabularyMargins": BoundVocabularyMargins,
    "lirpa_megatron::TokenMargins": BoundTokenMargins,
    "lirpa_megatron::Norm": BoundNorm,
    "lirpa_megatron::Scores": BoundScores,
    "lirpa_megatron::Attend": BoundAttend,
    "lirpa_megatron::Rotary": BoundRotary,
    "lirpa_megatron::SelectPosition": BoundSelectPosition,
    **COLUMN_OPS,
    **STRUCTURE_OPS,
    **SUM_OPS,
}
"""Operators of the traced graph -> Bound classes; handed to each host module, not global."""
