"""Affine forms of values in the model's input, and the ranges that follow from them."""
