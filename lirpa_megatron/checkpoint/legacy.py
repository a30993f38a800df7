"""The weights of a model in Megatron's older format, one file for each model-parallel rank.

    iter_0000010/mp_rank_TT/model_optim_rng.pt        tensor-parallel rank TT
    iter_0000010/mp_rank_TT_PPP/model_optim_rng.pt    and pipeline stage PPP

Each file holds a rank's part of the model, its layers counted from 0 in every stage. Files are
mapped into memory: what is not read (the optimizer's state, other ranks' weights) stays on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint import names
from lirpa_megatron.checkpoint.description import ParameterDescription
from lirpa_megatron.checkpoint.safe_unpickle import read_inert
from lirpa_megatron.errors import UserError

FORMAT = "torch"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_FILE = "model_optim_rng.pt"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_HEAD_COPY = "word_embeddings_for_head.weight"


def is_legacy(directory: Path) -> bool:
    """Whether a directory (`release` or `iter_*`) holds files of this format."""
    return any(path.name.startswith("mp_rank_") for path in directory.iterdir())


class LegacyWeights:
    """The model's tensors in one directory; every rank's file is opened, none is copied."""

    format = FORMAT

    def __init__(self, directory: Path) -> None:
        """Raises UserError if files are missing, damaged, hostile, or of an unknown layout."""
        self.directory = directory
        paths = _rank_files(directory)
        self._tp, self._pp = len(paths[0]), len(paths)
        self._common: dict[str, Any] = {}
        # parameter -> its part on every tensor-parallel rank
        self._parts: dict[str, list[torch.Tensor]] = {}
        # how many layers the stages before have
        self._first_layer = 0
        for stage, files in enumerate(paths):
            self._add_stage(stage, files)

    def names(self) -> set[str]:
        """The parameters that are stored."""
        return set(self._parts)

    def shape(self, name: str, parameter: ParameterDescription | None = None) -> tuple[int, ...]:
        """Full shape of a stored parameter; `parameter` says along which dimension it is split."""
        parts = self._parts[name]
        shape = tuple(parts[0].shape)
        if any(tuple(part.shape) != shape for part in parts):
            raise UserError(
                f"tensor {name} of {self.directory} has different shapes in the files of the "
                "tensor-parallel ranks"
            )
        dim = None if parameter is None else parameter.partition_dim
        if dim is None or dim >= len(shape):
            return shape
        return (*shape[:dim], shape[dim] * self._tp, *shape[dim + 1 :])

    def dtypes(self) -> set[torch.dtype]:
        """What the parameters are stored in."""
        return {part.dtype for parts in self._parts.values() for part in parts}

    def read(
        self, name: str, parameter: ParameterDescription, offsets: Sequence[int],
        sizes: Sequence[int], dtype: torch.dtype,
    ) -> torch.Tensor:
        """The block [offsets, offsets + sizes) of a parameter's full tensor, on the CPU.

        Raises:
            UserError: NaN or infinite values, or ranks whose copies of a replicated parameter
                differ.
        """
        parts, dim = self._parts[name], parameter.partition_dim
        if dim is None:
            value = parts[0][_slices(offsets, sizes)].to(dtype)
            for rank, part in enumerate(parts[1:], 1):
                if not torch.equal(part, parts[0]):
                    raise UserError(
                        f"tensor {name} of {self.directory} is not the same in the files of the "
                        f"tensor-parallel ranks 0 and {rank}, though it is not sharded"
                    )
        else:
            # NaN, so that a part which no file holds is noticed below.
            value = torch.full(tuple(sizes), math.nan, dtype=dtype)
            self._copy(value, name, parts, parameter, offsets)
        value = value.clone()  # of its own: the file may go
        if not torch.isfinite(value).all():
            raise UserError(f"tensor {name} in {self.directory} has NaN or infinite values")
        return value

    def common(self) -> dict[str, Any]:
        """What rank 0's file holds besides the model."""
        return self._common

    def parallel_sizes(self) -> tuple[int | None, int | None]:
        """(tensor-, pipeline-parallel) sizes that the files were written with."""
        return self._tp, self._pp

    def drop_copy_of_embeddings(self) -> None:
        """Forgets the last stage's copy of tied word embeddings, after a comparison.

        Raises:
            UserError: it is not the same as the first stage's.
        """
        if self._pp == 1:
            return
        for copy, original in zip(
            self._parts.pop(_OUTPUT, []), self._parts.get(_EMBEDDING, []), strict=False
        ):
            if not torch.equal(copy, original):
                raise UserError(
                    f"checkpoint {self.directory}: the output layer of the last pipeline stage is "
                    "not the word embeddings, though its arguments say that they are tied"
                )

    def _copy(
        self, value: torch.Tensor, name: str, parts: list[torch.Tensor],
        parameter: ParameterDescription, offsets: Sequence[int],
    ) -> None:
        """Fills a block of a sharded parameter from the parts that it overlaps."""
        dim, halves = parameter.partition_dim, 2 if parameter.gated else 1
        begin, end = offsets[dim], offsets[dim] + value.shape[dim]
        length = parts[0].shape[dim] // halves
        rest = [slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True)]
        for half in range(halves):
            for rank, part in enumerate(parts):
                # Rank r holds [gate_r; up_r]; in the whole tensor all of gate comes first.
                start = (half * self._tp + rank) * length
                first, last = max(begin, start), min(end, start + length)
                if first >= last:
                    continue
                source, target = list(rest), [slice(None)] * value.ndim
                inside = half * length - start
                source[dim] = slice(first + inside, last + inside)
                target[dim] = slice(first - begin, last - begin)
                value[tuple(target)] = part[tuple(source)].to(value.dtype)

    def _add_stage(self, stage: int, files: list[Path]) -> None:
        layers: set[int] = set()
        for tp_rank, path in enumerate(files):
            content = read_inert(path, str(path), mmap=True)
            if tp_rank == 0 and stage == 0 and isinstance(content, dict):
                self._common = {
                    key: value for key, value in content.items()
                    if key in ("args", "checkpoint_version", "iteration", "network")
                }
            for stored, tensor in _model_of(content, path).items():
                name = self._global_name(stored, layers, path)
                parts = self._parts.setdefault(name, [])
                if len(parts) != tp_rank:
                    raise UserError(
                        f"checkpoint file {path}: tensor {stored} is not in the files of all "
                        "tensor-parallel ranks, or in those of two pipeline stages"
                    )
                parts.append(tensor)
        for name, parts in self._parts.items():
            if len(parts) != self._tp:
                raise UserError(
                    f"tensor {name} of {self.directory} is in the files of {len(parts)} "
                    f"tensor-parallel ranks, not in all {self._tp}"
                )
        if layers != set(range(len(layers))):
            raise UserError(f"checkpoint file {files[0]}: its layers are not numbered from 0")
        self._first_layer += len(layers)

    def _global_name(self, stored: str, layers: set[int], path: Path) -> str:
        if stored == _HEAD_COPY:
            return _OUTPUT
        name = names.local_name(stored)
        split = names.split_layer(name)
        if split is None:
            return name
        block, index, rest = split
        if index > 100_000:
            raise UserError(f"checkpoint file {path}: layer {index} is not believable")
        layers.add(index)
        return names.layer_name(block, self._first_layer + index, rest)


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))


def _rank_files(directory: Path) -> list[list[Path]]:
    """Files by pipeline stage and tensor-parallel rank.

    Raises:
        UserError: a rank's file is missing, or there are folders of an unknown form.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in directory.iterdir():
        if not path.name.startswith("mp_rank_"):
            continue
        match = _RANK.fullmatch(path.name)
        if not match:
            raise UserError(
                f"checkpoint folder {path} is not known: expert-parallel checkpoints (MoE) are not "
                "supported"
            )
        found[int(match[2] or 0), int(match[1])] = path / _FILE
    pp = max(stage for stage, _ in found) + 1
    tp = max(rank for _, rank in found) + 1
    if max(tp, pp) > 100_000 or len(found) > 100_000:
        raise UserError(f"checkpoint {directory} has a rank that is not believable")
    for stage in range(pp):
        for rank in range(tp):
            if (stage, rank) not in found or not found[stage, rank].is_file():
                raise UserError(
                    f"checkpoint {directory} lacks the file of tensor-parallel rank {rank} of {tp}"
                    f" in pipeline stage {stage} of {pp}"
                )
    return [[found[stage, rank] for rank in range(tp)] for stage in range(pp)]


def _model_of(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The parameters in a file."""
    if not isinstance(content, dict):
        raise UserError(f"checkpoint file {path} is corrupt (it holds no dictionary)")
    if "model0" in content:
        raise UserError(
            f"checkpoint file {path} has virtual pipeline stages (model0, model1, ...), which are "
            "not supported: save it with torch_dist, or without --num-layers-per-virtual-pipeline-"
            "stage"
        )
    model = content.get("model")
    if not isinstance(model, dict):
        raise UserError(f"checkpoint file {path} holds no model")
    if "language_model" in model:
        raise UserError(
            f"checkpoint file {path} was written by Megatron-LM's legacy (not core) models, which "
            "are not supported: convert it with Megatron-LM's tools/checkpoint/convert.py"
        )
    parameters = {}
    for name, tensor in model.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"checkpoint file {path}: {str(name)[:80]!r} is not a tensor's name")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise UserError(f"checkpoint file {path}: tensor {name} is not a dense tensor")
        parameters[name] = tensor
    return parameters
