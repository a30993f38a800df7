"""What `lirpa-megatron inspect` prints: a checkpoint's model, and what a job on it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint.description import ModelDescription
from lirpa_megatron.checkpoint.estimates import (
    Estimate,
    estimate,
    matmul_rate,
    parameter_count,
    stage_bytes,
)
from lirpa_megatron.checkpoint.hugging_face_config import is_hugging_face
from lirpa_megatron.checkpoint.ignored import ignored_lines
from lirpa_megatron.checkpoint.language_model import read_model_description
from lirpa_megatron.checkpoint.layout import data_directory
from lirpa_megatron.checkpoint.reader import holds_network, read_description
from lirpa_megatron.checkpoint.stage import split_layers, stages_of
from lirpa_megatron.crown.stage_split import stage_cost
from lirpa_megatron.networks.network import NetworkDescription
from lirpa_megatron.networks.stages import parts_of

TP_SIZES = (1, 2, 4, 8)
PP_SIZES = (2, 4, 8)
SEQ_LENGTH = 32


def inspect(
    checkpoint: Path,
    iteration: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seq_length: int | None = None,
    max_spec_rows: int | None = None,
    verbose: bool = False,
) -> str:
    """The report, lines of text; weights are not loaded.

    Args:
        checkpoint, iteration, overrides: as for `read_model_description`.
        seq_length: tokens of an input, for the estimates (default 32, or what the model takes).
        max_spec_rows: of the estimates.
        verbose: whether to list what was read and ignored.

    Raises:
        UserError: whatever is wrong with the checkpoint.
    """
    if not is_hugging_face(checkpoint) and holds_network(data_directory(checkpoint, iteration)):
        return _of_network(checkpoint, read_description(checkpoint, iteration))
    description = read_model_description(checkpoint, iteration, overrides)
    if seq_length is None:
        seq_length = min(SEQ_LENGTH, description.max_position_embeddings)
    lines = _facts(_model_facts(checkpoint, description))
    dtype = torch.float64 if description.stored.dtype == "float64" else torch.float32
    rate, found = matmul_rate(dtype), {
        size: estimate(description, size, seq_length, dtype, max_spec_rows)
        for size in TP_SIZES if not description.misfit(size)
    }
    lines += ["", *_estimates(description, found, seq_length, max_spec_rows, dtype, rate)]
    lines += _pipelines(description, found, rate)
    if verbose:
        lines += ["", *ignored_lines(checkpoint, iteration)]
    return "\n".join(lines)


def _facts(facts: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {text}" for name, text in facts]


def _model_facts(checkpoint: Path, d: ModelDescription) -> list[tuple[str, str]]:
    stored = d.stored
    sizes = " x ".join(
        f"{name}={'unknown' if size is None else size}"
        for name, size in (("TP", stored.tensor_parallel), ("PP", stored.pipeline_parallel))
    )
    heads = f"{d.num_attention_heads} of size {d.kv_channels}"
    if d.num_query_groups != d.num_attention_heads:
        heads += f", {d.num_query_groups} query groups"
    tokens = "an unknown number" if d.vocab_size is None else f"{d.vocab_size:,}"
    positions = {"learned_absolute": "learned", "rope": "rotary", "none": "none"}
    place = positions[d.position_embedding_type]
    if d.position_embedding_type == "rope":
        place += f" (base {d.rotary_base:g}, {100 * d.rotary_percent:g}% of each head)"
    if d.attention_window is not None:
        place += f"; a window of {d.attention_window:,}, which inputs must not exceed"
    gate = " (gated)" if d.gated else ""
    biases = "all linear layers" if d.add_bias_linear else "QKV" if d.add_qkv_bias else "none"
    gamma = ", zero-centred" if d.zero_centered_gamma else ""
    return [
        ("checkpoint", str(checkpoint)),
        ("format", f"{stored.format}, iteration {stored.iteration}"),
        ("written with", sizes),
        ("described by", stored.described_by),
        ("stored as", stored.dtype),
        ("architecture", f"{d.kind}, {d.num_layers} layers{_letters(d.layers)}"),
        ("parameters", f"{parameter_count(d):,}"),
        ("hidden size", f"{d.hidden_size:,}"),
        ("FFN size", f"{d.ffn_hidden_size:,}, {d.activation}{gate}"),
        ("heads", heads),
        ("norm", f"{d.normalization}, epsilon {d.layernorm_epsilon:g}{gamma}"
         + (", also of queries and keys" if d.qk_layernorm else "")),
        ("positions", f"{place}, at most {d.max_position_embeddings:,}"),
        ("biases", biases),
        ("vocabulary", f"{d.padded_vocab_size:,} rows, of which {tokens} are tokens"),
        ("output layer", "the word embeddings (tied)" if d.tied else "of its own"),
        ("verifiable", _tasks(d)),
    ]


def _letters(layers: str | None) -> str:
    if layers is None:
        return ""
    return f": {layers if len(layers) <= 40 else layers[:40] + '...'} (* attention, - MLP)"


def _tasks(d: ModelDescription) -> str:
    if d.kind != "BERT":
        return "the next token (next_token_margins); classes by label tokens (label_token_margins)"
    masked = "the word at a masked position (next_token_margins)"
    if d.binary_head:
        return f"classification by the binary head (bert_head, classification_margins); {masked}"
    return masked


def _estimates(
    d: ModelDescription, found: Mapping[int, Estimate], seq_length: int, max_spec_rows: int | None,
    dtype: torch.dtype, rate: float,
) -> list[str]:
    rows = "rows in chunks" if max_spec_rows is None else f"{max_spec_rows:,} rows at once"
    header = ("TP", "vocabulary rows", "weights", "A and forms", "memory", "time")
    table = [header]
    notes = []
    for size in TP_SIZES:
        if size not in found:
            notes.append(f"TP={size} is not possible: {d.misfit(size)}.")
            continue
        e = found[size]
        table.append((
            str(size), f"{d.vocabulary_rows(size):,}", _size(e.weight_bytes), _size(e.a_bytes),
            _size(e.weight_bytes + e.a_bytes), _duration(e.operations / rate),
        ))
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    ]
    return [
        f"Estimate for each rank: CROWN, one input of {seq_length} tokens, all perturbed, {rows},",
        f"{str(dtype).removeprefix('torch.')}, at the {rate / 1e9:.0f} GFLOP/s that a matrix "
        "product reaches on this CPU.",
        "Counted from the sizes, not measured; each can be off by a factor of 3.",
        "", *lines, *([""] if notes else []), *notes,
    ]


def _pipelines(d: ModelDescription, found: Mapping[int, Estimate], rate: float) -> list[str]:
    """How layers are split over pipeline stages, and estimates for the grid of TP and PP; nothing
    for a model of one layer.

    Args:
        d: of the model.
        found: tensor-parallel size -> what is estimated for one stage.
        rate: operations per second.
    """
    sizes = [size for size in PP_SIZES if size <= d.num_layers]
    if not sizes:
        return []
    table = [("PP", "layers of the stages", *(f"TP={tp}" for tp in found))]
    total = stage_cost(0, d.num_layers, d.num_layers)
    numbers = {name: math.prod(p.shape) for name, p in d.parameters().items()}
    for size in sizes:
        stages = stages_of(split_layers(d.num_layers, size))
        shares = [
            (sum(n for name, n in numbers.items() if stage.has(name, d.tied))
             / sum(numbers.values()), stage.layers / d.num_layers)
            for stage in stages
        ]
        busiest = max(stage_cost(stage.first, stage.end, d.num_layers) for stage in stages) / total
        cells = [
            f"{_size(max(stage_bytes(e, *share, size) for share in shares))}, "
            f"{_duration(busiest * e.operations / rate)}"
            for e in found.values()
        ]
        table.append((str(size), " + ".join(str(stage.layers) for stage in stages), *cells))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "", "Over pipeline stages: memory and time of the rank that has most, without waiting",
        "(--pipeline-parallel-size; early layers are passed more often, so that the first stages",
        "have fewer; --pipeline-layers chooses):",
        "", *(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in table
        ),
    ]


def _size(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    exponent = min(int(math.log(count, 1024)), 6)
    return f"{count / 1024**exponent:.1f} {'B KiB MiB GiB TiB PiB EiB'.split()[exponent]}"


def _duration(seconds: float) -> str:
    for limit, unit, scale in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60),
                               (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def _of_network(checkpoint: Path, d: NetworkDescription) -> str:
    count = sum(math.prod(shape) for shape in d.weight_shapes().values())
    ops: dict[str, int] = {}
    for layer in d.layers:
        ops[layer.op] = ops.get(layer.op, 0) + 1
    widths = [str(d.n_in)] + [str(layer.n_out) for layer in d.layers if layer.op == "linear"]
    parts = len(parts_of(d))
    return "\n".join(_facts([
        ("checkpoint", str(checkpoint)),
        ("format", "torch_dist, written by import-onnx"),
        ("stored as", d.dtype),
        ("architecture", f"network {d.name}: "
         + ", ".join(f"{number} {op}" for op, number in ops.items())),
        ("parameters", f"{count:,}"),
        ("widths", "-".join(widths)),
        ("input shape", str(list(d.input_shape))),
        ("output shape", str(list(d.output_shape))),
        ("verifiable", "VNN-LIB properties (verify --load), at any tensor-parallel size and up to "
         f"{parts} pipeline stage{'s' * (parts > 1)}"),
    ]))
