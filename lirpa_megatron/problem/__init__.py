"""Perturbation sets and specifications."""
