"""lirpa_megatron: certified bounds for Megatron-core models, exact under tensor parallelism.

The public names are auto_LiRPA's, so that an import is all that changes:

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

They are loaded when first used, so that the command line can check its arguments, and say what is
not installed, before torch and Megatron are imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
_PROJECTS = {"torch": "torch", "megatron": "megatron-core"}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(_imported(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        project = _PROJECTS.get((error.name or "").split(".")[0])
        if project is None:
            raise
        raise ImportError(
            f"{project} is not installed: run `make setup`, or `pip install {project}`"
        ) from error
