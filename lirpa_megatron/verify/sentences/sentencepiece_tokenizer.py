"""Tokenizers of sentencepiece: `tokenizer.model`.

The file says how text is normalised and cut, not which tokens stand around it: whether a text
begins with <s> or ends with </s> is a setting of `tokenizer_config.json` beside it. Without that
file nothing is added, as sentencepiece itself adds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.plain_files import parse_json
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.encoded import Encoded, of_offsets
from lirpa_megatron.verify.sentences.tokenizer_package import config_beside, package

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
"""Files beside it that say what stands around a text, and what else are tokens."""
_CLASSES = {
    "LlamaTokenizer": (True, False), "LlamaTokenizerFast": (True, False),
    "GemmaTokenizer": (True, False), "GemmaTokenizerFast": (True, False),
}
"""Classes of Hugging Face whose text is cut as sentencepiece does it -> whether a text begins with
<s> and ends with </s> unless the settings say otherwise."""
_LARGEST = 2**26
"""Bytes. Files of 256,000 pieces have some 5 MB."""


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """A `tokenizer.model`, with the settings beside it.

    Raises:
        UserError: unreadable, malformed, settings that change how text is cut, or the package is
            missing.
    """
    library = package(path, "needs", "sentencepiece")
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST} bytes, which is not believable")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    made = library.SentencePieceProcessor()
    try:
        loaded = bool(data) and made.LoadFromSerializedProto(data)
    except Exception:  # the package raises RuntimeError and others
        loaded = False
    if not loaded or not made.get_piece_size():
        raise UserError(f"{path} is not a model of sentencepiece: give the tokenizer.json")
    around = []
    for token, wanted in zip(("bos", "eos"), _settings(path), strict=True):
        around.append(getattr(made, f"{token}_id")() if wanted else None)
        if around[-1] is not None and around[-1] < 0:
            raise UserError(f"{path} has no {token} token, which {CONFIG} asks for")
    return SentencePieceTokenizer(path.name, made, *around)


def _settings(path: Path) -> tuple[bool, bool]:
    """Whether a text begins with <s>, and ends with </s>."""
    added = path.with_name(ADDED)
    if added.is_file():
        try:
            more = parse_json(added.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{added}, beside tokenizer {path}, is not JSON") from None
        if more:
            raise UserError(
                f"{added}: tokens added to sentencepiece's are not supported: give the "
                "tokenizer.json"
            )
    config = config_beside(path, {
        "tokenizer_class": (str, type(None)), "add_bos_token": (bool, type(None)),
        "add_eos_token": (bool, type(None)), "add_prefix_space": (bool, type(None)),
    })
    kind = config.get("tokenizer_class")
    if kind is not None and kind not in _CLASSES or config.get("add_prefix_space") is False:
        raise UserError(
            f"tokenizer {path} is not sentencepiece's alone ({kind}): give the tokenizer.json that "
            "says how text is cut"
        )
    begin, end = _CLASSES.get(kind, (False, False))
    return config.get("add_bos_token", begin), config.get("add_eos_token", end)


class SentencePieceTokenizer:
    """A model of sentencepiece; special tokens are the given ones around a text.

    A piece begins with the blank before its word; a blank of its own goes with the word after it.
    """

    def __init__(self, name: str, model: Any, begin: int | None, end: int | None) -> None:
        self.name = name
        self._model, self._begin, self._end = model, begin, end
        # Releases up to 0.2.1 count letters, later ones bytes of UTF-8, under another name.
        self._counts_letters = hasattr(model, "EncodeAsImmutableProto")
        self._kind = "immutable_proto" if self._counts_letters else "proto"

    @property
    def size(self) -> int:
        return self._model.get_piece_size()

    def vocabulary(self, added: bool = True) -> dict[str, int]:
        return {self._model.id_to_piece(index): index for index in range(self.size)}

    def encode(self, text: str) -> Encoded:
        found = [
            (piece.id, piece.piece,
             (self._letter(text, piece.begin), self._letter(text, piece.end)))
            for piece in self._model.encode(text, out_type=self._kind).pieces
        ]
        special = []
        if self._begin is not None:
            found.insert(0, (self._begin, self._model.id_to_piece(self._begin), (0, 0)))
            special.append(0)
        if self._end is not None:
            special.append(len(found))
            end = (len(text), len(text))
            found.append((self._end, self._model.id_to_piece(self._end), end))
        ids, tokens, offsets = (list(column) for column in zip(*found, strict=True)) \
            if found else ([], [], [])
        return of_offsets(text, ids, tokens, offsets, special, self._model.unk_id())

    def _letter(self, text: str, place: int) -> int:
        """A place in the text as the package counts it -> the letter's number."""
        if self._counts_letters:
            return place
        return len(text.encode()[:place].decode(errors="ignore"))

    def id_of(self, token: str) -> int | None:
        for text in (f" {token}", token):  # most often the word comes after a blank
            ids = self._model.encode(text)
            if len(ids) == 1 and ids[0] != self._model.unk_id():
                return ids[0]
        return None
