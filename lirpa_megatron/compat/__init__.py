"""What differs between releases of auto_LiRPA, megatron-core and torch."""
