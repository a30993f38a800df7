"""Bound operators for Megatron's parallel layers, and their registration with the host."""

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax import BoundLogSoftmax, BoundSoftmax
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.elementwise.activations import BoundCurve, elementwise_operators
from lirpa_megatron.operators.elementwise.extremes import BoundMaximum, BoundMinimum
from lirpa_megatron.operators.elementwise.intervals import cut_with_range, is_elementwise
from lirpa_megatron.operators.elementwise.prelu import BoundPRelu
from lirpa_megatron.operators.elementwise.product import BoundProduct
from lirpa_megatron.operators.linear.borders import (
    BoundGatherFromRegion,
    BoundScatterToRegion,
    BoundSelectFromRegion,
    BoundStageInput,
)
from lirpa_megatron.operators.linear.column import BoundColumnParallelLinear
from lirpa_megatron.operators.linear.columns import COLUMN_OPS
from lirpa_megatron.operators.linear.local import BoundReplicatedLinear
from lirpa_megatron.operators.linear.positions import BoundRotary, BoundSelectPosition
from lirpa_megatron.operators.linear.row import BoundRowParallelLinear
from lirpa_megatron.operators.linear.structure import STRUCTURE_OPS
from lirpa_megatron.operators.linear.sums import SUM_OPS
from lirpa_megatron.operators.linear.vocabulary_margins import (
    BoundTokenMargins,
    BoundVocabularyMargins,
)
from lirpa_megatron.operators.norm.norm import BoundNorm

__all__ = [
    "BoundSoftmaxValues",
    "BoundColumnParallelLinear",
    "BoundCurve",
    "BoundGatherFromRegion",
    "BoundLogSoftmax",
    "BoundMaximum",
    "BoundMinimum",
    "BoundNorm",
    "BoundPRelu",
    "BoundProduct",
    "BoundReplicatedLinear",
    "BoundRotary",
    "BoundRowParallelLinear",
    "BoundScatterToRegion",
    "BoundScores",
    "BoundSelectFromRegion",
    "BoundSelectPosition",
    "BoundSoftmax",
    "BoundStageInput",
    "BoundTokenMargins",
    "BoundVocabularyMargins",
    "CUSTOM_OPS",
    "custom_operators",
    "cut_with_range",
    "is_elementwise",
]

CUSTOM_OPS: dict[str, type[auto_lirpa.Bound]] = {
    "lirpa_megatron::ColumnParallelLinear": BoundColumnParallelLinear,
    "lirpa_megatron::RowParallelLinear": BoundRowParallelLinear,
    "lirpa_megatron::ReplicatedLinear": BoundReplicatedLinear,
    "lirpa_megatron::GatherFromRegion": BoundGatherFromRegion,
    "lirpa_megatron::ScatterToRegion": BoundScatterToRegion,
    "lirpa_megatron::SelectFromRegion": BoundSelectFromRegion,
    "lirpa_megatron::StageInput": BoundStageInput,
    "lirpa_megatron::Product": BoundProduct,
    "lirpa_megatron::VocabularyMargins": BoundVocabularyMargins,
    "lirpa_megatron::TokenMargins": BoundTokenMargins,
    "lirpa_megatron::Norm": BoundNorm,
    "lirpa_megatron::Scores": BoundScores,
    "lirpa_megatron::Attend": BoundSoftmaxValues,
    "lirpa_megatron::Rotary": BoundRotary,
    "lirpa_megatron::SelectPosition": BoundSelectPosition,
    **COLUMN_OPS,
    **STRUCTURE_OPS,
    **SUM_OPS,
    "lirpa_megatron::Maximum": BoundMaximum,
    "lirpa_megatron::Minimum": BoundMinimum,
    "lirpa_megatron::PRelu": BoundPRelu,
    "lirpa_megatron::Softmax": BoundSoftmax,
    "lirpa_megatron::LogSoftmax": BoundLogSoftmax,
    **elementwise_operators(),
}
"""Operators of the traced graph -> Bound classes; passed to each host module, not registered
globally."""


def custom_operators() -> dict[str, type[auto_lirpa.Bound]]:
    """`CUSTOM_OPS`, including elementwise functions added to the table since import."""
    return {**CUSTOM_OPS, **elementwise_operators()}
