"""Sentences as token ids, by a vocabulary file or another tokenizer's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.encoded import Encoded, Tokenizer
from lirpa_megatron.verify.sentences.hugging_face_tokenizer import (
    BEGIN,
    END,
    UNKNOWN,
    byte_level_bpe,
    read_tokenizer_json,
    word_piece,
)
from lirpa_megatron.verify.sentences.sentencepiece_tokenizer import read_sentencepiece


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from `tokenizer.json` (Hugging Face), `tokenizer.model` (sentencepiece) or a
    vocabulary file, one token a line.

    A vocabulary with pieces of words, `##ing`, is one of WordPiece; `vocab.json` with `merges.txt`
    beside it is GPT-2's byte-level BPE.

    Raises:
        UserError: unreadable, malformed, pieces that only a tokenizer.json says how to join, or the
            tokenizers package is missing.
    """
    if path.suffix == ".model":
        return read_sentencepiece(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"tokenizer {path} is not a text file") from None
    if path.name == "vocab.json" and path.with_name("merges.txt").is_file():
        return byte_level_bpe(path)
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    vocabulary = Vocabulary(path.name, text)
    if vocabulary.pieces is None:
        return vocabulary
    return word_piece(vocabulary.ids, vocabulary.pieces, vocabulary.lower, path)


class Vocabulary:
    """A vocabulary file: the id of a token is its line.

    Sentences are split at blanks. They are lower-cased if no word of the file has a capital letter,
    begin with [CLS] and end with [SEP] if the file has these, and what it does not have is [UNK].

    Attributes:
        ids: of the tokens.
        lower: whether words are lower-cased.
        pieces: a token that is the end of a word (WordPiece), so that words are not split at blanks
            alone; None: tokens are words.

    Raises:
        UserError: no tokens, one that occurs twice, no [UNK], or pieces of words of another kind.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        tokens = text.removesuffix("\n").split("\n")  # a token may be another separator
        self.ids = {token: index for index, token in enumerate(tokens)}
        if not text.strip():
            raise UserError(f"tokenizer {name} is empty")
        if len(self.ids) != len(tokens):
            line = next(i for i, token in enumerate(tokens) if self.ids[token] != i)
            raise UserError(f"tokenizer {name}, line {line + 1}: {tokens[line]!r} occurs twice")
        if UNKNOWN not in self.ids:
            raise UserError(f"tokenizer {name} has no {UNKNOWN} for words that it lacks")
        self.lower = not any(t != t.lower() for t in tokens if not t.startswith("["))
        foreign = next(filter(_is_foreign_piece, tokens), None)
        if foreign is not None:
            raise UserError(
                f"tokenizer {name} has pieces of words ({foreign!r}): give the tokenizer.json that "
                "says how they are joined"
            )
        self.pieces = next(filter(_is_word_end, tokens), None)

    @property
    def size(self) -> int:
        return len(self.ids)

    def vocabulary(self, added: bool = True) -> dict[str, int]:
        return self.ids

    def encode(self, text: str) -> Encoded:
        words = (text.lower() if self.lower else text).split()
        tokens = [BEGIN] * (BEGIN in self.ids) + words + [END] * (END in self.ids)
        first = int(BEGIN in self.ids)
        ids = [self.ids.get(token, self.ids[UNKNOWN]) for token in tokens]
        places = [[first + index] for index in range(len(words))]
        unknown = [p for (p,) in places if tokens[p] not in self.ids]
        return Encoded(ids, tokens, places, unknown, missing=[tokens[p] for p in unknown])

    def id_of(self, token: str) -> int | None:
        return self.ids.get(token.lower() if self.lower else token)


def _is_word_end(token: str) -> bool:
    """A piece of WordPiece; `##` and `###` may be words."""
    return token.startswith("##") and any(map(str.isalnum, token))


def _is_foreign_piece(token: str) -> bool:
    """A piece of SentencePiece, byte-level BPE or another BPE."""
    return len(token) > 1 and (
        token[0] in "\u2581\u0120" or (token.endswith(("</w>", "@@")) and token[0] not in "<@")
    )


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
