"""Models that a checkpoint's arguments describe and that are refused, by name, in one line."""

import checkpoints
import pytest
import torch
from checkpoints import refused

pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture(scope="module")
def state(session):
    """Whole parameters of the GPT case, in float32."""
    return checkpoints.whole_state("gpt", torch.float32)[0]


ARGUMENTS = {
    "num_experts": (8, "MoE"), "multi_latent_attention": (True, "multi-latent"),
    "mtp_num_layers": (1, "multi-token prediction"), "fp8": ("hybrid", "fp8"),
    "fp4": ("e2m1", "fp4"), "is_hybrid_model": (True, "Mamba"),
    "hybrid_layer_pattern": ("M*M-", "Mamba"), "spec": (["my.module", "spec"], "specs of users"),
    "experimental_attention_variant": ("dsa", "attention variants"),
    "heterogeneous_layers_config_path": ("x.json", "layers that differ"),
    "attention_output_gate": (True, "output gates"), "use_mup": (True, "muP"),
    "use_te_activation_func": (True, "TransformerEngine's activation"),
    "apply_residual_connection_post_layernorm": (True, "post-layernorm"),
    "window_size": ((128, 3), "window_size=.* is malformed"), "qk_l2_norm": (True, "L2 norms"),
    "no_rope_freq": (4, "without rotary"), "softmax_type": ("learnable", "vanilla"),
    "activation_func_clamp_value": (7.0, "clamped"), "yaml_cfg": ("x.yaml", "yaml-cfg"),
    "te_precision_config_file": ("x", "quantised"), "enable_hyper_connections": (True, "hyper"),
    "normalization": ("DeepNorm", "supported are LayerNorm, RMSNorm"),
    "position_embedding_type": ("yarn", "supported are learned_absolute, rope, none"),
    "num_layers": (3, r"has no tensor decoder\.layers\.2\."),
    "hidden_size": (24, r"num_attention_heads|has shape"),
    "num_attention_heads": (0, "num_attention_heads=0 is malformed"),
    "ffn_hidden_size": ("32", "ffn_hidden_size='32' is malformed"),
    "layernorm_epsilon": (float("nan"), "layernorm_epsilon=nan is malformed"),
    "add_bias_linear": (False, "which its arguments do not ask for"),
    "untie_embeddings_and_output_weights": (True, "has no tensor output_layer.weight"),
    "squared_relu": ("yes", "squared_relu='yes' is malformed"),
    "vocab_size": (1000, "vocab_size 1000 exceeds the 32 rows"),
    "rotary_seq_len_interpolation_factor": (2, "releases differ in whether they obey"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_refused(state, tmp_path, name):
    value, message = ARGUMENTS[name]
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(**{name: value}))
    refused(tmp_path / "c", message)


def test_no_arguments_at_all(state, tmp_path):
    checkpoints.save_legacy(
        state, tmp_path / "c", checkpoints.arguments(), change=lambda c, r, s: c.pop("args")
    )
    refused(tmp_path / "c", r"does not hold Megatron's arguments: give them with --model-config .*"
                            "missing are num_layers")


TOLD = {name: value for name, value in vars(checkpoints.arguments(**checkpoints.LLAMA)).items()
        if name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
            "max_position_embeddings", "position_embedding_type", "normalization",
            "layernorm_epsilon", "add_bias_linear", "swiglu", "bias_gelu_fusion",
            "untie_embeddings_and_output_weights", "rotary_base", "rotary_percent",
            "rotary_interleaved", "use_rope_scaling", "num_query_groups", "group_query_attention",
            "layernorm_zero_centered_gamma", "glu_linear_offset", "kv_channels")}
TOLD |= {"softmax_type": "vanilla", "softmax_scale": None, "window_size": None, "use_mup": False,
         "qk_l2_norm": False, "no_rope_freq": None, "glu_linear_offset": 0.0,
         "activation_func_clamp_value": None, "rotary_seq_len_interpolation_factor": None}
NEEDED = {"rotary_base": "10000; Llama 3 has 500000", "use_rope_scaling": "false; Llama 3.1 has",
          "softmax_type": "vanilla", "window_size": "null: none", "softmax_scale": "null",
          "rotary_percent": "1.0", "no_rope_freq": "null", "qk_l2_norm": "false",
          "layernorm_zero_centered_gamma": "false", "glu_linear_offset": "0.0"}


@pytest.fixture(scope="module")
def bare(session, tmp_path_factory):
    """(LLaMA-like checkpoint without any arguments, its logits)."""
    whole, expected = checkpoints.whole_state("llama")
    out = tmp_path_factory.mktemp("bare") / "c"
    checkpoints.save_legacy(
        whole, out, checkpoints.arguments(**checkpoints.LLAMA), tied=False,
        change=lambda c, r, s: c.pop("args"),
    )
    return out, expected


def test_a_whole_description_is_enough(bare):
    got, _ = checkpoints.load_logits(bare[0], overrides=TOLD)
    assert ((got - bare[1]).abs().max() / bare[1].abs().max()).item() <= 1e-12


@pytest.mark.parametrize("name", NEEDED)
def test_what_decides_the_function_and_is_not_in_the_folder_is_asked_for(bare, name):
    told = {key: value for key, value in TOLD.items() if key != name}
    refused(bare[0], rf"still missing are {name} \(usually {NEEDED[name]}", overrides=told)


def test_a_scale_of_rotary_positions_is_asked_for_where_they_are_scaled(bare):
    refused(bare[0], r"still missing are rope_scaling_factor \(usually 8\.0\)",
            overrides={**TOLD, "use_rope_scaling": True})


@pytest.mark.parametrize("name", ["rotary_base", "layernorm_epsilon", "bias_gelu_fusion"])
def test_arguments_that_leave_out_what_every_release_writes_are_incomplete(
    session, tmp_path, name
):
    whole, _ = checkpoints.whole_state("llama")
    checkpoints.save_legacy(
        whole, tmp_path / "c", checkpoints.arguments(**checkpoints.LLAMA), tied=False,
        change=lambda c, r, s: vars(c["args"]).pop(name),
    )
    refused(tmp_path / "c", f"lacks some of Megatron's arguments: .*still missing are {name}")


@pytest.mark.parametrize("overrides, message", [
    ({"num_layer": 2}, "unknown model argument 'num_layer'; known are"),
    ({"padded_vocab_size": 31}, "31 would cut rows of tokens .*32 rows, of which 32 are tokens"),
    ({"num_query_groups": 3, "group_query_attention": True},
     "num_attention_heads 4 is not divisible by num_query_groups 3"),
    ({"swiglu": True, "quick_geglu": True}, "swiglu and quick_geglu exclude each other"),
])
def test_overrides_that_are_refused(state, tmp_path, overrides, message):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments())
    refused(tmp_path / "c", message, overrides=overrides)


@pytest.mark.parametrize("iteration, message", [
    (11, "has no iteration 11; it has iter_0000010"), ("release", "has no iteration release"),
    ("../x", "'../x' is neither a number nor 'release'"), (-1, "'-1' is neither"),
])
def test_iterations_that_are_not_there(state, tmp_path, iteration, message):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments())
    refused(tmp_path / "c", message, iteration=iteration)
