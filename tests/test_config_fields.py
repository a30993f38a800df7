"""Fields of megatron-core's configurations: each on a list, what is not known is refused.

Run with PYTHONPATH=RELEASE these tests are about that release of megatron-core.
"""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
import transformers
from ranks import pool

from lirpa_megatron.adapters import config_fields

LISTS = (config_fields.NEUTRAL, config_fields.MODELLED, frozenset(config_fields.REFUSED))
ARGUMENTS = (
    config_fields.NEUTRAL_ARGUMENTS, config_fields.MODELLED_ARGUMENTS,
    config_fields.REFUSED_ARGUMENTS, config_fields.HYBRID_ARGUMENTS,
)


def _fields():
    from megatron.core.transformer.transformer_config import TransformerConfig

    return {field.name for field in dataclasses.fields(TransformerConfig)}


def test_every_field_of_the_installed_release_is_on_one_list():
    fields = _fields()
    assert "hidden_size" in fields and len(fields) > 150
    assert {name: [name in names for names in LISTS].count(True) for name in fields} == (
        dict.fromkeys(fields, 1)
    )


def test_every_argument_of_the_models_is_on_one_list():
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.models.mamba.mamba_model import MambaModel

    from lirpa_megatron.compat.megatron_hybrid import HybridModel

    for cls in (GPTModel, BertModel, HybridModel, MambaModel):
        arguments = set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
        assert {name: [name in names for names in ARGUMENTS].count(True) for name in arguments} == (
            dict.fromkeys(arguments, 1)
        )


def test_no_field_is_on_two_lists():
    for lists in (LISTS, ARGUMENTS):
        assert sum(map(len, lists)) == len(frozenset().union(*lists))


ANOTHER = {
    "fp8": "e4m3", "fp4": "e2m1", "quant_recipe": object(), "multi_latent_attention": True,
    "experimental_attention_variant": "dsa", "linear_attention_freq": 2,
    "attention_output_gate": True, "softmax_type": "learnable", "window_size": (2, 0),
    "apply_residual_connection_post_layernorm": True, "activation_func_clamp_value": 1.0,
    "use_te_activation_func": True, "use_transformer_engine_op_fuser": True,
    "use_grouped_gemm_for_dense_mlp": True, "fused_residual_rmsnorm": True,
    "fused_single_qkv_rope": True, "num_moe_experts": 2, "mtp_num_layers": 1,
    "heterogeneous_block_specs": True, "context_parallel_size": 2, "hybrid_context_parallel": True,
    "gtp_weight_remat_size": 2, "enable_cuda_graph": True, "external_cuda_graph": True,
    "cuda_graph_impl": "local", "use_kitchen": True, "use_kitchen_attention": True,
    "transformer_impl": "inference_optimized", "use_inference_optimized_layers": True,
    "inference_fuse_tp_communication": True,
}
"""For each field that is refused, a value that is not its default."""


def _each_refused():
    from lirpa_megatron.adapters.traceable import traceable

    model, found = transformers.gpt(torch.float32), {}
    for name in sorted(_fields() & set(config_fields.REFUSED)):
        kept = getattr(model.config, name)
        setattr(model.config, name, ANOTHER[name])
        try:
            traceable(model)
            found[name] = "traced"
        except NotImplementedError as error:
            found[name] = str(error)
        setattr(model.config, name, kept)
    traceable(model)
    return found


def test_each_refused_field_is_named_as_soon_as_it_differs_from_its_default():
    found = pool(1).run(_each_refused)[0]
    assert len(found) > 10
    for name, message in found.items():
        assert f"{name}=" in message and "not supported" in message, (name, message)


def _unknown_fields():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from lirpa_megatron import embed
    from lirpa_megatron.adapters.traceable import traceable

    @dataclasses.dataclass
    class Config(TransformerConfig):
        residual_factor: float = 1.0
        names: list = dataclasses.field(default_factory=list)
        vocab_size: int | None = None  # also an argument of GPTModel: known

    model = transformers.gpt(torch.float32)
    values = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    config = object.__new__(Config)
    config.__dict__.update(values, residual_factor=1.0, names=[], vocab_size=32)
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config
    traceable(model)
    found = []
    for name, value in (("residual_factor", 0.5), ("names", ["x"])):
        kept = getattr(config, name)
        setattr(config, name, value)
        for function in (traceable, lambda m: embed(m, transformers.tokens()[0])):
            try:
                found.append(function(model))
            except NotImplementedError as error:
                found.append(str(error))
        setattr(config, name, kept)
    return found


def test_a_field_on_no_list_is_refused_with_the_release_unless_it_has_its_default():
    import megatron.core

    found = pool(1).run(_unknown_fields)[0]
    fields = ("residual_factor=0.5", "residual_factor=0.5", "names=['x']", "names=['x']")
    for message, field in zip(found, fields, strict=True):
        assert field in message and f"megatron-core {megatron.core.__version__}" in message


# --------------------------------------------------------------------------------- muP

HAS_MUP = "use_mup" in _fields()
MUP = {
    "embedding": {"mup_embedding_mult": 0.25},
    "logits": {"mup_base_hidden_size": 8},
    "a given factor of logits": {"mup_output_mult": -0.5},
    "attention": {"mup_base_head_dim": 2.0, "mup_attn_scale_power": 0.5},
    "all": {"mup_embedding_mult": 3.0, "mup_base_hidden_size": 4, "mup_base_head_dim": 9.0},
}


def _mup(case, kind):
    """The largest violation by sampled points, computed by the live model from its own embedding;
    and the largest difference of the clean logits."""
    from lirpa_megatron import BoundedModule, at_position, bert_head, embed, perturb_tokens

    torch.set_num_threads(1)
    model = getattr(transformers, kind)(torch.float64, use_mup=True, num_layers=1, **MUP[case])
    plain = getattr(transformers, kind)(torch.float64, num_layers=1)
    ids, positions, padding, types = transformers.tokens()
    view = at_position(bert_head(model, "lm") if kind == "bert" else model, -1)
    further = {"tokentype_ids": types} if kind == "bert" else {}
    inputs = perturb_tokens(view, ids, eps=0.01, **further)

    def run(which):
        if kind == "bert":
            return which(ids, torch.ones_like(padding), types)[0][:, -1]
        return which(ids, positions, None)[:, -1]

    with torch.no_grad():
        clean, without = run(model), run(plain)
        lower, upper = BoundedModule(view, inputs).compute_bounds(inputs, method="CROWN")
        worst = torch.maximum(lower - clean, clean - upper).max()
        shape = inputs[0].shape
        for _ in range(30):
            moved = (0.01 * (2 * torch.rand(shape, dtype=torch.float64) - 1).sign())
            handle = model.embedding.register_forward_hook(
                lambda mod, x, y, moved=moved: y + moved.transpose(0, 1)
            )
            y = run(model)
            handle.remove()
            worst = torch.maximum(worst, torch.maximum(lower - y, y - upper).max())
    scale = embed(model, ids, **further).abs().max()
    return worst.item(), (clean - without).abs().max().item(), math.isfinite(scale)


@pytest.mark.skipif(not HAS_MUP, reason="this release of megatron-core has no muP (0.17 has)")
@pytest.mark.parametrize("case", MUP)
def test_bounds_of_a_gpt_with_mup_hold_for_the_live_model(case):
    worst, moved, finite = pool(1).run(_mup, case, "gpt")[0]
    assert worst < 1e-12 and moved > 1e-3 and finite


@pytest.mark.skipif(not HAS_MUP, reason="this release of megatron-core has no muP (0.17 has)")
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_bounds_of_other_models_with_mup_hold_for_the_live_model(kind):
    worst, moved, finite = pool(1).run(_mup, "all", kind)[0]
    assert worst < 1e-12 and moved > 1e-3 and finite


@pytest.mark.skipif(not HAS_MUP, reason="this release of megatron-core has no muP (0.17 has)")
def test_mup_is_the_same_on_two_ranks():
    worst, moved, _ = pool(2).run(_mup, "all", "gpt")[0]
    assert worst < 1e-12 and moved > 1e-3
