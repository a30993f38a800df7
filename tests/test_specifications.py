"""Margins: exact on shards, as tight as a specification on all logits, and what they certify."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from layers import around, drawn_input, drawn_weights, shard
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, classification_margins, smallest_margin, some_label_wins
from lirpa_megatron.compat import auto_lirpa

VOCABULARY = 12
METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")
LABELS, AGAINST = (7, 0, 11), (3, 7, 5, 10)
CASES = {
    "vocabulary": {}, "no bias": {"bias": False}, "against": {"against": AGAINST},
    "labels": {"labels": LABELS}, "labels against": {"labels": LABELS, "against": AGAINST},
}


def _targets():
    return torch.tensor([4, 11, 0])


class Small(nn.Module):
    """Column, ReLU, Row and the margins of an output layer."""

    def __init__(self, labels=None, against=None, bias=True, sharded=True):
        super().__init__()
        (w1, b1), (w2, b2), (w3, b3) = drawn_weights(6, 8, 6, VOCABULARY)
        self.up, self.down = shard("column", 6, 8, w1, b1), shard("row", 8, 6, w2, b2)
        self.before = None if sharded else nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.out = shard("column", 6, VOCABULARY, w3, b3 if bias else None)
        self.labels, self.against = (
            None if ids is None else torch.tensor(ids) for ids in (labels, against)
        )

    def forward(self, x, *targets):
        from lirpa_megatron.adapters.margins import token_margins
        from lirpa_megatron.adapters.traceable import collectives_of

        tp = getattr(self.up, "tp", None) or collectives_of(self)  # of the facade, or as it is
        x = self.before(x) if self.before else self.down(torch.relu(self.up(x)[0]))[0]
        shared = self.labels is not None
        targets = self.labels if shared else targets[0]
        return token_margins(
            x, self.out.weight, self.out.bias, targets, self.against, shared, tp
        )


def _full(bias=True):
    full = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, VOCABULARY, bias=bias)
    )
    for layer, (w, b) in zip((full[0], full[2], full[3]), drawn_weights(6, 8, 6, VOCABULARY),
                             strict=True):
        layer.weight.data.copy_(w)
        if layer.bias is not None:
            layer.bias.data.copy_(b)
    return full


def _specification(labels=None, against=None, bias=True):
    """C [B, rows, V] on logits, and the shape [B, ...] of the margins."""
    one = torch.eye(VOCABULARY)
    others = one if against is None else one[list(against)]
    targets = one[_targets()] if labels is None else one[list(labels)]
    C = targets.unsqueeze(-2).unsqueeze(-2) - others if labels is None else (
        (targets.unsqueeze(1) - others).expand(3, -1, -1, -1))
    C = C.squeeze(1) if labels is None else C
    return C.flatten(1, -2), C.shape[:-1]


def _against_logits(case):
    """Method -> largest difference from C on all logits, over the width; gradients' differences."""
    from lirpa_megatron.parallel import runtime

    torch.set_default_dtype(torch.float64)
    case = CASES[case]
    x, inputs = drawn_input(), () if "labels" in case else (_targets(),)
    others = [t.flip(0) for t in inputs]  # what the module is built with does not count
    C, shape = _specification(**case)
    errors = {}
    few = {"optimize_bound_args": {"iteration": 4}}
    for opts in (few, {**few, "max_spec_rows": 2, "final_rows": "own"}):
        model, full = Small(**case), _full(case.get("bias", True))
        ours, theirs = BoundedModule(model, (x, *others), opts), BoundedModule(full, x, few)
        errors["forward", len(opts)] = (
            ours(x, *inputs) - torch.einsum("brv,bv->br", C, full(x)).view(shape)
        ).abs().max().item()
        for method in METHODS:
            if method == "CROWN-Optimized" and auto_lirpa.IS_03 and "labels" in case:
                continue  # an output of three dimensions
            expected = torch.stack(theirs.compute_bounds(x=(around(x),), C=C, method=method))
            got = torch.stack(ours.compute_bounds(x=(around(x), *inputs), method=method))
            width = (expected[1] - expected[0]).mean()
            difference = got - expected.view_as(got)
            errors[method, len(opts)] = (difference.abs().max() / width).item()
        for method in ("IBP", "CROWN"):
            gradients = []
            for bounded, module, ball, c in (
                (ours, model, (around(x), *inputs), None), (theirs, full, (around(x),), C),
            ):
                lower, _ = bounded.train().compute_bounds(x=ball, C=c, method=method)
                wanted = lower.flatten(1) * torch.arange(1.0, 1 + C.shape[1])
                gradients.append(torch.autograd.grad(wanted.sum(), list(module.parameters())))
            rank, size = runtime.tp_rank(), runtime.tp_size()
            for p, mine, whole in zip(model.parameters(), *gradients, strict=True):
                if getattr(p, "tensor_model_parallel", False):
                    whole = whole.chunk(size, p.partition_dim)[rank]
                error = (mine - whole).abs().max() / whole.abs().max()
                key = f"{method} gradient", len(opts)
                errors[key] = max(errors.get(key, 0), error.item())
            ours.eval()
    return errors


@pytest.mark.parametrize("case, size", [
    *((case, 2) for case in CASES), ("vocabulary", 1),
    *(pytest.param(case, 4, marks=pytest.mark.slow) for case in ("vocabulary", "labels against")),
])
def test_margins_and_their_gradients_are_those_of_a_specification_on_all_logits(size, case):
    for errors in pool(size).run(_against_logits, case):
        assert {n: e for n, e in errors.items() if not e < 1e-10} == {}


def _communication():
    torch.set_default_dtype(torch.float64)
    x, real = drawn_input(), torch.eye
    torch.manual_seed(0)
    bounded = BoundedModule(Small(sharded=False), (x, _targets()))
    traffic = bounded.context.collectives.traffic

    def eye(n, *args, **kwargs):
        assert n < VOCABULARY, "the identity of the vocabulary was built"
        return real(n, *args, **kwargs)

    counts = {}
    with mock.patch.object(torch, "eye", eye):
        for method in METHODS[:3]:
            traffic.clear()
            bounded.compute_bounds(x=(around(x), _targets()), method=method)
            counts[method] = dict(traffic.bytes)
    return counts


@pytest.mark.parametrize("size", [2, 4])
def test_only_the_bounds_and_the_targets_rows_are_communicated(size):
    number, batch = 8, 3
    results = 2 * (size - 1) * VOCABULARY // size * batch * number
    rows = 2 * (size - 1) * batch * (6 + 1) * number // size  # all-reduced, with their biases
    for counts in pool(size).run(_communication):
        for method, sent in counts.items():
            times = 2 if method == "CROWN-IBP" else 1  # bounds by IBP, and by CROWN
            forward = results // 2
            assert sent["all_gather"] in (times * results, times * results + forward)
            assert sent["all_reduce"] in (times * rows, (times + 1) * rows)
            assert set(sent) == {"all_gather", "all_reduce"}


class Gathered(nn.Module):
    """A gathered output for each token: rows of the identity lie rank by rank within tokens."""

    def __init__(self):
        super().__init__()
        (w1, b1), (w2, b2), (w3, b3) = drawn_weights(6, 8, 6, VOCABULARY)
        self.up, self.down = shard("column", 6, 8, w1, b1), shard("row", 8, 6, w2, b2)
        self.out = shard("column", 6, VOCABULARY, w3, b3, gather_output=True)

    def forward(self, x):
        return self.out(self.down(torch.relu(self.up(x)[0]))[0])[0]


def _gathered_tokens(opts):
    torch.set_default_dtype(torch.float64)
    x = drawn_input(6).view(2, 3, 6)
    ours, theirs = BoundedModule(Gathered(), x, opts), BoundedModule(_full(), x)
    errors = {}
    for method in ("IBP", "CROWN"):
        found = [
            torch.stack(b.compute_bounds(x=(around(x),), method=method)) for b in (ours, theirs)
        ]
        errors[method] = (found[0] - found[1]).abs().max().item()
    rows = []
    for bounded in (ours, theirs):
        start, root = bounded.final_name, next(iter(bounded.input_name))
        *_, A = bounded.compute_bounds(
            x=(around(x),), method="CROWN", return_A=True, needed_A_dict={start: {root}}
        )
        rows.append(A[start][root])
    for name in ("lA", "uA", "lbias", "ubias"):
        ours, theirs = (r[name] for r in rows)
        errors[name] = (ours - theirs.view_as(ours)).abs().max().item()
    return errors


@pytest.mark.parametrize("opts", [{}, {"max_spec_rows": 2}])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_gathered_output_of_tokens_has_its_rows_in_order(size, opts):
    for errors in pool(size).run(_gathered_tokens, opts):
        assert max(errors.values()) < 1e-10, errors


def test_classification_margins_take_each_other_class_from_the_label():
    torch.set_default_dtype(torch.float64)
    try:
        C, scores = classification_margins(torch.tensor([2, 0]), 3), torch.randn(2, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.tensor([[[-1, 0, 1], [0, -1, 1]], [[1, -1, 0], [1, 0, -1]]])
    assert C.dtype == torch.float64 and torch.equal(C, expected.double())
    assert C.shape == (2, 2, 3) and (C @ scores.unsqueeze(-1)).shape == (2, 2, 1)


def test_the_smallest_margin_leaves_out_the_target_and_the_padding_of_the_vocabulary():
    lower = torch.tensor([[0.0, 3.0, 2.0, -9.0], [4.0, 0.0, 5.0, -9.0]])
    assert smallest_margin(lower, torch.tensor([0, 1]), 3).tolist() == [2.0, 4.0]
    assert smallest_margin(lower, torch.tensor([0, 1])).tolist() == [-9.0, -9.0]
    for bad in (float("nan"), float("inf"), -float("inf")):
        lower[0, 2] = bad
        assert smallest_margin(lower, torch.tensor([0, 1]), 3).tolist() == [-torch.inf, 4.0]


def test_some_label_wins_only_where_the_largest_logit_is_always_a_labels():
    torch.manual_seed(0)
    labels, certified, split = [1, 4], 0, 0
    for _ in range(300):
        logits = torch.randn(20, 6)  # of all inputs of a set that has twenty
        logits[:, labels] += 3.5 * torch.rand(1)
        lower = (logits[:, labels].unsqueeze(-1) - logits.unsqueeze(1)).amin(0, keepdim=True)
        margin = some_label_wins(lower, labels, 5).item()
        assert margin == some_label_wins(lower.flatten(1), labels, 5).item()
        others = [0, 2, 3]
        assert margin == min(max(lower[0, t, j].item() for t in range(2)) for j in others)
        if margin > 0:
            winners = set(logits[:, :5].argmax(-1).tolist())
            assert winners <= set(labels)
            certified, split = certified + 1, split + (len(winners) == 2)
    assert certified > 20 and split > 0, "both labels win somewhere, and it is still certified"


def test_nan_and_infinite_margins_let_no_label_win():
    lower = torch.ones(3, 2, 3)
    lower[0, :, 2], lower[1, :, 2] = float("nan"), float("inf")
    assert some_label_wins(lower, [0, 1]).tolist() == [-torch.inf, -torch.inf, 1.0]
    lower[0, 0, 2] = 0.5  # the other label's is known
    assert some_label_wins(lower, [0, 1])[0] == 0.5
