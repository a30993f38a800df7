"""Sentences as token ids, by a vocabulary file or a Hugging Face tokenizer file."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lirpa_megatron.checkpoint.plain_files import parse_json
from lirpa_megatron.errors import UserError

BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


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

    def encode(self, text: str) -> Encoded: ...

    def id_of(self, token: str) -> int | None:
        """The id of a word that is one token; None if it is not."""
        ...


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from `tokenizer.json` (Hugging Face) or a vocabulary file, one token a line.

    A vocabulary with pieces of words, `##ing`, is one of WordPiece; `vocab.json` with `merges.txt`
    beside it is GPT-2's byte-level BPE.

    Raises:
        UserError: unreadable, malformed, pieces that only a tokenizer.json says how to join, or the
            tokenizers package is missing.
    """
    if path.suffix == ".model":
        raise UserError(
            f"tokenizer {path}: files of sentencepiece are not read: save the tokenizer as "
            "tokenizer.json (transformers' AutoTokenizer does)"
        )
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
    return word_piece(vocabulary, path)


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


def _package(path: Path, why: str) -> Any:
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError(
            f"{path} {why} the tokenizers package: pip install tokenizers, or give a vocabulary "
            "file of whole words"
        )
    return importlib.import_module("tokenizers")


def read_tokenizer_json(path: Path) -> HuggingFaceTokenizer:
    """A `tokenizer.json`.

    Raises:
        UserError: not such a file, or the package is missing.
    """
    package = _package(path, "needs")
    try:
        made = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a tokenizer.json ({reason})") from None
    return HuggingFaceTokenizer(path.name, made)


def byte_level_bpe(path: Path) -> HuggingFaceTokenizer:
    """GPT-2's tokenizer, of `vocab.json` and the `merges.txt` beside it.

    Other models have files of these names and cut text in another way first: where
    `tokenizer_config.json` names another class, or tokens around a text, these are refused.

    Raises:
        UserError: malformed, of another class, or the package is missing.
    """
    package = _package(path, "needs")
    config = _config_beside(path, {
        "tokenizer_class": (str,), "add_prefix_space": (bool,), "add_bos_token": (bool,),
    })
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast") or config.get("add_bos_token"):
        raise UserError(
            f"tokenizer {path} is not GPT-2's ({kind}): give the tokenizer.json that says how text "
            "is cut"
        )
    try:
        merges = str(path.with_name("merges.txt"))
        made = package.Tokenizer(package.models.BPE.from_file(str(path), merges))
    except Exception as error:  # the package raises plain Exception
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} and merges.txt are no byte-level BPE ({reason})") from None
    made.pre_tokenizer = package.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    made.post_processor = package.processors.ByteLevel(trim_offsets=False)
    if made.token_to_id("<|endoftext|>") is not None:
        made.add_special_tokens(["<|endoftext|>"])
    return HuggingFaceTokenizer(path.name, made)


def word_piece(vocabulary: Vocabulary, path: Path) -> HuggingFaceTokenizer:
    """BERT's tokenizer of a vocabulary: punctuation apart, the longest pieces from the left.

    Args:
        vocabulary: with pieces.
        path: of its file; a `tokenizer_config.json` beside it says `do_lower_case` and
            `strip_accents` where they are not what the vocabulary suggests.

    Raises:
        UserError: the package is missing, or that file is no JSON.
    """
    package = _package(path, f"has pieces of words ({vocabulary.pieces}), which need")
    optional = (bool, type(None))
    config = _config_beside(path, {"do_lower_case": optional, "strip_accents": optional})
    made = package.Tokenizer(
        package.models.WordPiece(vocabulary.ids, unk_token=UNKNOWN, max_input_chars_per_word=100)
    )
    made.normalizer = package.normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", vocabulary.lower)),
        strip_accents=config.get("strip_accents"),
    )
    made.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    special = [t for t in (UNKNOWN, BEGIN, END, "[PAD]", "[MASK]") if t in vocabulary.ids]
    made.add_special_tokens(special)
    around = [t for t in (BEGIN, END) if t in vocabulary.ids]
    if around:
        first, last = (f"{t} " if t in around else "" for t in (BEGIN, END))
        made.post_processor = package.processors.TemplateProcessing(
            single=f"{first}$A {last}".strip(),
            special_tokens=[(t, vocabulary.ids[t]) for t in around],
        )
    return HuggingFaceTokenizer(path.name, made)


def _config_beside(path: Path, names: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """Settings of `tokenizer_config.json` by name, which have one of the types; none of null."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        config = parse_json(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{beside}, beside tokenizer {path}, is not JSON") from None
    if not isinstance(config, dict) or any(
        name in config and not isinstance(config[name], kinds) for name, kinds in names.items()
    ):
        raise UserError(f"{beside}: {' and '.join(names)} must be {_kinds(names)}")
    return {name: config[name] for name in names if config.get(name) is not None}


def _kinds(names: dict[str, tuple[type, ...]]) -> str:
    texts = {str: "text", bool: "true or false"}
    return ", ".join(dict.fromkeys(texts[kinds[0]] for kinds in names.values()))


class HuggingFaceTokenizer:
    """A tokenizer of the tokenizers package; special tokens are what its post-processor adds.

    Which tokens belong to a word, and which are blanks between words, does not depend on whether
    the post-processor trims offsets (`trim_offsets`): a token belongs to the words that it has a
    letter of, and a blank goes with the word after it.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        model = self._tokenizer.model
        unknown = getattr(model, "unk_token", None)
        self._unknown = None if unknown is None else self._tokenizer.token_to_id(unknown)
        if unknown is None:  # of Unigram an id alone is known, and not by an attribute
            settings = json.loads(self._tokenizer.to_str())["model"]
            self._unknown = settings.get("unk_id")

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> Encoded:
        found = self._tokenizer.encode(text)
        spans = _spans(text)
        words: list[list[int]] = [[] for _ in spans]
        blanks: dict[int, int] = {}
        waiting: list[int] = []
        left_out = [not letter.isspace() for letter in text]
        last = 0
        for position, (a, b) in enumerate(found.offsets):
            if found.special_tokens_mask[position]:
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
        unknown = [p for p, token in enumerate(found.ids) if token == self._unknown]
        # Words, not letters: where some are left out, offsets after them in the word are off.
        missing = [text[begin:end] for begin, end in spans if any(left_out[begin:end])]
        missing += [text[slice(*found.offsets[p])] for p in unknown]
        return Encoded(list(found.ids), list(found.tokens), words, unknown, blanks, missing)

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
