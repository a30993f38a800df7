"""What facades of Megatron's modules do not model is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from ranks import pool
from releases import config_has
from torch import nn


class _Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def _refused(case):
    """Builds the facade of a model that must be refused."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from lirpa_megatron.adapters.traceable import traceable

    def altered(build=transformers.gpt, training=False, path="config", **attributes):
        model = build()
        owner = model
        for part in path.split("."):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        for name, value in attributes.items():
            setattr(owner, name, value)
        return model.train(training)

    def subclassed():
        model = transformers.gpt()
        mlp = model.decoder.layers[1].mlp
        mlp.__class__ = type("Mine", (type(mlp),), {"forward": lambda self, x: x})
        return model

    first = "decoder.layers.0"
    core = f"{first}.self_attention.core_attention"

    def mla():
        model = transformers.gpt()
        model.decoder.layers[0].self_attention.__class__ = MLASelfAttention
        return model

    def attention_of(kind):
        model = transformers.gpt()
        model.decoder.layers[0].self_attention.core_attention = type(kind, (nn.Module,), {})()
        return model

    builders = {
        "MoE": lambda: transformers.gpt(
            spec={"num_experts": 2}, num_moe_experts=2, moe_router_load_balancing_type="none",
            add_bias_linear=False,
        ),
        "MLA": mla,
        "hidden dropout": lambda: altered(path=first, training=True, hidden_dropout=0.1),
        "attention dropout": lambda: altered(
            path=f"{core}.attention_dropout", training=True, p=0.2),
        "window": lambda: altered(path=f"{core}.scale_mask_softmax", window_size=(2, 0)),
        "softmax": lambda: altered(softmax_type="off-by-one"),
        "core attention": lambda: attention_of("FlexAttention"),
        "gate": lambda: altered(attention_output_gate=True),
        "clamp": lambda: transformers.llama(activation_func_clamp_value=1.0),
        "activation": lambda: transformers.gpt(activation_func=torch.sin),
        "subclass": subclassed,
        "fp8": lambda: altered(fp8="hybrid"),
        "post-norm residual": lambda: altered(apply_residual_connection_post_layernorm=True),
        "mrope": lambda: _with(transformers.gpt(), "position_embedding_type", "mrope"),
        "yarn": lambda: altered(transformers.llama, yarn_rotary_scaling_factor=4.0),
        "context parallel": lambda: altered(context_parallel_size=2),
        "norm of two dimensions": lambda: nn.Sequential(nn.LayerNorm((4, 4))),
        "other norm": lambda: altered(path="decoder", final_layernorm=_Scaled(16)),
        "return_embeddings": lambda: _with(transformers.bert(), "return_embeddings", True),
        "cross attention": lambda: altered(path=first, cross_attention=nn.Linear(2, 2)),
        "multi-token prediction": lambda: altered(mtp_num_layers=1),
    }
    traceable(builders[case]())


def _with(model, attribute, value):
    setattr(model, attribute, value)
    return model


REFUSALS = {
    "MoE": ("GPTModel", "num_moe_experts", "MoE layers"),
    "MLA": ("layers.0.self_attention", "multi-latent attention"),
    "hidden dropout": ("decoder.layers.0", "active dropout (hidden_dropout=0.1): call model.eval"),
    "attention dropout": (
        "decoder.layers.0.self_attention.core_attention", "active dropout (attention_dropout=0.2)",
    ),
    "window": ("self_attention.core_attention", "window_size"),
    "softmax": ("GPTModel", "softmax_type='off-by-one'"),
    "core attention": ("self_attention.core_attention", "FlexAttention"),
    "gate": ("", "attention_output_gate"),
    "clamp": ("GPTModel", "activation_func_clamp_value"),
    "activation": ("decoder.layers.0.mlp", "the activation function sin"),
    "subclass": ("decoder.layers.1.mlp", "Mine overrides MLP.forward"),
    "fp8": ("", "fp8"),
    "post-norm residual": ("", "apply_residual_connection_post_layernorm"),
    "mrope": ("GPTModel", "position_embedding_type=mrope"),
    "yarn": ("rotary_pos_emb", "yarn"),
    "context parallel": ("GPTModel", "context parallelism"),
    "norm of two dimensions": ("0:", "(4, 4)"),
    "other norm": ("decoder.final_layernorm", "_Scaled"),
    "return_embeddings": ("BertModel", "return_embeddings"),
    "cross attention": ("decoder.layers.0.cross_attention", "cross attention"),
    "multi-token prediction": ("GPTModel", "mtp_num_layers"),
}

NEWER = {
    "softmax": "softmax_type", "gate": "attention_output_gate",
    "clamp": "activation_func_clamp_value",
}
"""Case -> field of the config that the oldest releases do not have."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name_with_the_reason(case):
    if case in NEWER and not config_has(NEWER[case]):
        pytest.skip(f"this release of megatron-core has no {NEWER[case]}")
    outcome = pool(1).outcomes(_refused, case)[0]
    assert outcome.error == "NotImplementedError", outcome
    for part in REFUSALS[case]:
        assert part in outcome.message


def _allowed():
    """Dropout that is off, by mode or by probability, is not refused."""
    from lirpa_megatron.adapters.traceable import traceable

    model = transformers.gpt(hidden_dropout=0.1, attention_dropout=0.1)
    traceable(model)
    traceable(transformers.gpt().train())


def test_dropout_that_is_off_is_not_refused():
    pool(1).run(_allowed)


def _bad_views(case):
    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable
    from lirpa_megatron.adapters.views import at_position, bert_head, from_layer

    gpt, ids = transformers.gpt(), transformers.tokens()[0]
    bert = transformers.bert(model={"add_binary_head": False})
    {
        "layer": lambda: traceable(from_layer(gpt, 2)),
        "kind": lambda: at_position(nn.Linear(2, 2), 0),
        "head": lambda: bert_head(bert, "nsp"),
        "gpt head": lambda: bert_head(gpt, "lm"),
        "no head": lambda: traceable(bert_head(bert, "binary")),
        "position": lambda: traceable(at_position(transformers.bert(), 1)),
        "ids": lambda: embed(gpt, ids + 20),
        "types": lambda: embed(bert, ids),
        "no types": lambda: embed(gpt, ids, tokentype_ids=ids),
    }[case]()


BAD_VIEWS = {
    "layer": "no layer 2: the model has 2", "kind": "Linear", "head": "nsp",
    "gpt head": "GPTModel has no choice of heads", "no head": "add_binary_head", "position": "'lm'",
    "ids": "the vocabulary has 32", "types": "needs tokentype_ids",
    "no types": "has no embeddings for tokentype_ids",
}


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_a_view_or_tokens_that_the_model_does_not_offer_are_a_clear_error(case):
    outcome = pool(1).outcomes(_bad_views, case)[0]
    assert outcome.error == "UserError", outcome
    assert BAD_VIEWS[case] in outcome.message
