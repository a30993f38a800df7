"""The weights of a Hugging Face folder, under the names of Megatron's local layer spec.

Megatron's parameter is rows of one or several stored tensors, one after the other:

* linear_qkv: for each group of queries its q rows, then its k rows, then its v rows;
* linear_fc1 of a gated MLP: gate, then up;
* everything else: one tensor. GPT-2 stores its linear layers transposed ([in, out]), and q, k, v of
  all heads as the columns of one.

Every block of every parameter can be read alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint.description import ParameterDescription
from lirpa_megatron.checkpoint.hugging_face_config import read_config
from lirpa_megatron.checkpoint.safetensors_folder import SafetensorsFolder
from lirpa_megatron.errors import UserError

FORMAT = "Hugging Face"
_WORDS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias|(model\.)?(layers\.\d+\.self_attn\.)?"
    r"rotary_emb\.inv_freq"
)
"""Masks and frequencies, which older releases stored beside the weights."""


@dataclass(frozen=True)
class _Rows:
    """Rows [first, first + count) of a stored tensor; of its columns if it is transposed."""

    key: str
    first: int
    count: int
    transposed: bool = False


class HuggingFaceWeights:
    """The model's tensors in one folder."""

    format = FORMAT

    def __init__(self, directory: Path) -> None:
        """Raises UserError for a folder that is damaged, hostile, or of another model."""
        self.directory = directory
        self.kind, self.arguments = read_config(directory)
        self.files = SafetensorsFolder(directory)
        self._names = {n for n in self.files.names() if not _BUFFERS.fullmatch(n)}
        self._rows: dict[str, list[_Rows]] = {}
        self._used: set[str] = set()
        self._find_places()

    def names(self) -> set[str]:
        """The parameters that are stored, and the names of tensors that are none."""
        return set(self._rows) | {f"{name} (of the folder)" for name in self._names - self._used}

    def shape(self, name: str, parameter: ParameterDescription | None = None) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        rows = self._rows[name]
        rest = {self._rest(part) for part in rows}
        if len(rest) != 1:
            raise UserError(f"tensors of {name} in {self.directory} do not fit together")
        return (sum(part.count for part in rows), *rest.pop())

    def dtypes(self) -> set[torch.dtype]:
        """What the parameters are stored in."""
        return {self.files.dtype(name) for name in self._used}

    def read(
        self, name: str, parameter: ParameterDescription, offsets: Sequence[int],
        sizes: Sequence[int], dtype: torch.dtype,
    ) -> torch.Tensor:
        """The block [offsets, offsets + sizes) of a parameter's full tensor, on the CPU.

        Raises:
            UserError: unreadable data, NaN or infinite values.
        """
        begin, end = offsets[0], offsets[0] + sizes[0]
        columns = [slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True)]
        pieces, at = [], 0
        for part in self._rows[name]:
            first, last = max(begin, at), min(end, at + part.count)
            if first < last:
                rows = slice(part.first + first - at, part.first + last - at)
                if part.transposed:
                    pieces.append(self.files.read(part.key, *columns, rows).T)
                else:
                    pieces.append(self.files.read(part.key, rows, *columns))
            at += part.count
        value = torch.cat([piece.to(dtype) for piece in pieces]).contiguous()
        if not torch.isfinite(value).all():
            raise UserError(f"tensor {name} in {self.directory} has NaN or infinite values")
        return value

    def common(self) -> dict[str, Any]:
        """Nothing besides the arguments."""
        return {}

    def parallel_sizes(self) -> tuple[int | None, int | None]:
        """The folder is not split."""
        return 1, 1

    def drop_copy_of_embeddings(self) -> None:
        """Forgets the output layer of a tied model, after a comparison.

        Raises:
            UserError: it is not the word embeddings.
        """
        if _OUTPUT not in self._rows:
            return
        words, output = (self._rows.pop(n) if n == _OUTPUT else self._rows[n]
                         for n in (_WORDS, _OUTPUT))
        same = self.files.shape(words[0].key) == self.files.shape(output[0].key)
        if not same or not torch.equal(
            self.files.read(words[0].key), self.files.read(output[0].key)
        ):
            raise UserError(
                f"folder {self.directory}: lm_head is not the word embeddings, though its config "
                "says that they are tied"
            )

    def words(self) -> str:
        """The stored name of the word embeddings."""
        return self._rows[_WORDS][0].key

    def untied(self) -> bool:
        """Whether the folder has an output layer of its own."""
        return _OUTPUT in self._rows

    # ---------------------------------------------------------------- places

    def _find_places(self) -> None:
        prefix = "transformer." if "transformer.wte.weight" in self._names else ""
        prefix = "model." if self.kind != "gpt2" else prefix
        (self._gpt2_places if self.kind == "gpt2" else self._llama_places)(prefix)
        self._whole(_OUTPUT, "lm_head.weight")

    def _gpt2_places(self, prefix: str) -> None:
        self._whole(_WORDS, f"{prefix}wte.weight")
        self._whole("embedding.position_embeddings.weight", f"{prefix}wpe.weight")
        self._norm("decoder.final_layernorm", f"{prefix}ln_f")
        heads = self._count("num_attention_heads")
        for i in range(self._count("num_layers")):
            source, target = f"{prefix}h.{i}", f"decoder.layers.{i}"
            self._norm(f"{target}.input_layernorm", f"{source}.ln_1")
            self._norm(f"{target}.pre_mlp_layernorm", f"{source}.ln_2")
            self._linear(f"{target}.self_attention.linear_proj", f"{source}.attn.c_proj")
            self._linear(f"{target}.mlp.linear_fc1", f"{source}.mlp.c_fc")
            self._linear(f"{target}.mlp.linear_fc2", f"{source}.mlp.c_proj")
            for kind, turned in (("weight", True), ("bias", False)):
                key = f"{source}.attn.c_attn.{kind}"
                if key not in self._names:
                    continue
                rows = self.files.shape(key)[-1]
                size = rows // 3 // heads
                if rows != 3 * heads * size:
                    raise UserError(
                        f"tensor {key} of {self.directory} has {rows} columns, which "
                        f"{heads} heads do not divide"
                    )
                self._put(f"{target}.self_attention.linear_qkv.{kind}", [
                    _Rows(key, (part * heads + head) * size, size, turned)
                    for head in range(heads) for part in range(3)
                ])

    def _llama_places(self, prefix: str) -> None:
        self._whole(_WORDS, f"{prefix}embed_tokens.weight")
        self._norm("decoder.final_layernorm", f"{prefix}norm")
        for i in range(self._count("num_layers")):
            source, target = f"{prefix}layers.{i}", f"decoder.layers.{i}"
            self._norm(f"{target}.input_layernorm", f"{source}.input_layernorm")
            self._norm(f"{target}.pre_mlp_layernorm", f"{source}.post_attention_layernorm")
            attention = f"{target}.self_attention"
            self._norm(f"{attention}.q_layernorm", f"{source}.self_attn.q_norm")
            self._norm(f"{attention}.k_layernorm", f"{source}.self_attn.k_norm")
            self._whole(f"{attention}.linear_proj.weight", f"{source}.self_attn.o_proj.weight")
            self._whole(f"{target}.mlp.linear_fc2.weight", f"{source}.mlp.down_proj.weight")
            halves = [f"{source}.mlp.{half}_proj.weight" for half in ("gate", "up")]
            if all(key in self._names for key in halves):
                self._put(f"{target}.mlp.linear_fc1.weight",
                          [_Rows(key, 0, self.files.shape(key)[0]) for key in halves])
            for kind in ("weight", "bias"):
                self._qkv(f"{attention}.linear_qkv.{kind}",
                          [f"{source}.self_attn.{part}_proj.{kind}" for part in "qkv"])

    def _qkv(self, name: str, keys: list[str]) -> None:
        if not all(key in self._names for key in keys):
            return
        heads = self._count("num_attention_heads")
        groups = self._count("num_query_groups") if self.arguments["group_query_attention"] \
            else heads
        places = []
        sizes = [self.files.shape(key)[0] // groups for key in keys]
        for key, size in zip(keys, sizes, strict=True):
            if self.files.shape(key)[0] != size * groups:
                raise UserError(
                    f"tensor {key} of {self.directory} has {self.files.shape(key)[0]} rows, which "
                    f"{groups} groups of queries do not divide"
                )
        if sizes[1] != sizes[2] or sizes[0] * groups != sizes[1] * heads:
            raise UserError(
                f"tensors {', '.join(keys)} of {self.directory} have {sizes} rows for each group "
                f"of queries: not {heads} heads in {groups} groups"
            )
        for group in range(groups):
            places += [
                _Rows(key, group * size, size) for key, size in zip(keys, sizes, strict=True)
            ]
        self._put(name, places)

    def _count(self, name: str) -> int:
        value = self.arguments[name]
        if type(value) is not int or not 0 < value <= 100_000:
            raise UserError(f"folder {self.directory}: {name}={str(value)[:40]} is malformed")
        return value

    def _norm(self, name: str, key: str) -> None:
        for kind in ("weight", "bias"):
            self._whole(f"{name}.{kind}", f"{key}.{kind}")

    def _linear(self, name: str, key: str) -> None:
        """A layer of GPT-2's."""
        self._whole(f"{name}.weight", f"{key}.weight", transposed=True)
        self._whole(f"{name}.bias", f"{key}.bias")

    def _whole(self, name: str, key: str, transposed: bool = False) -> None:
        if key in self._names:
            shape = self.files.shape(key)
            if not shape or transposed and len(shape) != 2:
                raise UserError(f"tensor {key} of {self.directory} has shape {list(shape)}")
            self._put(name, [_Rows(key, 0, shape[1 if transposed else 0], transposed)])

    def _put(self, name: str, rows: list[_Rows]) -> None:
        for part in rows:
            shape = self.files.shape(part.key)
            if part.transposed and len(shape) != 2 or not shape:
                raise UserError(f"tensor {part.key} of {self.directory} has shape {list(shape)}")
        self._rows[name] = rows
        self._used |= {part.key for part in rows}

    def _rest(self, part: _Rows) -> tuple[int, ...]:
        """Shape without the rows."""
        shape = self.files.shape(part.key)
        return shape[:1] if part.transposed else shape[1:]
