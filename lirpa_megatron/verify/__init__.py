"""Specifications, networks, certificates and attacks: everything behind `lirpa-megatron verify`."""
