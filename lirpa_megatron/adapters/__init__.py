"""Megatron's modules, and plain ones, as modules that can be traced and sharded."""

from lirpa_megatron.compat import requirements

requirements.check()

# They register their facades when they are imported.
from lirpa_megatron.adapters import hybrid, language_models, margins, transformer  # noqa: E402, F401
