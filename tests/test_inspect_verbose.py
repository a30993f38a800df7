"""inspect --verbose: a line for each key that is read and ignored."""

import checkpoints
import foreign_folders
import hugging_face
import pytest

from lirpa_megatron.cli.commands import main

pytestmark = pytest.mark.usefixtures("session")


def lines(folder, capfd, *options):
    """Lines of the list, without its first."""
    assert main(["inspect", str(folder), "--verbose", *options]) == 0
    printed = capfd.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(printed) if line.startswith("Read and ignored, in"))
    return printed[first], {line.split()[0]: line for line in printed[first + 1 :]}


def test_fields_of_run_config_that_are_neutral_and_sections_that_are_not_looked_at(
    tmp_path, capfd
):
    model = foreign_folders.provider("indexed", hf_model_id="a/b", timers=None)
    foreign_folders.bridge(tmp_path / "c", "indexed", model, logger={"log_interval": 1})
    title, found = lines(tmp_path / "c", capfd)
    assert "run_config.yaml" in title
    assert "'a/b' (known to be neutral)" in found["hf_model_id"]
    assert "known to be neutral" in found["attention_backend"]
    for section in ("train", "checkpoint", "tokenizer", "logger"):
        assert "not part of the model, not looked at" in found[section]
    for read in ("num_layers", "rotary_base", "activation_func", "model", "peft"):
        assert read not in found


def test_fields_of_a_hybrid_provider(tmp_path, capfd):
    model = foreign_folders.hybrid_provider()
    foreign_folders.bridge(tmp_path / "c", "hybrid", model)
    _, found = lines(tmp_path / "c", capfd)
    assert "128 (known to be neutral)" in found["mamba_chunk_size"]
    assert "hybrid_layer_pattern" not in found


def test_fields_of_nemo(tmp_path, capfd):
    foreign_folders.nemo(tmp_path / "c", "indexed")
    title, found = lines(tmp_path / "c", capfd)
    assert "context/model.yaml" in title and "known to be neutral" in found["forward_step_fn"]
    assert "not looked at" in found["optim"] and "not looked at" in found["tokenizer"]
    assert "config" not in found and "model_transform" not in found


def test_keys_of_hugging_face(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "gpt2")
    title, found = lines(folder, capfd)
    assert "config.json" in title and "known to be neutral" in found["model_type"]
    assert "n_layer" not in found


def test_arguments_of_megatron_that_no_model_is_built_from(tmp_path, capfd):
    state, _ = checkpoints.whole_state("gpt")
    args = checkpoints.arguments(lr=1e-4, **{"a\nline": "x" * 1000})
    checkpoints.save_legacy(state, tmp_path / "c", args)
    title, found = lines(tmp_path / "c", capfd)
    assert "Megatron-LM's arguments" in title
    assert found["lr"].endswith("0.0001 (no model is built from it)")
    assert "'a\\nline'" in found and len(found["'a\\nline'"]) < 200
    assert "num_layers" not in found and "num_experts" not in found
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "ignored" not in capfd.readouterr().out
