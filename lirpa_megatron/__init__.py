"""lirpa_megatron: certified bounds for Megatron-core models, exact under tensor parallelism.

The public names are auto_LiRPA's, so that an import is all that changes:

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
"""

from lirpa_megatron.host import BoundedParameter, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters.parallelize import explain, parallelize
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.errors import RemoteRankError, SPMDError, UserError
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
