"""How much memory and time the bounds of a language model will take: counted, roughly.

CROWN bounds every input of a non-linear operator first, by a backward pass of its own. In a
transformer of hidden size h, with S tokens perturbed, these start nodes have, in each layer,

    rows = S * (2 h + rows of linear_qkv + rows of linear_fc1)

(inputs of the two norms, of attention and of the activation). A pass from layer l (from 0) goes
through l + 1 layers. What is counted:

- A matrices: of the largest start node, S * max(qkv, fc1) rows (or `max_spec_rows`), each of
  S * max(h, qkv, fc1) elements, once for the lower and once for the upper bound, of which a rank
  holds 1/p; but no more than passes carry at once on a CPU. Five of these are alive at a time.
- affine forms (`operators.affine.form`): S * h coefficients for each of the
  S * (2 h + qkv + heads S) numbers of a layer that have a form, whole on every rank for the 2 h of
  the norms.
- over pipeline stages a rank has its stage's weights, the forms of its layers and, as it takes
  shorter chunks, its part of A; the work is that of the layers (`crown.stage_split`).
- work: 2 bounds * 2 operations * rows * S * (weights of the layers passed), summed over all passes.
  A TP rank does 1/p. The rest (relaxations, attention) takes about as long as these products in
  `benchmarks/transformers.py`, hence a factor of 2.

On the models of that benchmark (3 layers, 8 and 16 tokens, TP=1 and 2), memory measured was 1.2 to
2.9 times what is estimated here, and time 0.8 to 1.7 times. Longer inputs, alpha-CROWN and other
devices can be further off. Batches are of 1.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from lirpa_megatron.checkpoint.description import ModelDescription
from lirpa_megatron.crown.limits import CACHE, FORM_LIMIT

_ALIVE, _OVERHEAD = 5, 2


@dataclass(frozen=True)
class Estimate:
    """For one tensor-parallel rank."""

    weight_bytes: int
    # A and forms
    a_bytes: int
    form_bytes: int
    # floating-point operations, with the overhead factor
    operations: int


def weight_elements(description: ModelDescription, tensor_parallel: int = 1) -> int:
    """Elements of the parameters on one rank, padding of the vocabulary included."""
    total = 0
    for parameter in description.parameters().values():
        shape = list(parameter.shape)
        if parameter.vocabulary:
            shape[0] = description.vocabulary_rows(tensor_parallel)
        if parameter.partition_dim is not None:
            shape[parameter.partition_dim] //= tensor_parallel
        total += math.prod(shape)
    return total


def parameter_count(description: ModelDescription) -> int:
    """Parameters of the model as stored, padding of the vocabulary included."""
    return sum(math.prod(p.shape) for p in description.parameters().values())


def estimate(
    description: ModelDescription, tensor_parallel: int, seq_length: int, dtype: torch.dtype,
    max_spec_rows: int | None = None,
) -> Estimate:
    """Memory and work of one rank for CROWN bounds of one input.

    Args:
        description: of the model.
        tensor_parallel: number of ranks, for which the model must not be a `misfit`.
        seq_length: tokens of the input, all perturbed.
        dtype: of the run.
        max_spec_rows: most rows of A carried at once; None: what fits `limits.CACHE`.
    """
    d = description
    widest = max(d.qkv_size, d.fc1_size)
    rows = seq_length * widest
    if max_spec_rows is not None:
        rows = min(rows, max_spec_rows)
    rows_bytes = 2 * rows * seq_length * max(d.hidden_size, widest) * dtype.itemsize
    if max_spec_rows is None:
        rows_bytes = min(rows_bytes, CACHE)
    forms = _form_elements(d, tensor_parallel, seq_length) * dtype.itemsize
    passed = products = 0
    for layer in range(d.num_layers):
        passed += sum(math.prod(p.shape) for p in d.layer_parameters(layer).values())
        starts = d.has_attention(layer) * (d.hidden_size + d.qkv_size)
        starts += d.has_mlp(layer) * (d.hidden_size + d.fc1_size)
        products += starts * seq_length * passed
    operations = _OVERHEAD * 4 * products * seq_length
    return Estimate(
        weight_bytes=weight_elements(d, tensor_parallel) * dtype.itemsize,
        a_bytes=_ALIVE * rows_bytes // tensor_parallel + forms,
        form_bytes=forms,
        operations=operations // tensor_parallel,
    )


def stage_bytes(e: Estimate, weights: float, layers: float, stages: int) -> float:
    """Bytes of a rank of a pipeline stage.

    Args:
        e: of one stage that has all layers.
        weights, layers: the stage's share of the weights, and of the layers.
        stages: how many there are.
    """
    return (
        weights * e.weight_bytes + layers * e.form_bytes + (e.a_bytes - e.form_bytes) / stages
    )


def _form_elements(d: ModelDescription, tensor_parallel: int, seq_length: int) -> int:
    """Numbers in the affine forms of one rank."""
    coefficients, total = seq_length * d.hidden_size, 0
    attention = sum(map(d.has_attention, range(d.num_layers)))
    norms = attention + sum(map(d.has_mlp, range(d.num_layers)))
    for times, numbers, share in (
        (norms, seq_length * d.hidden_size, 1),
        (attention, seq_length * d.qkv_size, tensor_parallel),
        (attention, seq_length**2 * d.num_attention_heads, tensor_parallel),
    ):
        if numbers * coefficients <= FORM_LIMIT:
            total += times * (numbers * coefficients // share)
    return total


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 768) -> float:
    """Operations per second of a matrix product on this machine; takes a fraction of a second."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        _ = (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
