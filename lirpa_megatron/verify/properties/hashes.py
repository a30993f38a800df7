"""A hash of a network that does not depend on how it is sharded."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from lirpa_megatron.verify.properties.loading import Loaded


def network_hash(loaded: Loaded) -> str:
    """SHA-256 of structure and weights, in the types of the file; every rank calls it.

    Sharded weights are gathered one after the other: a rank never holds more than one whole.
    """
    tp = loaded.bounded.context.collectives
    layers = [dataclasses.asdict(layer) for layer in loaded.description.layers]
    found = hashlib.sha256(json.dumps(layers, sort_keys=True).encode())
    for name, parameter in sorted(loaded.network.named_parameters()):
        value = parameter.detach()
        dim = getattr(parameter, "partition_dim", None)
        if tp.size > 1 and getattr(parameter, "tensor_model_parallel", False):
            value = tp.gather_results(value.transpose(0, dim).contiguous()).transpose(0, dim)
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        found.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
