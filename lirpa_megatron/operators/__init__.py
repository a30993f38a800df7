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
from lirpa_megatron.operators.columns import (
    BoundColumnsOfParts,
    BoundDivideColumns,
    BoundJoinColumns,
    BoundPartsOfColumns,
    BoundScaleColumns,
    BoundSelectColumns,
    BoundShiftColumns,
    BoundSumColumns,
)
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
from lirpa_megatron.operators.vocabulary import BoundTokenMargins, BoundVocabularyMargins

__all__ = [
    "BoundAttend",
    "BoundColumnParallelLinear",
    "BoundColumnsOfParts",
    "BoundDivideColumns",
    "BoundGatherFromRegion",
    "BoundGeluErf",
    "BoundGeluTanh",
    "BoundJoinColumns",
    "BoundNorm",
    "BoundPartsOfColumns",
    "BoundProduct",
    "BoundQuickGelu",
    "BoundReplicatedLinear",
    "BoundRotary",
    "BoundRowParallelLinear",
    "BoundScaleColumns",
    "BoundScatterToRegion",
    "BoundScores",
    "BoundSelectColumns",
    "BoundSelectFromRegion",
    "BoundSelectPosition",
    "BoundShiftColumns",
    "BoundSilu",
    "BoundSquaredRelu",
    "BoundSumColumns",
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
    "lirpa_megatron::ColumnsOfParts": BoundColumnsOfParts,
    "lirpa_megatron::PartsOfColumns": BoundPartsOfColumns,
    "lirpa_megatron::SelectColumns": BoundSelectColumns,
    "lirpa_megatron::SumColumns": BoundSumColumns,
    "lirpa_megatron::JoinColumns": BoundJoinColumns,
    "lirpa_megatron::ShiftColumns": BoundShiftColumns,
    "lirpa_megatron::ScaleColumns": BoundScaleColumns,
    "lirpa_megatron::DivideColumns": BoundDivideColumns,
}
"""Operators of the traced graph -> Bound classes; handed to each host module, not global."""
