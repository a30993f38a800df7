"""Process groups, guarded collectives, agreement between ranks, layouts of A."""

from lirpa_megatron import requirements

requirements.check()
