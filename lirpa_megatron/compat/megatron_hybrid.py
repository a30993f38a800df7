"""megatron-core's HybridModel and the stack of its layers, under their names in each release.

Until 0.17 they are called MambaModel and MambaStack; from 0.18 on MambaModel is a subclass that
renames an argument.
"""

from __future__ import annotations

import importlib.util
import inspect

if importlib.util.find_spec("megatron.core.models.hybrid") is not None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
else:
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules


def _argument(*names: str) -> str:
    known = inspect.signature(HybridModel.__init__).parameters
    return next(name for name in names if name in known)


PATTERN = _argument("hybrid_layer_pattern", "hybrid_override_pattern")
"""The model's argument that has a letter for each layer (since 0.17 the first of these)."""
STACK_SPEC = _argument("hybrid_stack_spec", "mamba_stack_spec")
"""The model's argument for the specification of its stack."""

__all__ = ["PATTERN", "STACK_SPEC", "HybridModel", "HybridStack", "HybridStackSubmodules"]
