"""lirpa_megatron: certified bounds for Megatron-core models, exact on sharded models.

The public names are auto_LiRPA's, so that an import is all that changes:

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

They are loaded when first used, so that the command line can check its arguments, and say what is
not installed, before torch and Megatron are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lirpa_megatron.compat import requirements

if TYPE_CHECKING:
    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.parallelize import explain, parallelize
    from lirpa_megatron.adapters.stages import PipelineStage
    from lirpa_megatron.adapters.views import at_position, bert_head, from_layer
    from lirpa_megatron.bounded_module import BoundedModule
    from lirpa_megatron.compat.auto_lirpa import BoundedParameter, BoundedTensor, PerturbationLpNorm
    from lirpa_megatron.complete.input_splits import bound_by_splits
    from lirpa_megatron.complete.library import branch_and_bound
    from lirpa_megatron.crown.options import METHODS
    from lirpa_megatron.errors import RemoteRankError, SPMDError, UserError
    from lirpa_megatron.parallel.spmd import guard
    from lirpa_megatron.problem.directions import directions, segment
    from lirpa_megatron.problem.margins import (
        classification_margins,
        label_token_margins,
        next_token_margins,
        smallest_margin,
        some_label_wins,
    )
    from lirpa_megatron.problem.perturbations import PerturbationHull, PerturbationSegments
    from lirpa_megatron.problem.token_perturbations import perturb_tokens

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BoundedModule",
    "BoundedParameter",
    "BoundedTensor",
    "PerturbationHull",
    "PerturbationLpNorm",
    "PerturbationSegments",
    "PipelineStage",
    "RemoteRankError",
    "SPMDError",
    "UserError",
    "at_position",
    "bert_head",
    "bound_by_splits",
    "branch_and_bound",
    "classification_margins",
    "directions",
    "embed",
    "explain",
    "from_layer",
    "guard",
    "label_token_margins",
    "next_token_margins",
    "parallelize",
    "perturb_tokens",
    "segment",
    "smallest_margin",
    "some_label_wins",
]

_MODULES = {
    "adapters.embeddings": ("embed",),
    "adapters.parallelize": ("explain", "parallelize"),
    "adapters.stages": ("PipelineStage",),
    "adapters.views": ("at_position", "bert_head", "from_layer"),
    "bounded_module": ("BoundedModule",),
    "errors": ("RemoteRankError", "SPMDError", "UserError"),
    "compat.auto_lirpa": ("BoundedParameter", "BoundedTensor", "PerturbationLpNorm"),
    "complete.input_splits": ("bound_by_splits",),
    "complete.library": ("branch_and_bound",),
    "crown.options": ("METHODS",),
    "parallel.spmd": ("guard",),
    "problem.directions": ("directions", "segment"),
    "problem.margins": (
        "classification_margins", "label_token_margins", "next_token_margins", "smallest_margin",
        "some_label_wins",
    ),
    "problem.perturbations": ("PerturbationHull", "PerturbationSegments"),
    "problem.token_perturbations": ("perturb_tokens",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            requirements.check()
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value  # this function is not asked for it again
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
