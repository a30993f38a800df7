"""Token ids, near synonyms of them, and points of the hulls of their vectors."""

from __future__ import annotations

import torch
import transformers

SUBSTITUTES = {1: [4, 5, 6], 2: [9]}


def short_ids(length=3):
    """Token ids [B, length]."""
    return transformers.tokens()[0][:, :length]


def near_words(model, scale=0.05):
    """Words close to each other, as near synonyms are."""
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(scale)
    return model


def mixed(vertices, number):
    """Points of the hulls [number, B, S, h]: vertices, and convex combinations of them."""
    shares = torch.rand(number, *vertices.shape[:3]).double() ** 4
    shares[: number // 2] = torch.nn.functional.one_hot(
        shares[: number // 2].argmax(-1), vertices.shape[2]).double()
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.einsum("nbsk,bskh->nbsh", shares, vertices)
