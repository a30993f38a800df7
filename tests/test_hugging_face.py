"""Hugging Face folders: the function that their tensors define, at any size, or one clear line."""

import json
import struct

import checkpoints
import hugging_face
import pytest
import ranks
import torch
from checkpoints import refused

from lirpa_megatron import BoundedModule, UserError, next_token_margins, perturb_tokens
from lirpa_megatron.checkpoint.hugging_face import HuggingFaceWeights
from lirpa_megatron.checkpoint.hugging_face_import import import_hugging_face
from lirpa_megatron.checkpoint.language_model import load_language_model, read_model_description
from lirpa_megatron.checkpoint.plain_forward import plain_logits
from lirpa_megatron.cli.commands import main
from lirpa_megatron.parallel import runtime

IDS = torch.arange(8) * 5 % hugging_face.WORDS
TOLERANCE = 1e-9  # float64; GPT-2's gelu_new has another last digit of sqrt(2 / pi) (1.4e-10)

pytestmark = pytest.mark.usefixtures("session")


def logits(folder, dtype=torch.float64):
    """Of the first sequence (runs on a rank)."""
    _, model = load_language_model(folder, runtime.tp_group(), dtype)
    with torch.no_grad():
        return model(IDS[None], torch.arange(len(IDS))[None], None)[0].double()


def same(got, want):
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


@pytest.mark.parametrize("number, name", enumerate(hugging_face.CONFIGS))
def test_a_folder_is_the_model_that_its_tensors_define(number, name, tmp_path):
    folder = hugging_face.save(tmp_path / "hf", name, files=1 + number % 3)
    want = plain_logits(HuggingFaceWeights(folder), IDS)
    same(logits(folder), want)
    for got in ranks.pool(2).run(logits, folder):
        same(got, want)


@pytest.mark.parametrize("name, dtype", [
    ("gpt2", torch.float16), ("llama", torch.bfloat16), ("qwen2", torch.float32),
    ("qwen3", torch.float32), ("mistral with a window", torch.bfloat16),
])
def test_what_is_imported_is_stored_bit_by_bit(name, dtype, tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", name, dtype)
    assert main(["import-hf", str(folder), str(tmp_path / "c")]) == 0
    assert "its logits differ from the folder's by" in capfd.readouterr().out
    before, model = load_language_model(folder, None, torch.float64)
    after, again = load_language_model(tmp_path / "c", None, torch.float64)
    for (key, got), want in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want), key
    kept = ("attention_window", "activation", "rotary_base", "rope_scaling_factor", "tied",
            "layernorm_epsilon", "num_query_groups", "kv_channels")
    assert [getattr(before, n) for n in kept] == [getattr(after, n) for n in kept]
    assert after.stored.format == "torch_dist" and before.stored.format == "Hugging Face"
    assert after.stored.dtype == before.stored.dtype == str(dtype).removeprefix("torch.")


def test_an_import_whose_logits_differ_leaves_nothing(tmp_path, monkeypatch):
    from lirpa_megatron.checkpoint import hugging_face_import

    folder = hugging_face.save(tmp_path / "hf", "llama")
    monkeypatch.setattr(
        hugging_face_import, "plain_logits", lambda *a: plain_logits(*a) + torch.eye(7, 32)
    )
    with pytest.raises(UserError, match="logits of what was written differ"):
        import_hugging_face(folder, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def radius_margins(folder, length):
    _, model = load_language_model(folder, None)
    ids = IDS[None, :length] if length <= 8 else IDS.repeat(4)[None, :length]
    inputs = (*perturb_tokens(model, ids, eps=1e-3), torch.tensor([3]))
    return BoundedModule(next_token_margins(model), inputs).compute_bounds(inputs)[0]


def test_all_forms_of_one_model_have_the_same_bounds(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "qwen2")
    import_hugging_face(folder, tmp_path / "c")
    assert torch.equal(radius_margins(folder, 5), radius_margins(tmp_path / "c", 5))


def test_a_window_is_exact_up_to_its_length_and_refused_beyond(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "mistral with a window")
    without = hugging_face.save(tmp_path / "without", "mistral", head_dim=8)
    description = read_model_description(folder)
    assert description.attention_window == description.longest_input == 12
    assert torch.equal(radius_margins(folder, 5), radius_margins(without, 5))
    assert torch.isfinite(radius_margins(folder, 12)).all()
    for checkpoint in (folder, tmp_path / "c"):
        if checkpoint != folder:
            import_hugging_face(folder, checkpoint)
        with pytest.raises(UserError, match="has 13 tokens, and the model's attention a window"):
            radius_margins(checkpoint, 13)


def test_verify_reads_a_folder_on_the_fly(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "mistral with a window")
    lines = [json.dumps({"ids": IDS[:n].repeat(2).tolist()}) for n in (2, 8)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["verify", "--load", str(folder), "--data", str(tmp_path / "d.jsonl"),
                 "--question", "certify", "--eps", "1e-5", "--attack-steps", "0"]
    assert main(arguments) == 1  # the second input is longer than the window
    first, second = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert first["result"] == "unsat" and first["stored_dtype"] == "float32"
    assert second["result"] == "error" and "16 tokens, the model 12 positions" in second["error"]


def test_inspect_describes_a_folder(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "mistral with a window", torch.bfloat16)
    assert main(["inspect", str(folder)]) == 0
    text = capfd.readouterr().out
    for part in ("Hugging Face", "config.json", "bfloat16", "a window of 12", "2 query groups",
                 "base 500000"):
        assert part in text, part


def test_a_missing_base_of_rotary_positions_is_asked_for(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "mistral")
    content = json.loads((folder / "config.json").read_text())
    del content["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, r"still missing are rotary_base \(usually 10000; Llama 3 has 500000\)")
    assert read_model_description(folder, overrides={"rotary_base": 10}).rotary_base == 10


CONFIGS = {
    "BERT": ("llama", dict(model_type="bert"), "normalise after each sublayer"),
    "Gemma": ("llama", dict(model_type="gemma2"), "'gemma2' are not supported, only gpt2"),
    "a newer key": ("llama", dict(rotate_twice=False), "key 'rotate_twice' is not known"),
    "code of its own": ("llama", dict(auto_map={"AutoModel": "x.Y"}), "auto_map="),
    "quantised": ("llama", dict(quantization_config={"bits": 4}), "quantization_config="),
    "biases of all": ("llama", dict(attention_bias=True), "attention_bias="),
    "another activation": ("llama", dict(hidden_act="relu"), "hidden_act='relu'"),
    "ReLU in GPT-2": ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
    "scores by layer": (
        "gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx="),
    "unscaled scores": ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    "yarn": ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "this scale of"),
    "dynamic": ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "this scale of"),
    "another llama3": (
        "llama", dict(rope_scaling={**hugging_face.SCALE, "low_freq_factor": 2.0}),
        "low_freq_factor=2.0 of a llama3 scale"),
    "no factor": ("llama", dict(rope_scaling={"rope_type": "linear"}), "malformed"),
    "two types": ("llama", dict(rope_scaling={"rope_type": "linear", "type": "default"}),
                  "this scale of"),
    "two bases": ("llama", dict(rope_scaling={**hugging_face.SCALE, "rope_theta": 3.0}),
                  "two values of rope_theta"),
    "a scale that is a word": ("llama", dict(rope_scaling="linear"), "malformed"),
    "half a head": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "a window that is a word": ("mistral", dict(sliding_window="12"), "sliding_window=12 is"),
    "layers of a kind": ("qwen2", dict(layer_types=["linear_attention"]), "layer_types are"),
    "layers as a word": ("llama", dict(num_hidden_layers="2"), "num_layers=2 is malformed"),
    "a million layers": ("llama", dict(num_hidden_layers=10**6), "num_layers=1000000 is"),
    "one layer more": ("llama", dict(num_hidden_layers=3), r"has no tensor decoder\.layers\.2"),
    "one layer less": ("llama", dict(num_hidden_layers=1), r"model\.layers\.1\..*left over"),
    "other heads": ("llama", dict(num_attention_heads=8), "not 8 heads in 2 groups"),
    "other groups": ("llama", dict(num_key_value_heads=4), "not 4 heads in 4 groups"),
    "no heads": ("llama", dict(num_attention_heads=0), "num_attention_heads=0 is malformed"),
    "a wider model": ("llama", dict(hidden_size=32), "has shape"),
    "more words": ("llama", dict(vocab_size=33), "vocab_size 33 exceeds the 32 rows"),
    "tied as a word": ("llama", dict(tie_word_embeddings="no"), "tie_word_embeddings=no is"),
    "no epsilon": ("llama", dict(rms_norm_eps=None), "has no rms_norm_eps"),
    "an epsilon that is not": ("llama", dict(rms_norm_eps=float("nan")), "epsilon=nan is malf"),
}


@pytest.mark.parametrize("name, changes, message", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(name, changes, message, tmp_path):
    refused(hugging_face.save(tmp_path / "hf", name, **changes), message)


def header(content, length=None, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8
FILES = {
    "empty": (b"", "header is longer than the file"),
    "four bytes": (b"abcd", "header is longer than the file"),
    "a length past the end": (header({}, 10**6), "header is longer than the file"),
    "a length of 2^64 - 1": (header({}, 2**64 - 1), "header is longer than the file"),
    "not JSON": (header(b"{"), "not JSON"),
    "not text": (header(b"\xff\xfe"), "not JSON"),
    "a list": (header([]), "not a mapping"),
    "deep": (header(b"[" * 1_000 + b"]" * 1_000), "not JSON"),
    "an entry that is a number": (header({"a": 1}), "entry of 'a' is malformed"),
    "an entry without offsets": (header({"a": {"dtype": "F32", "shape": [2]}}), "malformed"),
    "another key": (header({"a": {**ENTRY, "x": 1}}), "entry of 'a' is malformed"),
    "fp8": (header({"a": {**ENTRY, "dtype": "F8_E4M3"}}), "number type 'F8_E4M3'"),
    "a negative shape": (header({"a": {**ENTRY, "shape": [-2]}}), "malformed"),
    "a shape of words": (header({"a": {**ENTRY, "shape": ["2"]}}), "malformed"),
    "true as a size": (header({"a": {**ENTRY, "shape": [True]}}), "malformed"),
    "a huge shape": (header({"a": {**ENTRY, "shape": [2**40, 2**40]}}), "do not fit its shape"),
    "offsets past the end": (
        header({"a": {**ENTRY, "data_offsets": [8, 16]}}, data=EIGHT), "overlap, or leave gaps"),
    "offsets turned round": (
        header({"a": {**ENTRY, "data_offsets": [8, 0]}}, data=EIGHT), "do not fit its shape"),
    "negative offsets": (
        header({"a": {**ENTRY, "data_offsets": [-8, 0]}}, data=EIGHT), "malformed"),
    "the same place twice": (header({"a": ENTRY, "b": ENTRY}, data=EIGHT), "overlap"),
    "data that nobody has": (header({"a": ENTRY}, data=EIGHT + EIGHT), "not as long as"),
    "data cut off": (header({"a": ENTRY}, data=EIGHT[:4]), "not as long as"),
    "a name twice": (
        header(b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), data=EIGHT),
        "stands in its header twice"),
}


@pytest.mark.parametrize("content, message", FILES.values(), ids=FILES)
def test_safetensors_files_that_lie_are_refused(content, message, tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "llama")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, message)


def test_a_header_of_a_hundred_megabytes_is_not_read(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "llama")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 10**8))
        file.truncate(2 * 10**8)  # sparse
    refused(folder, "header of 100000000 bytes is not believable")


FIRST = "model-00001-of-00002.safetensors"
INDICES = {
    "a file outside": ({"a": "../other.safetensors"}, "which is no file's name"),
    "an absolute file": ({"a": "/etc/passwd"}, "which is no file's name"),
    "a folder": ({"a": ".."}, "no file's name|not safetensors"),
    "a pickle": ({"a": "model.bin"}, "which is not safetensors"),
    "a missing file": ({"a": "model-9.safetensors"}, "which does not exist"),
    "a number": ({"a": 3}, "which is no file's name"),
    "nothing": ({}, "has no weight_map"),
    "a list": ([], "has no weight_map"),
    "a tensor that is elsewhere": ({"a": FIRST}, "which does not hold it"),
}


@pytest.mark.parametrize("places, message", INDICES.values(), ids=INDICES)
def test_indices_that_lie_are_refused(places, message, tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "llama", files=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, message)


def test_an_index_that_leaves_a_tensor_out_is_refused(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "llama", files=2)
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    del content["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(content))
    refused(folder, "does not list the tensor model.norm.weight")


def spoil(name, change):
    def run(stored):
        stored[name] = change(stored[name])
    return run


NORM = "model.norm.weight"
TENSORS = {
    "no output layer": (lambda s: s.pop("lm_head.weight"), "no tensor output_layer.weight"),
    "biases of Qwen2": (
        lambda s: s.update({f"model.layers.0.self_attn.{part}_proj.bias": torch.ones(rows)
                            for part, rows in (("q", 16), ("k", 8), ("v", 8))}),
        "linear_qkv.bias, which its arguments do not ask for"),
    "integers": (spoil(NORM, lambda t: t.to(torch.int64)), "stores weights in torch.int64"),
    "a scalar": (spoil(NORM, lambda t: torch.tensor(1.0)), r"has shape \[\]"),
    "a matrix": (spoil(NORM, lambda t: t[None].clone()), "has shape"),
    "a tensor too many": (lambda s: s.update({"model.x.weight": torch.ones(2)}), "left over"),
    "experts": (lambda s: s.update({"model.layers.0.mlp.experts.0.w": torch.ones(2)}), "MoE"),
    "megatron's name": (
        lambda s: s.update({"decoder.layers.0.x": torch.ones(2)}), "left over"),
    "one missing": (lambda s: s.pop("model.layers.0.self_attn.k_proj.weight"), "no tensor"),
    "a gate of another width": (
        spoil("model.layers.0.mlp.gate_proj.weight", lambda t: t[:, :8].clone()),
        "do not fit together"),
    "k and v that differ": (
        spoil("model.layers.0.self_attn.v_proj.weight", lambda t: t[:4].clone()), "rows for each"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(change, message, tmp_path):
    refused(hugging_face.save(tmp_path / "hf", "llama", change=change), message)


def test_an_output_layer_that_is_not_the_tied_embedding(tmp_path):
    def change(stored):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1

    refused(hugging_face.save(tmp_path / "hf", "qwen2", change=change), "lm_head is not the word")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nan_weights(name, tmp_path):
    def change(stored):
        next(iter(stored.values()))[0, 0] = float("nan")

    folder = hugging_face.save(tmp_path / "hf", name, change=change)
    with pytest.raises(UserError, match="has NaN or infinite values"):
        load_language_model(folder, None)


def test_weights_in_pickles_are_refused(tmp_path):
    folder = hugging_face.save(tmp_path / "hf", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"weights in pickles \(\*\.bin\) are not read, save them as safetensors")


def test_a_folder_has_no_iterations(tmp_path):
    refused(hugging_face.save(tmp_path / "hf", "llama"), "has no iterations", iteration=3)


def test_the_command_line_refuses_in_one_line(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "llama", hidden_act="relu")
    assert main(["import-hf", str(folder), str(tmp_path / "c")]) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "hidden_act" in captured.err
    assert checkpoints.TRACKER not in str(list(tmp_path.iterdir()))
