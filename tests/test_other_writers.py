"""Checkpoints of NeMo 2.0 and Megatron-FSDP: the function of the writer, not run."""

import os
import shutil

import checkpoints
import foreign_folders
import pytest
import torch
from checkpoints import refused

from lirpa_megatron.checkpoint.language_model import read_model_description
from lirpa_megatron.cli.commands import main

TOLERANCE = 1e-12  # float64 weights, the same forward

pytestmark = pytest.mark.usefixtures("session")


def same(got, want):
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


@pytest.mark.parametrize("name", foreign_folders.MODELS)
def test_a_folder_of_nemo_holds_the_writers_function(name, tmp_path, capfd):
    expected = foreign_folders.nemo(tmp_path / "c", name)
    got, description = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)
    assert description.stored.described_by == "context/model.yaml"
    assert main(["inspect", str(tmp_path / "c")]) == 0
    assert "context/model.yaml" in capfd.readouterr().out


def test_llama_31_of_nemo_scales_its_rotary_positions(tmp_path):
    foreign_folders.nemo(
        tmp_path / "c", "indexed", scale_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        old_context_len=8192, _target_="nemo.collections.llm.gpt.model.llama.Llama31Config8B",
    )
    description = read_model_description(tmp_path / "c")
    assert description.rope_scaling and description.rope_scaling_factor == 8.0


STRANGER = {"_target_": "os.system"}
NEMO = {
    "adapters": (dict(model_transform={"_target_": "nemo.collections.llm.peft.lora.LoRA"}), {},
                 "model_transform"),
    "a class of a stranger": (STRANGER, {}, "class os.system are not supported"),
    "a config of a stranger": ({}, STRANGER, "class os.system are not supported"),
    "Llama 4": ({}, dict(_target_="nemo.collections.llm.gpt.model.llama.Llama4Config"),
                "Llama4Config are not supported"),
    "no class": (dict(_target_=None), {}, "its model has no class"),
    "no class of the config": ({}, dict(_target_=1), "its config has no class"),
    "no config": (dict(config=3), {}, "has no section 'config'"),
    "a scale": ({}, dict(rope_scaling=True), "rope_scaling"),
    "a scale of Llama 3.1": ({}, dict(scale_factor=8.0), "field 'scale_factor' is not known"),
    "a newer field": ({}, dict(rotate_twice=True), "field 'rotate_twice' is not known"),
    "experts": ({}, dict(num_moe_experts=4), "num_moe_experts=4"),
    "a function of a stranger": ({}, dict(activation_func=STRANGER), "os.system"),
}


@pytest.mark.parametrize("model, settings, message", NEMO.values(), ids=NEMO)
def test_folders_of_nemo_that_are_refused(model, settings, message, tmp_path):
    foreign_folders.nemo(tmp_path / "c", "indexed", model, **settings)
    refused(tmp_path / "c", message)


def test_a_folder_of_nemo_without_its_context(tmp_path):
    foreign_folders.nemo(tmp_path / "c", "indexed")
    shutil.rmtree(tmp_path / "c" / "context")
    refused(tmp_path / "c", r"context/model\.yaml does not exist: it says which model")
    refused(tmp_path / "c", "has no iterations", iteration=10)


def test_objects_in_a_context_are_not_built(tmp_path):
    foreign_folders.nemo(tmp_path / "c", "indexed")
    path = tmp_path / "c" / "context" / "model.yaml"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    refused(tmp_path / "c", "is refused")
    assert not (tmp_path / "ran").exists()


# Megatron-FSDP.


@pytest.mark.parametrize("case", ["gpt", "llama"])
@pytest.mark.parametrize("prefix", ["model.module.", "model.", "model.module.module.", ""])
def test_fsdp_dtensor_holds_the_writers_function(case, prefix, tmp_path):
    state, expected = checkpoints.whole_state(case)
    args = checkpoints.arguments(**checkpoints.CASES[case][2])
    foreign_folders.fsdp(tmp_path / "c", state, args, prefix)
    got, description = checkpoints.load_logits(tmp_path / "c")
    same(got, expected)
    assert description.stored.format == "fsdp_dtensor"


def test_fsdp_dtensor_without_arguments_asks_for_them(tmp_path):
    state, _ = checkpoints.whole_state("gpt")
    foreign_folders.fsdp(tmp_path / "c", state, checkpoints.arguments(), keep=())
    refused(tmp_path / "c", "does not hold Megatron's arguments: give them with --model-config")


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_arguments_of_fsdp_dtensor_do_not_run(tmp_path):
    state, _ = checkpoints.whole_state("gpt")
    args = checkpoints.arguments(other=Hostile(tmp_path / "ran"))
    foreign_folders.fsdp(tmp_path / "c", state, args)
    refused(tmp_path / "c", r"item args is refused: its pickle names posix\.system")
    assert not (tmp_path / "ran").exists()


def test_the_metadata_of_fsdp_dtensor_does_not_run(tmp_path):
    state, _ = checkpoints.whole_state("gpt")
    foreign_folders.fsdp(tmp_path / "c", state, checkpoints.arguments())
    checkpoints.rewrite_metadata(
        tmp_path / "c" / foreign_folders.DATA,
        lambda m: setattr(m, "planner_data", Hostile(tmp_path / "ran")),
    )
    refused(tmp_path / "c", r"names posix\.system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("decoder.layers.1.mlp.linear_fc2.weight"), "has no tensor"),
    (lambda s: s.update({"decoder.layers.9.x": torch.ones(2)}), "left over"),
    (lambda s: s.update({"decoder.layers.0.mlp.router.weight": torch.ones(2)}), "MoE"),
])
def test_other_tensors_of_fsdp_dtensor(change, message, tmp_path):
    state, _ = checkpoints.whole_state("gpt")
    change(state)
    foreign_folders.fsdp(tmp_path / "c", state, checkpoints.arguments())
    refused(tmp_path / "c", message)
