"""Arithmetic whose rounding is counted: what `rounding` and the operators' own code rest on."""
