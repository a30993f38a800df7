"""The same sentence has the same certified radius, whichever program wrote the model's folder."""

from __future__ import annotations

import json
import shutil

import checkpoints
import foreign_folders
import hugging_face
import pytest
import torch
import yaml
from foreign_folders import DATA

from lirpa_megatron.checkpoint.hugging_face_import import import_hugging_face
from lirpa_megatron.checkpoint.language_model import load_language_model
from lirpa_megatron.cli.commands import main

pytestmark = pytest.mark.usefixtures("session")

WORDS = ["[UNK]", *(f"w{i}" for i in range(1, hugging_face.WORDS))]


@pytest.fixture(scope="module")
def folders(session, tmp_path_factory):
    """Format -> folder of one GPT-2, written by Megatron's own writer or by hand."""
    root = tmp_path_factory.mktemp("formats")
    found = {"Hugging Face": hugging_face.save(root / "hf", "gpt2")}
    found["torch_dist"] = root / "torch_dist"
    import_hugging_face(found["Hugging Face"], root / "torch_dist")
    written = next((root / "torch_dist").glob("*/.metadata")).parent
    state = dict(load_language_model(found["Hugging Face"], None)[1].named_parameters())
    args = checkpoints.arguments(
        ffn_hidden_size=4 * hugging_face.HIDDEN, max_position_embeddings=hugging_face.LENGTH,
        seq_length=hugging_face.LENGTH, bias_gelu_fusion=True, add_qkv_bias=False,
    )
    for tp, pp in ((1, 1), (2, 2)):
        name = f"mp_rank, TP={tp} and PP={pp}"
        found[name] = root / f"legacy{tp}"
        checkpoints.save_legacy(state, found[name], args, tp, pp, fused=tp == 2)
    found["FSDP"] = root / "fsdp"
    foreign_folders.fsdp(root / "fsdp", state, args)

    model = foreign_folders.provider(
        "stacked", ffn_hidden_size=4 * hugging_face.HIDDEN, seq_length=hugging_face.LENGTH,
        bias_activation_fusion=True, add_qkv_bias=False,
    )
    found["Megatron-Bridge"] = root / "bridge"
    shutil.copytree(written, root / "bridge" / DATA)
    foreign_folders.without_arguments(root / "bridge" / DATA)
    (root / "bridge" / checkpoints.TRACKER).write_text("10")
    content = {"model": model, "train": {}}
    (root / "bridge" / DATA / "run_config.yaml").write_text(yaml.safe_dump(content))

    found["NeMo"] = root / "nemo"
    shutil.copytree(written, root / "nemo" / "weights")
    foreign_folders.without_arguments(root / "nemo" / "weights")
    (root / "nemo" / "context").mkdir()
    content = foreign_folders.nemo_context("base.GPT", model)
    (root / "nemo" / "context" / "model.yaml").write_text(yaml.safe_dump(content))

    args.hybrid_layer_pattern = "*-*-"
    found["Hybrid"] = root / "hybrid"
    foreign_folders.hybrid(root / "hybrid", state, args)
    return found


def result(folder, data, capfd):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    arguments = ["verify", "--load", folder, "--data", data, "--question", "radius",
                 "--tolerance", "0.3", "--attack-steps", "0"]
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capfd.readouterr().out)


def test_all_formats_of_one_model_give_a_sentence_the_same_radius(folders, tmp_path, capfd):
    (tmp_path / "d.jsonl").write_text('{"sentence": "w3 w7 w5"}\n')
    found = {name: result(folder, tmp_path / "d.jsonl", capfd)
             for name, folder in folders.items()}
    assert len(found) == 8
    wanted = found["torch_dist"]
    assert wanted["certified_radius"] > 0 and wanted["tokens"] == ["w3", "w7", "w5"]
    for name, got in found.items():
        for key in ("certified_radius", "predicted", "clean_margin", "tokenizer"):
            assert got[key] == wanted[key], (name, key)


def test_all_formats_of_one_model_have_the_same_weights(folders):
    wanted = dict(load_language_model(folders["torch_dist"], None)[1].named_parameters())
    for name, folder in folders.items():
        state = dict(load_language_model(folder, None)[1].named_parameters())
        assert len(state) == len(wanted)
        for key, value in wanted.items():
            own = foreign_folders.hybrid_name(key, fused=False) if name == "Hybrid" else key
            assert torch.equal(state[own], value), (name, key)
