"""Tokenizers of the tokenizers package: `tokenizer.json`, GPT-2's two files, WordPiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.encoded import Encoded, of_offsets
from lirpa_megatron.verify.sentences.tokenizer_package import config_beside, package

BEGIN, END, UNKNOWN = "[CLS]", "[SEP]", "[UNK]"


def read_tokenizer_json(path: Path) -> HuggingFaceTokenizer:
    """A `tokenizer.json`.

    Raises:
        UserError: not such a file, or the package is missing.
    """
    library = package(path, "needs")
    try:
        made = library.Tokenizer.from_file(str(path))
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
    library = package(path, "needs")
    config = config_beside(path, {
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
        made = library.Tokenizer(library.models.BPE.from_file(str(path), merges))
    except Exception as error:  # the package raises plain Exception
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} and merges.txt are no byte-level BPE ({reason})") from None
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    made.post_processor = library.processors.ByteLevel(trim_offsets=False)
    if made.token_to_id("<|endoftext|>") is not None:
        made.add_special_tokens(["<|endoftext|>"])
    return HuggingFaceTokenizer(path.name, made)


def word_piece(
    ids: dict[str, int], piece: str, lower: bool, path: Path
) -> HuggingFaceTokenizer:
    """BERT's tokenizer of a vocabulary: punctuation apart, the longest pieces from the left.

    Args:
        ids: of the vocabulary's tokens, pieces of words among them.
        piece: one of these.
        lower: whether the vocabulary suggests that words are lower-cased.
        path: of its file; a `tokenizer_config.json` beside it says `do_lower_case` and
            `strip_accents` where they are not what the vocabulary suggests.

    Raises:
        UserError: the package is missing, or that file is no JSON.
    """
    library = package(path, f"has pieces of words ({piece}), which need")
    optional = (bool, type(None))
    config = config_beside(path, {"do_lower_case": optional, "strip_accents": optional})
    made = library.Tokenizer(
        library.models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=100)
    )
    made.normalizer = library.normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", lower)),
        strip_accents=config.get("strip_accents"),
    )
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    special = [t for t in (UNKNOWN, BEGIN, END, "[PAD]", "[MASK]") if t in ids]
    made.add_special_tokens(special)
    around = [t for t in (BEGIN, END) if t in ids]
    if around:
        first, last = (f"{t} " if t in around else "" for t in (BEGIN, END))
        made.post_processor = library.processors.TemplateProcessing(
            single=f"{first}$A {last}".strip(),
            special_tokens=[(t, ids[t]) for t in around],
        )
    return HuggingFaceTokenizer(path.name, made)


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

    def vocabulary(self, added: bool = True) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=added)

    def encode(self, text: str) -> Encoded:
        found = self._tokenizer.encode(text)
        special = [position for position, on in enumerate(found.special_tokens_mask) if on]
        return of_offsets(
            text, list(found.ids), list(found.tokens), found.offsets, special, self._unknown
        )

    def id_of(self, token: str) -> int | None:
        for text in (f" {token}", token):  # most often the word comes after a blank
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == 1 and ids[0] != self._unknown:
                return ids[0]
        return None
