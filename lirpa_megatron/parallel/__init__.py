"""Tensor parallelism: process groups, guarded collectives, agreement between ranks, layouts of A."""
