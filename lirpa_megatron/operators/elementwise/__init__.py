"""Elementwise functions of one or two values."""
