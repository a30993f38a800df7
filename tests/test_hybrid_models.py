"""HybridModel (MambaModel up to 0.17) with layers of attention and MLP alone, in any order."""

from __future__ import annotations

import checkpoints
import foreign_folders
import pytest
import ranks
import torch
import transformers
from checkpoints import refused
from live_models import patched
from test_transformer_soundness import attacked
from transformer_cases import build_case, case_bounds, check_same

from lirpa_megatron import BoundedModule, from_layer, perturb_tokens
from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import LiveModelError

TOLERANCE = 1e-12
"""Float64 weights, the same forward."""

pytestmark = pytest.mark.usefixtures("session")


def same(got, want):
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


# The live model.


@pytest.mark.parametrize("name", [
    "hybrid *--*",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "hybrid llama -**-", "hybrid *-*-", "hybrid **--", "hybrid -*", "hybrid --",
        "hybrid llama *-", "hybrid *")),
])
def test_bounds_are_those_of_one_device_and_no_point_violates_them(name):
    one = ranks.pool(1).run(case_bounds, name, torch.float64)[0]
    two = ranks.pool(2).run(case_bounds, name, torch.float64)[0]
    check_same(one, two, torch.float64)
    gaps, _ = ranks.pool(1).run(attacked, name, 0.05, torch.float64)[0]
    for method, gap in gaps.items():
        assert gap < 1e-12, method


def test_a_gpt_and_the_same_weights_as_a_hybrid_model_have_the_same_bounds():
    gpt, hybrid = transformers.gpt(), transformers.hybrid(pattern="*-*-")
    state = {foreign_folders.hybrid_name(n, fused=False): p for n, p in gpt.named_parameters()}
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            parameter.copy_(state[name])
    found = []
    for model in (gpt, hybrid):
        inputs = perturb_tokens(model, transformers.tokens(1)[0], eps=0.01)
        found.append(BoundedModule(model, inputs).compute_bounds(inputs, method="CROWN"))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_position_has_the_bounds_that_it_has_among_all_also_behind_the_last_attention():
    model, view, _ = build_case("hybrid *--", torch.float64)
    found = []
    for part in (from_layer(model, 0), view):
        inputs = perturb_tokens(part, transformers.tokens(1)[0], eps=0.01)
        bounds = BoundedModule(part, inputs).compute_bounds(inputs, method="CROWN")
        found.append([b if b.ndim == 2 else b[:, -2] for b in bounds])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_later_layer_and_the_stack_on_its_own_are_bounded():
    model = transformers.hybrid(pattern="-*-*")
    inputs = perturb_tokens(model, transformers.tokens(1)[0], eps=0.01, start_layer=2)
    view = from_layer(model, 2)
    lower, upper = BoundedModule(view, inputs).compute_bounds(inputs, method="CROWN")
    with torch.no_grad():
        want = model(*transformers.tokens(1)[:2], None)
    assert (lower <= want).all() and (want <= upper).all() and (upper - lower).max() < 50
    stack = BoundedModule(model.decoder, inputs)
    lower, upper = stack.compute_bounds(inputs, method="CROWN")
    assert torch.isfinite(upper - lower).all()


@pytest.mark.parametrize("where", ["decoder.layers.1.mlp", "decoder.final_norm", "decoder"])
def test_a_model_that_computes_something_else_is_found(where):
    model = transformers.hybrid(pattern="*-")
    module = model.get_submodule(where)

    def gained(self, y):
        if self is not module:
            return y
        return (y[0] * 1.001, *y[1:]) if isinstance(y, tuple) else y * 1.001

    inputs = perturb_tokens(model, transformers.tokens(1)[0], eps=0.01)
    with patched(type(module), gained), pytest.raises(LiveModelError, match="itself computes"):
        BoundedModule(model, inputs)


def test_half_a_part_of_a_layer_is_refused():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    cases = {
        "decoder.layers.0.mlp_bda": (get_bias_dropout_add, "has no mlp"),
        "decoder.layers.0.pre_mlp_layernorm": (torch.nn.LayerNorm(16).double(), "has no mlp"),
        "decoder.layers.1.self_attn_bda": (get_bias_dropout_add, "has no self_attention"),
        "decoder.layers.1.input_layernorm": (torch.nn.LayerNorm(16).double(), "has no self_att"),
    }
    for name, (value, message) in cases.items():
        model = transformers.hybrid(pattern="*-")
        inputs = perturb_tokens(model, transformers.tokens(1)[0], eps=0.01)
        *path, attribute = name.split(".")
        layer = model.get_submodule(".".join(path))
        delattr(layer, attribute)
        setattr(layer, attribute, value)
        with pytest.raises(NotImplementedError, match=f"^{name}: the layer {message}"):
            BoundedModule(model, inputs)


LETTERS = {"M": "a Mamba layer", "E": "an MoE layer", "G": "a gated delta net", "D": "sparse att",
           "+": "multi-latent attention"}


@pytest.mark.parametrize("letter", LETTERS)
def test_other_layers_are_refused_by_their_letter(letter):
    model = transformers.hybrid(pattern="*-")
    inputs = perturb_tokens(model, transformers.tokens(1)[0], eps=0.01)
    model.decoder.layer_type_list = ["*", letter]
    with pytest.raises(NotImplementedError) as caught:
        BoundedModule(model, inputs)
    said = str(caught.value)
    assert said.startswith(f"decoder.layers.1: {letter} is {LETTERS[letter]}"), said
    assert "\n" not in said


# Checkpoints.


def by_hand(out, case, **changes):
    state, expected = checkpoints.whole_state(case)
    settings = {"hybrid_layer_pattern": "*-*-", **checkpoints.CASES[case][2], **changes}
    foreign_folders.hybrid(out, dict(state), checkpoints.arguments(**settings))
    return expected


@pytest.mark.parametrize("case, pattern", [
    ("gpt", dict(hybrid_layer_pattern="*-*-")), ("llama", dict(hybrid_layer_pattern="*-|*-")),
    ("llama", dict(hybrid_layer_pattern=None, hybrid_override_pattern="*-*-")),
])
def test_attention_and_mlp_in_turn_are_a_gpt(case, pattern, tmp_path):
    expected = by_hand(tmp_path / "c", case, **pattern)
    got, description = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)
    assert (description.kind, description.num_layers) == ("Hybrid", 4)


@pytest.mark.parametrize("name", ["hybrid", "hybrid llama"])
def test_any_order_as_megatron_writes_it(name, capfd):
    folder, expected = checkpoints.written()
    got, description = checkpoints.load_logits(folder / name)
    same(got, expected[name])
    for got, _ in ranks.pool(2).run(checkpoints.load_logits, folder / name):
        same(got, expected[name])
    assert main(["inspect", str(folder / name)]) == 0
    printed = capfd.readouterr().out
    assert f"Hybrid, {description.num_layers} layers: {description.layers} (* att" in printed
    assert "next_token_margins" in printed


def test_ranks_files_hold_it_too(tmp_path):
    state, expected = checkpoints.whole_state("hybrid")
    args = checkpoints.arguments(**checkpoints.CASES["hybrid"][2])
    checkpoints.save_legacy(state, tmp_path / "c", args, tp=2, pp=2)
    got, _ = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)


def test_without_arguments_the_pattern_is_one_of_the_model_config(tmp_path):
    state, expected = checkpoints.whole_state("hybrid")
    foreign_folders.fsdp(tmp_path / "c", state, checkpoints.arguments(), keep=())
    said = vars(checkpoints.arguments(**checkpoints.CASES["hybrid"][2]))
    from lirpa_megatron.checkpoint.arguments import _DEFAULTS

    config = {name: value for name, value in said.items() if name in _DEFAULTS} | {
        "softmax_type": "vanilla", "softmax_scale": None, "window_size": None,
    }
    with pytest.raises(Exception, match="no_rope_freq|qk_l2_norm|use_mup"):
        checkpoints.load_logits(tmp_path / "c", overrides=config)
    config |= {"qk_l2_norm": False, "use_mup": False}
    same(checkpoints.load_logits(tmp_path / "c", overrides=config)[0], expected)


REFUSED = {
    "Mamba": (dict(hybrid_layer_pattern="M-*-"), "'M' is a Mamba layer"),
    "experts": (dict(hybrid_layer_pattern="*E*-"), r"'E' is an MoE layer"),
    "delta nets": (dict(hybrid_layer_pattern="G-*-"), "'G' is a gated delta net"),
    "sparse attention": (dict(hybrid_layer_pattern="D-*-"), "'D' is sparse attention"),
    "latent attention": (dict(hybrid_layer_pattern="L-L-"), "'L' is multi-latent attention"),
    "its newer letter": (dict(hybrid_layer_pattern="+-+-"), r"'\+' is multi-latent attention"),
    "more tokens": (dict(hybrid_layer_pattern="*-*-/*-"), "'/' is multi-token prediction"),
    "another order": (dict(hybrid_layer_pattern="**--"), "has no tensor|left over"),
    "an unknown letter": (dict(hybrid_layer_pattern="*-X-"), "'X' is a layer of an unknown kind"),
    "a line feed": (dict(hybrid_layer_pattern="*-\n-"), r"'\\n' is a layer of an unknown kind"),
    "stages alone": (dict(hybrid_layer_pattern="||"), "has no layers"),
    "a list": (dict(hybrid_layer_pattern=["*", "-"]), "is malformed"),
    "two patterns": (dict(hybrid_override_pattern="*-*-"), "is malformed"),
    "no pattern": (dict(hybrid_layer_pattern=None), "Mamba and other hybrid models"),
    "a scale": (dict(use_rope_scaling=True), "use_rope_scaling or mtp_num_layers"),
    "more layers": (dict(hybrid_layer_pattern="*-*-*-"), "has no tensor"),
    "fewer layers": (dict(hybrid_layer_pattern="*-"), "left over"),
    "layers of a stranger": (dict(spec=["mine", "spec"]), "specs of users"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_hybrid_checkpoints_that_are_refused(changes, message, tmp_path):
    by_hand(tmp_path / "c", "gpt", **changes)
    refused(tmp_path / "c", message)


def test_a_model_config_cannot_scale_the_positions_of_a_hybrid_model(tmp_path):
    by_hand(tmp_path / "c", "llama")
    refused(tmp_path / "c", "use_rope_scaling", overrides={"use_rope_scaling": True})
    refused(tmp_path / "c", "left over", overrides={"hybrid_layer_pattern": "*-"})


# Megatron-Bridge.

BRIDGE = "megatron.bridge.models."
NAMES = {
    "Hybrid": dict(),
    "Mamba": dict(
        _target_=f"{BRIDGE}mamba.mamba_provider.MambaModelProvider", hybrid_stack_spec=None,
        hybrid_layer_pattern=None, hybrid_override_pattern="**--", mamba_stack_spec={
            "_target_": f"{BRIDGE}mamba.mamba_provider.get_default_mamba_stack_spec",
            "_call_": False},
    ),
    "a configuration": dict(
        _target_="megatron.training.models.hybrid.HybridModelConfig", hybrid_stack_spec=None),
}


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
def test_a_hybrid_provider_of_bridge_holds_the_writers_function(changes, tmp_path):
    model = foreign_folders.hybrid_provider(**changes)
    expected = foreign_folders.bridge(tmp_path / "c", "hybrid", model)
    got, description = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)
    assert description.layers == "**--" and description.stored.described_by == "run_config.yaml"


PROVIDERS = {
    "Mamba layers": (dict(hybrid_layer_pattern="M*--"), "'M' is a Mamba layer"),
    "no pattern": (dict(hybrid_layer_pattern=None), "has no hybrid_layer_pattern: models of Mamba"),
    "two": (dict(hybrid_override_pattern="**--"), "is malformed"),
    "ratios": (dict(hybrid_attention_ratio=0.5), r"hybrid_attention_ratio=0.5\): it is not supp"),
    "more tokens": (dict(mtp_hybrid_override_pattern="*-"), "mtp_hybrid_override_pattern='\\*-'"),
    "layers of ModelOpt": (
        dict(hybrid_stack_spec={"_target_": f"{BRIDGE}hybrid.hybrid_provider.modelopt_hybrid_"
                                            "stack_spec", "_call_": False}), "modelopt_hybrid"),
    "layers of a stranger": (dict(hybrid_stack_spec={"_target_": "os.system"}), "os.system"),
    "a scale": (dict(rope_scaling=True), "use_rope_scaling"),
    "muP": (dict(use_mup=True), "use_mup=True"),
    "a newer field": (dict(rotate_twice=False), "field 'rotate_twice' is not known"),
    "another class": (dict(_target_=f"{BRIDGE}hybrid.hybrid_provider.NemotronProvider"),
                      "NemotronProvider are not supported"),
    "a GPT's class": (
        dict(_target_=f"{BRIDGE}gpt_provider.GPTModelProvider"), "field 'hybrid_.* is not known"),
}


@pytest.mark.parametrize("changes, message", PROVIDERS.values(), ids=PROVIDERS)
def test_hybrid_providers_that_are_refused(changes, message, tmp_path):
    model = foreign_folders.hybrid_provider(**changes)
    foreign_folders.bridge(tmp_path / "c", "hybrid", model)
    refused(tmp_path / "c", message)
