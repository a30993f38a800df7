"""Where the tokenizer of a checkpoint lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lirpa_megatron.checkpoint.hugging_face_config import is_hugging_face
from lirpa_megatron.checkpoint.layout import data_directory, split_iteration
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.encoded import Tokenizer
from lirpa_megatron.verify.sentences.sentencepiece_tokenizer import ADDED, CONFIG
from lirpa_megatron.verify.sentences.tokenizer import read_tokenizer

_NAMES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
"""In one folder the first of them counts: they are forms of one tokenizer."""
_FOLDERS = (".", "tokenizer", "context", "context/nemo_tokenizer")


def find_tokenizer(checkpoint: Path, iteration: int | str | None = None) -> Path | None:
    """The tokenizer file of a checkpoint; None if there is none.

    It may lie in the folder of the checkpoint or of the iteration, or in `tokenizer/` or `context/`
    in one of them. `vocab.json` counts where `merges.txt` is beside it.

    Raises:
        UserError: tokenizers that differ in two of these places.
    """
    roots = [checkpoint, split_iteration(checkpoint)[0]]
    if not is_hugging_face(checkpoint):
        try:
            roots.append(data_directory(checkpoint, iteration))
        except UserError:
            pass  # what is wrong with the checkpoint is said where it is read
    found: dict[bytes, Path] = {}
    for folder in dict.fromkeys(root / inner for root in roots for inner in _FOLDERS):
        for name in _NAMES:
            path = folder / name
            if path.is_file() and (name != "vocab.json" or (folder / "merges.txt").is_file()):
                found.setdefault(_digest(path), path)
                break
    if len(found) > 1:
        raise UserError(
            f"checkpoint {checkpoint} has different tokenizers in "
            f"{' and '.join(str(path) for path in found.values())}: choose one with --tokenizer"
        )
    return next(iter(found.values()), None)


def check_forms(path: Path, tokenizer: Tokenizer) -> None:
    """Refuses other tokenizers in a folder that are not forms of the one that is used.

    The first of `_NAMES` has all tokens, those added to the others too. What cannot be read here
    (its package is missing, it is malformed) is not looked at.

    Args:
        path: of the file in use, found by `find_tokenizer`.
        tokenizer: read from it.

    Raises:
        UserError: a form with more tokens.
    """
    for name in _NAMES[_NAMES.index(path.name) + 1 :]:
        other = path.with_name(name)
        if not other.is_file():
            continue
        try:
            size = read_tokenizer(other).size
        except UserError:
            continue
        if size > tokenizer.size:
            raise UserError(
                f"tokenizer {path} has {tokenizer.size} tokens, {name} beside it {size}: they are "
                "not forms of one tokenizer: choose one with --tokenizer"
            )


def said_of(path: Path, checkpoint: Path) -> str:
    """What a result says of the tokenizer: its place, and the beginning of its SHA-256."""
    resolved, root = path.resolve(), split_iteration(checkpoint.resolve())[0]
    place = resolved.relative_to(root) if resolved.is_relative_to(root) else Path(path.name)
    return f"{place} (sha256 {_digest(path).hex()[:12]})"


def _digest(path: Path) -> bytes:
    """Of what decides the tokens: merges too, and what stands around sentencepiece's."""
    state = hashlib.sha256()
    names = {"vocab.json": ("merges.txt",), "tokenizer.model": (CONFIG, ADDED)}
    beside = [path.with_name(name) for name in names.get(path.name, ())]
    for file in (path, *(other for other in beside if other.is_file())):
        try:
            state.update(file.read_bytes())
        except OSError as error:
            raise UserError(f"tokenizer {file} cannot be read: {error.strerror}") from None
    return state.digest()
