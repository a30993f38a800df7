"""Attention scores, softmax, and weighted values."""
