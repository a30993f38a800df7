"""What a language model decides about a sentence: scores of classes, and margins to be bounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.models.bert.bert_model import BertModel
from torch import nn

from lirpa_megatron.adapters.stages import forward_of
from lirpa_megatron.adapters.views import at_position, bert_head, from_layer
from lirpa_megatron.errors import UserError
from lirpa_megatron.problem.margins import (
    classification_margins,
    next_token_margins,
    smallest_margin,
)
from lirpa_megatron.verify.sentences.data import Item
from lirpa_megatron.verify.sentences.encoded import Tokenizer

TASKS = ("classification", "label-tokens", "next-token")


class Task:
    """One way to read a model's output.

    Attributes:
        name: one of TASKS.
        view: the module whose bounds are the margins: (hidden, *further inputs) -> outputs.
        net: the same layers, differentiable: hidden [N, S, h] -> outputs that `scores` reads.
    """

    name: str
    view: nn.Module
    net: nn.Module

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """[N, K], the largest is the prediction."""
        return outputs

    def margin(self, hidden: torch.Tensor, label: int) -> torch.Tensor:
        """By how much the label wins over the strongest other class at each point: [N]."""
        scores = self.scores(self.net(hidden))
        return scores[:, label] - _without(scores, label).amax(-1)

    def further_inputs(self, label: int) -> tuple[torch.Tensor, ...]:
        """Inputs of `view` beside the hidden states."""
        return ()

    def specification(self, label: int, like: torch.Tensor) -> torch.Tensor | None:
        """C for `compute_bounds`, or None."""
        return None

    def smallest(self, lower: torch.Tensor, label: int) -> torch.Tensor:
        """From the lower bounds [1, rows] a lower bound of `margin`: a number; NaN proves nothing.
        """
        raise NotImplementedError

    # of the classes, if they have names
    names: Sequence[str] | None = None

    def class_name(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]

    def index_of(self, label: str) -> int:
        """The class that a text names: its name, or its number.

        Raises:
            UserError: there is none.
        """
        names = [name.casefold() for name in self.names or ()]
        if label.strip().casefold() in names:
            return names.index(label.strip().casefold())
        if re.fullmatch(r"[0-9]{1,9}", label.strip()):
            return int(label)
        known = "name the classes with --labels" if self.names is None else (
            f"the classes are {', '.join(self.names)}"
        )
        raise UserError(f"label {label!r} is not a class: {known}")

    def with_label(self, item: Item) -> Item:
        """The item with its label as a number; one whose label is none says so."""
        if not isinstance(item.label, str):
            return item
        try:
            return replace(item, label=self.index_of(item.label))
        except UserError as error:
            return replace(item, label=None, error=str(error))

    def check_label(self, label: int) -> None:
        """Raises UserError for a label that is no class."""
        if not 0 <= label < self.classes:
            raise UserError(f"label {label} is outside of 0 to {self.classes - 1}")

    classes: int


class Classification(Task):
    """The binary head of a BertModel."""

    name = "classification"

    def __init__(self, model: nn.Module) -> None:
        self.view = bert_head(model, "binary")
        self.net = forward_of(self.view)
        self.classes = 2  # Megatron's binary head has no other size

    def specification(self, label: int, like: torch.Tensor) -> torch.Tensor:
        return classification_margins(torch.tensor([label]), self.classes).to(like)

    def smallest(self, lower: torch.Tensor, label: int) -> torch.Tensor:
        return lower.min()


class LabelTokens(Task):
    """Which label word comes next: a class is as strong as the likeliest of its tokens.

    Class y certainly wins over the others if for each token j of theirs some token t of y has a
    margin logit[t] - logit[j] above 0: the smallest over j of the largest over t.

    Args:
        model: a GPTModel or HybridModel.
        tokens: for each class its token ids.
        names: of the classes.
    """

    name = "label-tokens"

    def __init__(self, model: nn.Module, tokens: Sequence[Sequence[int]], names: Sequence[str]):
        self.view = at_position(model, -1)
        self.net = forward_of(self.view)
        self.tokens, self.names, self.classes = tokens, names, len(tokens)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([outputs[:, list(ids)].amax(-1) for ids in self.tokens], -1)

    def _others(self, label: int) -> list[int]:
        return [j for index, ids in enumerate(self.tokens) if index != label for j in ids]

    def specification(self, label: int, like: torch.Tensor) -> torch.Tensor:
        others = self._others(label)
        size = self.view.model.vocab_size
        C = like.new_zeros(1, len(self.tokens[label]), len(others), size)
        for t, own in enumerate(self.tokens[label]):
            C[0, t, :, own] += 1
            C[0, t, range(len(others)), others] -= 1
        return C.flatten(1, 2)

    def smallest(self, lower: torch.Tensor, label: int) -> torch.Tensor:
        by_token = lower.view(len(self.tokens[label]), -1)
        return by_token.amax(0).amin()  # NaN stays NaN


class NextToken(Task):
    """The next token, among the whole vocabulary.

    Args:
        model: a GPTModel or HybridModel.
        vocab_size: entries from here on only pad the vocabulary.
        tokenizer: gives names, if there is one.
    """

    name = "next-token"

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.view = next_token_margins(model)
        self.net = forward_of(at_position(model, -1))
        self.classes = vocab_size

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs[:, : self.classes]

    def further_inputs(self, label: int) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([label]),)

    def smallest(self, lower: torch.Tensor, label: int) -> torch.Tensor:
        return smallest_margin(lower, torch.tensor([label]), self.classes)[0]


def _without(scores: torch.Tensor, label: int) -> torch.Tensor:
    """The other columns."""
    return torch.cat((scores[:, :label], scores[:, label + 1 :]), 1)


def make_task(
    name: str | None, model: nn.Module, vocab_size: int, label_tokens: str | None,
    tokenizer: Tokenizer | None, labels: Sequence[str] | None = None, start_layer: int = 0,
) -> Task:
    """The task of that name; by default what the model is made for.

    Args:
        name: of TASKS, or None: classification for a BertModel, label-tokens for a GPTModel if
            these are given, else next-token.
        model: GPTModel, HybridModel or BertModel.
        vocab_size: its tokens that are not padding.
        label_tokens: "bad,awful|good,great": words of class 0, 1, ...
        tokenizer: that knows them.
        labels: names of class 0, 1, ...
        start_layer: which layer's input the task's modules take.

    Raises:
        UserError: a task that the model is not made for, label words that are no tokens, names that
            are not one for each class.
    """
    task = _make_task(name, model, vocab_size, label_tokens, tokenizer, start_layer)
    if labels is None:
        return task
    if task.name == "next-token":
        raise UserError("--labels names classes, but the task next-token has none")
    if len(labels) != task.classes:
        raise UserError(f"--labels has {len(labels)} names, but there are {task.classes} classes")
    if len({label.strip().casefold() for label in labels}) < len(labels):
        raise UserError(f"--labels {' '.join(labels)}: the same name occurs twice")
    task.names = [label.strip() for label in labels]
    return task


def _make_task(
    name: str | None, model: nn.Module, vocab_size: int, label_tokens: str | None,
    tokenizer: Tokenizer | None, start_layer: int,
) -> Task:
    is_bert = isinstance(model, BertModel)
    if name is None:
        default = "next-token" if label_tokens is None else "label-tokens"
        name = "classification" if is_bert else default
    if (name == "classification") != is_bert:
        fits = "classification" if is_bert else "label-tokens or next-token"
        kind = "BERT" if is_bert else "GPT"
        raise UserError(f"--task {name} is not for a {kind} model: choose {fits}")
    if (name == "label-tokens") != (label_tokens is not None):
        raise UserError("--label-tokens and --task label-tokens need each other")
    part = from_layer(model, start_layer) if start_layer else model
    if name == "classification":
        if model.post_process and model.binary_head is None:
            raise UserError("the BERT model has no binary head (add_binary_head), so no classes")
        return Classification(part)
    if name == "next-token":
        return NextToken(part, vocab_size)
    names, ids = _label_ids(label_tokens or "", tokenizer)
    return LabelTokens(part, ids, names)


def _label_ids(text: str, tokenizer: Tokenizer | None) -> tuple[list[str], list[list[int]]]:
    if tokenizer is None:
        raise UserError("--label-tokens needs --tokenizer, to turn words into tokens")
    classes = [[w.strip() for w in part.split(",") if w.strip()] for part in text.split("|")]
    if len(classes) < 2 or not all(classes):
        raise UserError(
            f"--label-tokens {text!r}: give words of two or more classes, as in 'bad,awful|good'"
        )
    ids = []
    for words in classes:
        found = [tokenizer.id_of(word) for word in words]
        if None in found:
            word = words[found.index(None)]
            raise UserError(f"--label-tokens: {word!r} is not one token of {tokenizer.name}")
        ids.append(found)
    every = [i for found in ids for i in found]
    if len(set(every)) != len(every):
        raise UserError(f"--label-tokens {text!r}: the same token occurs twice")
    return [words[0] for words in classes], ids
