"""Margins of language models: those of a specification on logits; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, classification_margins, smallest_margin

MODELS = {"tied": transformers.gpt, "untied": transformers.llama, "bert": transformers.bert}


def _language_models(names):
    from lirpa_megatron import (
        at_position,
        bert_head,
        label_token_margins,
        next_token_margins,
        perturb_tokens,
    )
    from lirpa_megatron.adapters.traceable import traceable

    torch.set_default_dtype(torch.float64)
    ids, _, padding, types = transformers.tokens()
    ids, padding, types, targets = ids[:, :3], padding[:, :3].clone(), types[:, :3], [5, 30]
    padding[1, 2] = 0
    targets, one = torch.tensor(targets), torch.eye(transformers.VOCABULARY)
    found, wrong = {}, []
    for name in names:
        model = MODELS[name](num_layers=1)
        words, view, position = {}, model, -1
        if name == "bert":
            words = {"tokentype_ids": types, "attention_mask": padding}
            view, position = at_position(bert_head(model, "lm"), 1), 1
        inputs = perturb_tokens(view, ids, eps=0.003, **words)
        bounded = BoundedModule(next_token_margins(view), (*inputs, targets))
        logits = BoundedModule(at_position(view, position), inputs)
        lists = BoundedModule(next_token_margins(view, [3, 31]), (*inputs, targets))
        labels = BoundedModule(label_token_margins(view, [4, 9]), inputs)
        for method in ("IBP", "CROWN"):
            bounds = bounded.compute_bounds(x=(*inputs, targets), method=method)
            found[name, method] = torch.stack(bounds)
            lower, upper = bounds
            C = one[targets].unsqueeze(1) - one
            whole = logits.compute_bounds(x=inputs, C=C, method=method)
            width = (whole[1] - whole[0]).mean()
            looser = torch.stack((whole[0] - lower, upper - whole[1])).max() / width
            equal = (torch.stack(whole) - torch.stack(bounds)).abs().max() / width
            if not (equal if method == "CROWN" else looser) < 1e-9:
                wrong.append((name, method, "tightness", looser.item(), equal.item()))
            part = torch.stack(lists.compute_bounds(x=(*inputs, targets), method=method))
            found[name, method, "against"] = part
            inward = (part - found[name, method][..., [3, 31]]) / width
            inward[1] *= -1
            # Of few rows CROWN bounds more on the way.
            if not (inward.abs() if method == "IBP" else -inward).max() < 1e-9:
                wrong.append((name, method, "against"))
            every = torch.stack(labels.compute_bounds(x=inputs, method=method))
            own = labels(*inputs)
            if not ((every[0] <= own + 1e-12) & (own <= every[1] + 1e-12)).all():
                wrong.append((name, method, "labels"))
            scored = traceable(at_position(view, position))
            for _ in range(20):
                hidden = inputs[0] + 0.003 * torch.randn_like(inputs[0]).sign()
                scores = scored(hidden, *inputs[1:])
                own = scores.gather(1, targets.unsqueeze(1)) - scores
                if not ((lower <= own + 1e-12) & (own <= upper + 1e-12)).all():
                    wrong.append((name, method, "not sound"))
        margins = next_token_margins(view)(hidden, *inputs[1:], targets)
        if not (margins - own).abs().max() < 1e-12:
            wrong.append((name, "forward"))
    return found, wrong


@pytest.mark.parametrize(
    ("one", "cases"),
    [(["bert"], [(2, ["bert"])]),
     pytest.param(list(MODELS), [(2, list(MODELS)), (4, ["bert"])], marks=pytest.mark.slow)],
    ids=["bert", "all"],
)
def test_margins_of_language_models_equal_a_specification_on_logits_at_every_size(one, cases):
    expected, wrong = pool(1).run(_language_models, one)[0]
    assert wrong == []
    for size, names in cases:
        for found, wrong in pool(size).run(_language_models, names):
            assert wrong == []
            for key, bounds in found.items():
                lower, upper = expected[key]
                error = (bounds - expected[key]).abs().max() / (upper - lower).mean()
                assert error < 1e-10, (size, key)


def _bad(case):
    from lirpa_megatron import bert_head, label_token_margins, next_token_margins, perturb_tokens

    torch.set_default_dtype(torch.float64)
    gpt = transformers.gpt(num_layers=1)
    inputs = perturb_tokens(gpt, transformers.tokens()[0][:, :3], eps=0.1)

    def bounds(targets):
        given = torch.tensor([1, 2])
        bounded = BoundedModule(next_token_margins(gpt), (*inputs, given))
        bounded.compute_bounds(x=(*inputs, targets), method="IBP")

    {
        "against": lambda: next_token_margins(gpt, [4, 32]),
        "empty": lambda: label_token_margins(gpt, []),
        "twice": lambda: label_token_margins(gpt, [4, 4]),
        "model": lambda: next_token_margins(nn.Linear(2, 2)),
        "block": lambda: next_token_margins(gpt.decoder),
        "head": lambda: next_token_margins(bert_head(transformers.bert(), "binary")),
        "targets": lambda: bounds(torch.tensor([1, 40])),
        "no targets": lambda: BoundedModule(next_token_margins(gpt), inputs),
        "batch": lambda: BoundedModule(next_token_margins(gpt), (*inputs, torch.tensor([1]))),
        "kind": lambda: BoundedModule(next_token_margins(gpt), (*inputs, torch.ones(2))),
        "labels": lambda: classification_margins(torch.tensor([0, 3]), 3),
        "classes": lambda: classification_margins(torch.tensor([0]), 1),
        "label dtype": lambda: classification_margins(torch.tensor([0.5]), 3),
        "vocabulary": lambda: smallest_margin(torch.zeros(1, 4), torch.tensor([0]), 5),
    }[case]()


BAD = {
    "against": "against: token ids from 4 to 32, but the vocabulary has 32 entries",
    "empty": "the labels: give a list of one or more token ids",
    "twice": "[4, 4] are not all different",
    "model": "Linear", "block": "TransformerBlock", "head": "not the binary head",
    "targets": "token ids from 1 to 40, but the vocabulary has 32 entries",
    "no targets": "one id for each of 2 samples, but it is nothing",
    "batch": "one id for each of 2 samples, but it is (1,)",
    "kind": "token ids are whole numbers",
    "labels": "labels from 0 to 3, but there are 3 classes",
    "classes": "num_classes is 1", "label dtype": "torch.float64",
    "vocabulary": "vocab_size is 5, but there are margins over 4 entries",
}


@pytest.mark.parametrize("case", BAD)
def test_a_specification_that_does_not_fit_is_one_clear_line(case):
    outcome = pool(1).outcomes(_bad, case)[0]
    assert outcome.error == "UserError", outcome
    assert BAD[case] in outcome.message and "\n" not in outcome.message
