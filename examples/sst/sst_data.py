"""Sentences with labels, the vocabulary, and batches of token ids.

A data file has one JSON object a line, with at least "sentence" (tokens between blanks) and "label"
(0 negative, 1 positive). A sentence becomes [CLS] and its words in lower case; a word that the
vocabulary lacks becomes [UNK], and shorter sentences of a batch are filled up with [PAD].
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lirpa_megatron.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]"]
PADDING, UNKNOWN, START = range(3)


class Batch(NamedTuple):
    """B sentences, each of at most S tokens."""

    ids: torch.Tensor
    """Token ids, [B, S]."""

    mask: torch.Tensor
    """1 where there is a token, 0 where [PAD]; [B, S]."""

    labels: torch.Tensor
    """Classes, [B]."""


def read(folder: Path, split: str) -> list[dict]:
    """The records of FOLDER/SPLIT.jsonl.

    Raises:
        UserError: the file is not there, or a line is not a sentence with a label.
    """
    path = folder / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): name the folder that holds train.jsonl and "
            "dev.jsonl with --data"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            valid = record["label"] in (0, 1) and isinstance(record["sentence"], str)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise UserError(f'{path}, line {number}: not {{"sentence": text, "label": 0 or 1}}')
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no sentences")
    return records


def words_of(sentence: str) -> list[str]:
    return sentence.lower().split()


def vocabulary(records: list[dict], least: int) -> list[str]:
    """Special tokens, then the words seen at least `least` times, the most frequent first."""
    count = Counter(word for record in records for word in words_of(record["sentence"]))
    kept = [word for word, times in count.items() if times >= least]
    return SPECIAL + sorted(kept, key=lambda word: (-count[word], word))


def encode(records: list[dict], words: list[str], length: int) -> list[torch.Tensor]:
    """Token ids of each sentence, cut off after `length` tokens."""
    index = {word: i for i, word in enumerate(words)}
    return [
        torch.tensor([START, *(index.get(w, UNKNOWN) for w in words_of(r["sentence"]))][:length])
        for r in records
    ]


def shuffled(
    sentences: list[torch.Tensor], size: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """The indices of all sentences in batches of `size`, in random order.

    A batch has sentences of about the same length, so that little is spent on [PAD].
    """
    order = torch.randperm(len(sentences), generator=generator).split(16 * size)
    batches = []
    for part in order:
        lengths = torch.tensor([len(sentences[i]) for i in part.tolist()])
        batches += part[lengths.argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def batches(
    sentences: list[torch.Tensor], labels: torch.Tensor, order: Iterable[torch.Tensor]
) -> Iterator[Batch]:
    """The sentences of each of the given batches of indices, filled up to the longest of it."""
    for chosen in order:
        ids = torch.nn.utils.rnn.pad_sequence(
            [sentences[i] for i in chosen.tolist()], batch_first=True, padding_value=PADDING
        )
        yield Batch(ids, (ids != PADDING).long(), labels[chosen])
