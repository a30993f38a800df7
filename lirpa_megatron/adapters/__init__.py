"""Megatron's modules, and plain ones, as modules that can be traced and sharded."""

from lirpa_megatron.compat import requirements

requirements.check()
