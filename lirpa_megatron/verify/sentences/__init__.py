"""Sentences that a language model reads: which are certified, how far, and what breaks them."""
