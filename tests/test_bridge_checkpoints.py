"""Folders of Megatron-Bridge: the writer's function, and nothing in them is run or guessed."""

import checkpoints
import foreign_folders
import pytest
import ranks
import torch
from checkpoints import refused

from lirpa_megatron.checkpoint.language_model import read_model_description
from lirpa_megatron.cli.commands import main

TOLERANCE = 1e-12  # float64 weights, the same forward

pytestmark = pytest.mark.usefixtures("session")


def same(got, want):
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


@pytest.mark.parametrize("name", foreign_folders.MODELS)
def test_a_folder_of_bridge_holds_the_writers_function(name, tmp_path):
    expected = foreign_folders.bridge(tmp_path / "c", name)
    got, description = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)
    assert description.stored.described_by == "run_config.yaml"
    assert description.stored.iteration == "10"
    for got, _ in ranks.pool(2).run(checkpoints.load_logits, tmp_path / "c"):
        same(got, expected)


def test_newer_releases_nest_the_fields_of_the_transformer(tmp_path):
    flat = foreign_folders.provider("indexed")
    outer = {name: value for name, value in flat.items() if name in foreign_folders.PROVIDER}
    inner = {name: value for name, value in flat.items() if name not in outer}
    inner["_target_"] = "megatron.core.transformer.transformer_config.TransformerConfig"
    inner["activation_func"] = "silu"
    model = {
        "_target_": "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig", **outer,
        "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
        "transformer": inner,
    }
    expected = foreign_folders.bridge(tmp_path / "c", "indexed", model)
    same(checkpoints.load_logits(tmp_path / "c")[0], expected)


SCALED = dict(rope_scaling=True, rope_scaling_factor=4.0)
LLAMA_31 = dict(
    _target_="megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B",
    scale_factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192,
)


@pytest.mark.parametrize("changes", [SCALED, LLAMA_31], ids=["Megatron's", "Llama 3.1's"])
def test_what_the_fields_say_is_what_runs(changes, tmp_path):
    model = foreign_folders.provider("indexed", **changes, rotary_base=5e5)
    foreign_folders.bridge(tmp_path / "c", "indexed", model)
    description = read_model_description(tmp_path / "c")
    assert description.rope_scaling and description.rope_scaling_factor == 4.0
    assert description.rotary_base == 5e5


def test_fusion_of_an_ungated_gelu_is_its_tanh_approximation(tmp_path):
    model = foreign_folders.provider("stacked", bias_activation_fusion=True)
    foreign_folders.bridge(tmp_path / "c", "stacked", model)
    assert read_model_description(tmp_path / "c").activation == "gelu_tanh"


def test_inspect_says_what_describes_the_model(tmp_path, capfd):
    foreign_folders.bridge(tmp_path / "c", "indexed")
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "run_config.yaml" in capfd.readouterr().out


FUNCTION = "activation_func"
FIELDS = {
    "experts": (dict(num_moe_experts=8), "num_moe_experts=8.*MoE"),
    "window": (dict(window_size=[127, 3]), r"window_size=\[127, 3\] is malformed"),
    "layers without rotary positions": (dict(no_rope_freq=4), "no_rope_freq=4"),
    "other softmax": (dict(softmax_type="learnable"), "softmax_type='learnable'"),
    "fp8": (dict(fp8="hybrid"), "fp8='hybrid'"),
    "quantised": (dict(restore_modelopt_state=True), "restore_modelopt_state=True"),
    "multi-token": (dict(mtp_num_layers=1), "mtp_num_layers=1"),
    "yarn": (dict(position_embedding_type="yarn"), "position_embedding_type='yarn'"),
    "muP": (dict(use_mup=True), "use_mup=True"),
    "a newer field": (dict(rotate_twice=False), "field 'rotate_twice' is not known"),
    "a newer field in the way": (dict([("x\n", 1)]), r"field 'x\\n' is not known"),
    "a function of a stranger": (
        {FUNCTION: {"_target_": "os.system", "_call_": False}}, "os.system"),
    "a call": ({FUNCTION: {"_target_": "torch.nn.functional.silu", "_call_": True}},
               "activation_func=torch.nn.functional.silu"),
    "a partial": ({FUNCTION: {"_target_": "torch.nn.functional.silu", "_partial_": True,
                              "_args_": [], "inplace": True}}, "activation_func="),
    "layers of a stranger": (
        dict(transformer_layer_spec={"_target_": "mine.spec", "_call_": False}), "mine.spec"),
    "layers of ModelOpt": (dict(transformer_layer_spec={
        "_target_": "megatron.bridge.models.gpt_provider.modelopt_transformer_layer_spec",
        "_call_": False}), "modelopt_transformer_layer_spec"),
    "a class of a stranger": (dict(_target_="builtins.eval"), "class builtins.eval are not"),
    "Mamba": (dict(_target_="megatron.bridge.models.mamba.mamba_provider.MambaModelProvider"),
              "has no hybrid_layer_pattern: models of Mamba layers are not supported"),
    "experts of Qwen": (
        dict(_target_="megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider"),
        "Qwen3MoEModelProvider are not supported"),
    "another scale": ({**LLAMA_31, "low_freq_factor": 2.0}, r"low_freq_factor=2.0\): only 1.0"),
    "a scale that the class has not": (dict(scale_factor=8.0), "field 'scale_factor' is not known"),
    "no class": (dict(_target_=None), "has no class"),
    "words": (dict(num_layers="2"), "num_layers='2' is malformed"),
    "a gate of GELU": ({FUNCTION: "gelu"}, "this activation is not supported"),
    "tied though it is not": (
        dict(share_embeddings_and_output_weights=True), "has the tensor output_layer.weight"),
}


@pytest.mark.parametrize("changes, message", FIELDS.values(), ids=FIELDS)
def test_fields_that_are_refused(changes, message, tmp_path):
    model = foreign_folders.provider("indexed", **changes)
    foreign_folders.bridge(tmp_path / "c", "indexed", model)
    refused(tmp_path / "c", message)


@pytest.mark.parametrize("name", [
    "rotary_base", "rope_scaling", "rotary_interleaved", "layernorm_epsilon", "activation_func",
    "bias_activation_fusion", "layernorm_zero_centered_gamma", "softmax_scale",
    "share_embeddings_and_output_weights", "seq_length", "seq_len_interpolation_factor",
])
def test_a_field_that_decides_and_is_missing_is_asked_for(name, tmp_path):
    model = foreign_folders.provider("indexed")
    del model[name]
    foreign_folders.bridge(tmp_path / "c", "indexed", model)
    names = {"rope_scaling": "use_rope_scaling", "seq_length": "max_position_embeddings",
             "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
             "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor"}
    refused(tmp_path / "c", f"missing are {names.get(name, name)}|has no field {name}")


SELF = "a: &a [*a]\n"
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
FILES = {
    "a Python object": ("model: !!python/object/apply:os.system ['touch {m}']\n", "is refused"),
    "a Python name": ("model: !!python/name:os.system\n", "is refused"),
    "an unknown tag": ("model: !mine {a: 1}\n", "is refused"),
    "not YAML": ("model: [1\n", "not valid YAML"),
    "not text": (b"\xff\xfe\x00\x01", "not a text file"),
    "empty": ("", "has no section 'model'"),
    "a list": ("- 1\n", "has no section 'model'"),
    "no model": ("train: {}\n", "has no section 'model'"),
    "a model that is a word": ("model: gpt\n", "has no section 'model'"),
    "aliases of aliases": (BOMB + "model: {_target_: *a29}\n", "has no class"),
    "an alias of itself": (SELF + "model: *a\n", "has no section 'model'"),
    "deep": ("model: " + "[" * 1_000 + "]" * 1_000, "nested more than 100 deep"),
    "adapters": ("model: {}\npeft: {dim: 8}\n", "models with peft are not supported"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_files_that_are_refused(content, message, tmp_path):
    marker = tmp_path / "it_ran"
    foreign_folders.bridge(tmp_path / "c", "indexed")
    path = tmp_path / "c" / foreign_folders.DATA / "run_config.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content.replace("{m}", str(marker)))
    refused(tmp_path / "c", message)
    assert not marker.exists()


def test_a_huge_file_is_not_read(tmp_path):
    foreign_folders.bridge(tmp_path / "c", "indexed")
    with (tmp_path / "c" / foreign_folders.DATA / "run_config.yaml").open("r+b") as file:
        file.truncate(2**34)  # sparse
    refused(tmp_path / "c", "which is not believable")


@pytest.mark.parametrize("state, message", [
    ({"step": "10"}, "holds no step"), ([1], "holds no step"), ({}, "holds no step"),
    ({"step": torch.tensor(11)}, "names '11', but there is no"),
    ({"step": torch.tensor(-1)}, "not an iteration"),
    ({"step": torch.tensor([1, 2])}, "holds no step"),
])
def test_trackers_that_are_refused(state, message, tmp_path):
    foreign_folders.bridge(tmp_path / "c", "indexed")
    torch.save(state, tmp_path / "c" / "latest_train_state.pt")
    refused(tmp_path / "c", message)


def test_what_a_tracker_names_does_not_run(tmp_path):
    import os

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it_ran'}",)

    foreign_folders.bridge(tmp_path / "c", "indexed")
    torch.save({"step": Hostile()}, tmp_path / "c" / "latest_train_state.pt")
    refused(tmp_path / "c", r"names posix\.system")
    assert not (tmp_path / "it_ran").exists()


def test_a_model_config_completes_a_run_config(tmp_path):
    model = foreign_folders.provider("indexed")
    del model["rotary_base"]
    expected = foreign_folders.bridge(tmp_path / "c", "indexed", model)
    got, _ = checkpoints.load_logits(tmp_path / "c", overrides={"rotary_base": 10000})
    same(got, expected)


def test_an_iteration_folder_can_be_named_itself(tmp_path):
    expected = foreign_folders.bridge(tmp_path / "c", "indexed")
    (tmp_path / "c" / "latest_train_state.pt").unlink()
    same(checkpoints.load_logits(tmp_path / "c" / foreign_folders.DATA)[0], expected)
