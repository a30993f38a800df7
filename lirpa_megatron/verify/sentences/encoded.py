"""Sentences as a model reads them: token ids, and which words they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol


@dataclass(frozen=True)
class Encoded:
    """A sentence as the model reads it.

    Its tokens are those of the text, and special ones that the tokenizer adds. Tokens of the text
    may belong to no word: blanks, in vocabularies that have tokens for them.
    """

    # [S]
    ids: list[int]
    # [S], the tokens as text
    tokens: list[str]
    # for each word of the sentence the positions of its tokens
    words: list[list[int]] = field(default_factory=list)
    # positions of tokens that the vocabulary does not have
    unknown: list[int] = field(default_factory=list)
    # position of a token of the text that belongs to no word -> the word that follows it, or the
    # last one
    blanks: dict[int, int] = field(default_factory=dict)
    # what in the text has no token of the vocabulary: words with letters left out, and what
    # unknown tokens stand for
    missing: list[str] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        """The positions of the text, in order."""
        return sorted({*self.blanks, *(position for word in self.words for position in word)})

    def part(self, first: int, count: int) -> Encoded:
        """The same tokens, of which the text are some words only."""
        own = {p: w - first for p, w in self.blanks.items() if first <= w < first + count}
        return replace(self, words=self.words[first : first + count], blanks=own)


class Tokenizer(Protocol):
    """Turns text into ids; words are what blanks separate."""

    name: str

    @property
    def size(self) -> int:
        """Number of ids."""
        ...

    def vocabulary(self, added: bool = True) -> dict[str, int]:
        """Token -> id, with or without those that were added to the vocabulary."""
        ...

    def encode(self, text: str) -> Encoded: ...

    def id_of(self, token: str) -> int | None:
        """The id of a word that is one token; None if it is not."""
        ...


def of_offsets(
    text: str, ids: list[int], tokens: list[str], offsets: Sequence[tuple[int, int]],
    special: Sequence[int], unknown: int | None,
) -> Encoded:
    """A sentence whose tokenizer says where in the text its tokens are.

    A token belongs to the words that it has a letter of, and a blank goes with the word after it.

    Args:
        text: of the sentence.
        ids: [S].
        tokens: [S], as text.
        offsets: [S], first letter and the one after the last; the same twice for a token without
            letters of its own.
        special: positions of tokens that the tokenizer adds.
        unknown: id of what the vocabulary does not have; None: it has none.
    """
    spans = _spans(text)
    words: list[list[int]] = [[] for _ in spans]
    blanks: dict[int, int] = {}
    waiting: list[int] = []
    left_out = [not letter.isspace() for letter in text]
    last, added = 0, set(special)
    for position, (a, b) in enumerate(offsets):
        if position in added:
            continue
        left_out[a:b] = [False] * (b - a)
        own = [w for w, (begin, end) in enumerate(spans) if a < end and b > begin and b > a]
        for word in own:
            words[word].append(position)
        if own:
            blanks |= dict.fromkeys(waiting, own[0])
            waiting, last = [], own[-1]
        else:
            waiting.append(position)
    blanks |= dict.fromkeys(waiting, last)
    missed = [p for p, token in enumerate(ids) if token == unknown]
    # Words, not letters: where some are left out, offsets after them in the word are off.
    missing = [text[begin:end] for begin, end in spans if any(left_out[begin:end])]
    missing += [text[slice(*offsets[p])] for p in missed]
    return Encoded(ids, tokens, words, missed, blanks, missing)


def _spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends."""
    spans, place = [], 0
    for word in text.split():
        begin = text.index(word, place)
        place = begin + len(word)
        spans.append((begin, place))
    return spans
