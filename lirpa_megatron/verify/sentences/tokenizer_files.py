"""Where the tokenizer of a checkpoint lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lirpa_megatron.checkpoint.hugging_face_config import is_hugging_face
from lirpa_megatron.checkpoint.layout import data_directory, split_iteration
from lirpa_megatron.checkpoint.source import read_source
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

    Forms give a token the same id, and have the same tokens but for those that were added to the
    one in use (the files after `tokenizer.json` do not list these). What cannot be read here (its
    package is missing, it is malformed) is not looked at.

    Args:
        path: of the file in use, found by `find_tokenizer`.
        tokenizer: read from it.

    Raises:
        UserError: a form that disagrees, with the first token that does.
    """
    for name in _NAMES[_NAMES.index(path.name) + 1 :]:
        other = path.with_name(name)
        if not other.is_file():
            continue
        try:
            theirs = read_tokenizer(other).vocabulary()
        except UserError:
            continue
        ours = tokenizer.vocabulary()
        differs = [(i, t) for t, i in theirs.items() if i not in (ours.get(t), ours.get(_other(t)))]
        differs += [(i, t) for t, i in tokenizer.vocabulary(added=False).items()
                    if t not in theirs and _other(t) not in theirs]
        if differs:
            token = min(differs)[1]
            said = [f"has no token {token!r}" if token not in each else
                    f"gives {token!r} the id {each[token]}" for each in (ours, theirs)]
            raise UserError(
                f"tokenizer {path} {said[0]}, {name} beside it {said[1]}: they are not forms of "
                "one tokenizer: choose one with --tokenizer"
            )


_TAB = ("<0x09>", "\t")
"""Gemma's tokenizer.json has the letter where its tokenizer.model has the byte."""


def _other(token: str) -> str:
    return _TAB[1 - _TAB.index(token)] if token in _TAB else token


def check_around(path: Path, checkpoint: Path, iteration: int | str | None = None) -> None:
    """Refuses a `tokenizer.model` of which nothing says whether a text begins with <s>.

    Without settings beside the file nothing is added, as megatron-core and NeMo add nothing. But
    Megatron-LM's Llama2Tokenizer put <s> in front of a text until 2026, and no longer does.

    Args:
        path: of the tokenizer in use.
        checkpoint: its arguments may say `tokenizer_type`.
        iteration: as in `find_tokenizer`.

    Raises:
        UserError: it is that tokenizer, without settings.
    """
    if path.suffix != ".model" or path.with_name(CONFIG).is_file():
        return
    arguments = read_source(checkpoint, iteration)[1]
    if (arguments or {}).get("tokenizer_type") == "Llama2Tokenizer":
        raise UserError(
            f"tokenizer {path} is Megatron-LM's Llama2Tokenizer, which began a text with <s> until "
            f"2026 and now does not: say which in {CONFIG} beside it, "
            '{"add_bos_token": true} or false'
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
