"""Sentences as token ids, by a vocabulary file or a Hugging Face tokenizer file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lirpa_megatron.errors import UserError

BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


@dataclass(frozen=True)
class Encoded:
    """A sentence as the model reads it."""

    # [S]
    ids: list[int]
    # [S], the tokens as text
    tokens: list[str]
    # for each word of the sentence the positions of its tokens
    words: list[list[int]] = field(default_factory=list)
    # positions of tokens that the vocabulary does not have
    unknown: list[int] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        """The positions that belong to words, in order."""
        return [position for word in self.words for position in word]


class Tokenizer(Protocol):
    """Turns text into ids; words are what blanks separate."""

    name: str

    @property
    def size(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> Encoded: ...

    def id_of(self, token: str) -> int | None:
        """The id of a word that is one token; None if it is not."""
        ...


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from `tokenizer.json` (Hugging Face) or a vocabulary file, one token a line.

    Raises:
        UserError: unreadable, malformed, or the tokenizers package is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"tokenizer {path} is not a text file") from None
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return Vocabulary(path.name, text)


class Vocabulary:
    """A vocabulary file: the id of a token is its line.

    Sentences are split at blanks. They are lower-cased if no word of the file has a capital letter,
    begin with [CLS] and end with [SEP] if the file has these, and what it does not have is [UNK].

    Raises:
        UserError: no tokens, one that occurs twice, or no [UNK].
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        tokens = text.removesuffix("\n").split("\n")  # a token may be another separator
        self._ids = {token: index for index, token in enumerate(tokens)}
        if not text.strip():
            raise UserError(f"tokenizer {name} is empty")
        if len(self._ids) != len(tokens):
            line = next(i for i, token in enumerate(tokens) if self._ids[token] != i)
            raise UserError(f"tokenizer {name}, line {line + 1}: {tokens[line]!r} occurs twice")
        if UNKNOWN not in self._ids:
            raise UserError(f"tokenizer {name} has no {UNKNOWN} for words that it does not have")
        self._lower = not any(t != t.lower() for t in tokens if not t.startswith("["))

    @property
    def size(self) -> int:
        return len(self._ids)

    def encode(self, text: str) -> Encoded:
        words = (text.lower() if self._lower else text).split()
        tokens = [BEGIN] * (BEGIN in self._ids) + words + [END] * (END in self._ids)
        first = int(BEGIN in self._ids)
        ids = [self._ids.get(token, self._ids[UNKNOWN]) for token in tokens]
        places = [[first + index] for index in range(len(words))]
        return Encoded(ids, tokens, places, [p for (p,) in places if tokens[p] not in self._ids])

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token.lower() if self._lower else token)


class HuggingFaceTokenizer:
    """A `tokenizer.json`; special tokens are what its post-processor adds.

    Raises:
        UserError: not such a file, or the package is missing.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise UserError(
                f"{path} needs the tokenizers package: pip install tokenizers, or give a "
                "vocabulary file"
            )
        from tokenizers import Tokenizer as FromFile

        self.name = path.name
        try:
            self._tokenizer: Any = FromFile.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is not a tokenizer.json ({reason})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown = None if unknown is None else self._tokenizer.token_to_id(unknown)

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Encoded:
        found = self._tokenizer.encode(text)
        words, spans = [], _spans(text)
        for begin, end in spans:
            words.append([
                position for position, (a, b) in enumerate(found.offsets)
                if b > a and a < end and b > begin and not found.special_tokens_mask[position]
            ])
        unknown = [p for p, token in enumerate(found.ids) if token == self._unknown]
        return Encoded(list(found.ids), list(found.tokens), words, unknown)

    def id_of(self, token: str) -> int | None:
        for text in (f" {token}", token):  # most often the word comes after a blank
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == 1 and ids[0] != self._unknown:
                return ids[0]
        return None


def _spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends."""
    spans, place = [], 0
    for word in text.split():
        begin = text.index(word, place)
        place = begin + len(word)
        spans.append((begin, place))
    return spans


@dataclass
class Substitutes:
    """What may stand at the positions of a sentence, and which candidates were left out."""

    # position -> ids, without the word's own
    ids: dict[int, list[int]] = field(default_factory=dict)
    # position -> the same as words
    words: dict[int, list[str]] = field(default_factory=dict)
    # candidates that are not in the vocabulary, or not one token in the place of one token
    dropped: list[str] = field(default_factory=list)


def substitutes_of(
    tokenizer: Tokenizer, text: str, encoded: Encoded, candidates: Sequence[Sequence[str]]
) -> Substitutes:
    """The candidates that can be verified: one token each, for words that are one token.

    A candidate counts if the sentence with it is the same at all other positions, and if the
    vocabulary has it; the word itself is none.

    Args:
        tokenizer: of the model.
        text: the sentence.
        encoded: its tokens.
        candidates: for each word of it the words that may stand in its place.
    """
    words = text.split()
    found = Substitutes()
    for index, (places, others) in enumerate(zip(encoded.words, candidates, strict=True)):
        for other in others:
            changed = tokenizer.encode(" ".join([*words[:index], other, *words[index + 1 :]]))
            if changed.ids == encoded.ids and not changed.unknown:
                continue  # the word itself
            place = places[0] if len(places) == 1 else -1
            same = changed.ids[:place] + changed.ids[place + 1 :]
            if (
                place < 0 or len(changed.ids) != len(encoded.ids) or place in changed.unknown
                or same != encoded.ids[:place] + encoded.ids[place + 1 :]
            ):
                found.dropped.append(other)
            elif changed.ids[place] not in found.ids.get(place, []):
                found.ids.setdefault(place, []).append(changed.ids[place])
                found.words.setdefault(place, []).append(other)
    return found
