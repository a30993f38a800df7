"""GPT, LLaMA-like and BERT models of many kinds, and their bounds on the ranks of a pool."""

from __future__ import annotations

import torch
import transformers

from lirpa_megatron import BoundedModule, at_position, bert_head, from_layer, perturb_tokens
from lirpa_megatron.adapters.traceable import traceable

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUNDS = ("IBP", "CROWN-IBP", "CROWN")
ALPHA = {"iteration": 3, "lr_alpha": 30.0, "optimizer": "sgd", "early_stop_patience": 100}


def build_case(name, dtype):
    """(model, view, further inputs) of a case."""
    if name == "gpt":
        model = transformers.gpt(dtype)
        return model, at_position(model, -1), {}
    if name == "gpt, squared relu, RMSNorm, untied":
        from megatron.core.activations import squared_relu

        model = transformers.gpt(
            dtype, {"share_embeddings_and_output_weights": False, "parallel_output": True},
            activation_func=squared_relu, normalization="RMSNorm",
        )
        return model, at_position(model, 3), {}
    if name == "llama":
        model = transformers.llama(dtype)
        return model, at_position(model, -1), {}
    if name.endswith("norms of queries and keys"):
        model = transformers.llama(dtype, spec={"qk_layernorm": True},
                                   num_query_groups=GROUPS[name], qk_layernorm=True)
        return model, from_layer(at_position(model, -1), 1), {}
    if name.startswith("hybrid"):  # "hybrid *--*", "hybrid llama *--*"
        *kind, pattern = name.split()
        make = transformers.hybrid_llama if "llama" in kind else transformers.hybrid
        model = make(dtype, pattern=pattern)
        return model, at_position(model, -2), {}
    model = transformers.bert(dtype)
    _, _, padding, types = transformers.tokens()
    further = {"attention_mask": padding, "tokentype_ids": types}
    if name == "bert":
        return model, bert_head(model, "binary"), further
    return model, at_position(bert_head(model, "lm"), 2), further


CASES = ("gpt", "gpt, squared relu, RMSNorm, untied", "llama",
         "one key group, norms of queries and keys", "bert", "bert's language head")

HEADS_APART = "four key groups, norms of queries and keys"
"""At TP=4 each rank has one head, with norms of its own."""
GROUPS = {"llama": 2, CASES[3]: 1, HEADS_APART: 4}
"""Query groups of the cases that have fewer than heads (4), or norms of them."""


def case_bounds(name, dtype, methods=ROUNDS, eps=0.01, options=None, eager=False):
    """method -> (lower, upper), and outputs at points of the set if `eager`."""
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    model, view, further = build_case(name, dtype)
    view.eval()
    ids = transformers.tokens()[0]
    inputs = perturb_tokens(view, ids, eps=eps, **further)
    bounded = BoundedModule(view, inputs, bound_opts=options)
    found = {}
    for method in methods:
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            pair = bounded.compute_bounds(inputs, method=method)
        pair = [b.detach() for b in pair]
        if getattr(view.model.output_layer, "gather_output", True) is False and is_sharded(bounded):
            pair = [bounded.context.collectives.gather_features(b) for b in pair]
        found[method] = tuple(pair)
    if runtime.tp_size() > 1 and (options or {}).get("moves") == "weights":
        counted = bounded.schedule.communication.counted
        assert counted["chosen"] == counted["weights"] != counted["A"]  # they did move
    if not eager:
        return found if runtime.is_rank0() else None
    net = traceable(view)
    return found, inputs, net


def is_sharded(bounded):
    return bounded.sharded[bounded.final_name]


def check_same(one, many, dtype):
    for method, pair in one.items():
        width = (pair[1] - pair[0]).abs()
        size = max(b.abs().max() for b in pair)
        for a, b in zip(pair, many[method], strict=True):
            difference = (a - b).abs()
            allowed = TOLERANCE[dtype] * width + (1e-5 if dtype == torch.float32 else 1e-14) * size
            assert (difference <= allowed).all(), (method, (difference / allowed).max())
