"""Process groups, guarded collectives, agreement between ranks, layouts of A."""

from lirpa_megatron.compat import requirements

requirements.check()
