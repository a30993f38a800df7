"""lirpa_megatron: certified bounds for Megatron-core models, exact under tensor parallelism.

The public names are auto_LiRPA's, so that an import is all that changes:

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

They are loaded when first used, so that the command line can check its arguments, and say what is
not installed, before torch and Megatron are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lirpa_megatron import requirements

if TYPE_CHECKING:
    from lirpa_megatron.adapters.parallelize import explain, parallelize
    from lirpa_megatron.bounded_module import BoundedModule
    from lirpa_megatron.errors import RemoteRankError, SPMDError, UserError
    from lirpa_megatron.host import BoundedParameter, BoundedTensor, PerturbationLpNorm
    from lirpa_megatron.options import METHODS
    from lirpa_megatron.parallel.spmd import guard

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BoundedModule",
    "BoundedParameter",
    "BoundedTensor",
    "PerturbationLpNorm",
    "RemoteRankError",
    "SPMDError",
    "UserError",
    "explain",
    "guard",
    "parallelize",
]

_MODULES = {
    "adapters.parallelize": ("explain", "parallelize"),
    "bounded_module": ("BoundedModule",),
    "errors": ("RemoteRankError", "SPMDError", "UserError"),
    "host": ("BoundedParameter", "BoundedTensor", "PerturbationLpNorm"),
    "options": ("METHODS",),
    "parallel.spmd": ("guard",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            requirements.check()
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
