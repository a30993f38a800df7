"""Segments and directions as sets."""

from __future__ import annotations

import pytest
import torch
import transformers

from lirpa_megatron import directions, perturb_tokens, segment
from lirpa_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("session", "one_thread", "double")


@pytest.mark.parametrize("match, given", [
    ("have 5 numbers, the input has 6", {"vectors": torch.ones(1, 5)}),
    ("vector 1 is zero", {"vectors": torch.eye(2, 6) * torch.tensor([[1.0], [0.0]])}),
    ("vector 0 has numbers that are not finite", {"vectors": torch.full((1, 6), float("inf"))}),
    ("no vectors", {"vectors": []}),
    ("2 different shapes", {"vectors": [torch.ones(6), torch.ones(5)]}),
    ("radii have shape", {"vectors": torch.ones(2, 6), "radii": [1.0, 2.0, 3.0]}),
    ("radii must be at least 0", {"vectors": torch.ones(1, 6), "radii": -1.0}),
    ("no position 9", {"vectors": torch.ones(1, 6), "positions": [9]}),
    ("positions are for vectors", {"vectors": torch.ones(1, 3, 6), "positions": [0]}),
])
def test_directions_that_make_no_set_are_refused(match, given):
    with pytest.raises(UserError, match=match):
        directions(torch.zeros(2, 3, 6), **given)


def test_a_segment_needs_two_inputs_of_one_shape():
    with pytest.raises(UserError, match="two inputs of the same shape"):
        segment(torch.zeros(1, 3), torch.zeros(1, 4))
    with pytest.raises(UserError, match="for words their embeddings"):
        segment(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))


def test_hidden_states_move_along_directions_at_any_layer():
    model = transformers.gpt(torch.float64)
    ids = transformers.tokens()[0]
    D = torch.randn(2, 16)
    (hidden,) = perturb_tokens(model, ids, directions=D, eps=[0.1, 0.2], start_layer=1,
                               positions=[-1])
    scaled = hidden.ptb.directions
    assert scaled.shape == (len(ids), 2, *hidden.shape[1:])
    assert torch.equal(scaled[0, :, -1], D * torch.tensor([[0.1], [0.2]]))
    assert not scaled[:, :, :-1].any()
    (clean,) = perturb_tokens(model, ids, eps=0.1, start_layer=1)
    assert torch.equal(clean.data, hidden.data)
    for match, words in {
        "there is no layer 7": {"start_layer": 7}, "directions need eps": {"eps": None},
        "two questions": {"substitutes": {1: [2]}}, "norm is inf": {"norm": 2},
        "does not cover directions": {"rounding": "outward"},
    }.items():
        with pytest.raises(UserError, match=match):
            perturb_tokens(model, ids, directions=D, **{"eps": 0.1, **words})
