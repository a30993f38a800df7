"""Scores, softmax and weighted values."""
