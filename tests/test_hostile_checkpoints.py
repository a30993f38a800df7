"""Checkpoints from a stranger: nothing in them runs, and what is wrong is one clear line."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import re
import shutil

import checkpoints
import pytest
import torch
import transformers
from checkpoints import refused
from torch.distributed.checkpoint.metadata import Metadata

from lirpa_megatron.checkpoint.language_model import load_language_model
from lirpa_megatron.checkpoint.reader import read_description
from lirpa_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("session")


@pytest.fixture(scope="module")
def state(session):
    """Whole parameters of the GPT case, in float32."""
    return checkpoints.whole_state("gpt", torch.float32)[0]


@pytest.fixture
def torch_dist(tmp_path):
    """A copy, to damage, of a checkpoint of dist_checkpointing with a `common.pt`."""
    return shutil.copytree(checkpoints.written()[0] / "bert", tmp_path / "checkpoint")


@pytest.fixture
def new_layout(tmp_path):
    """The same with the byte item of newer releases instead of `common.pt`."""
    return shutil.copytree(checkpoints.written()[0] / "stacked", tmp_path / "checkpoint")


def data(checkpoint):
    return checkpoint / f"iter_{checkpoints.ITERATION:07d}"


# What a hostile pickle would do when it is loaded the usual way.


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def system(marker):
    return Calls(os.system, f"touch {marker}")


def evaluated(marker):
    return Calls(eval, f"open({str(marker)!r}, 'w').close()")


def executed(marker):
    return Calls(exec, f"open({str(marker)!r}, 'w').close()")


def opened(marker):
    return Calls(open, str(marker), "w")


PAYLOADS = {
    "system": (system, r"posix\.system"), "eval": (evaluated, r"builtins\.eval"),
    "exec": (executed, r"builtins\.exec"), "open": (opened, r"_?io\.open"),
}


@pytest.fixture
def marker(tmp_path):
    """A file that a payload makes if it runs; the test fails if it is there at the end."""
    path = tmp_path / "it_ran"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("make, _", PAYLOADS.values(), ids=PAYLOADS)
def test_the_payloads_work(make, _, tmp_path):
    path = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(make(path)))
    assert path.exists()


@pytest.mark.parametrize("make, name", PAYLOADS.values(), ids=PAYLOADS)
def test_metadata_does_not_run(torch_dist, marker, make, name):
    checkpoints.rewrite_metadata(
        data(torch_dist), lambda m: setattr(m, "planner_data", make(marker))
    )
    refused(torch_dist, rf"\.metadata is refused: its pickle names {name}")


@dataclasses.dataclass
class MCoreMetadata(Metadata):
    """What megatron-core 0.15 pickles in the place of torch's Metadata."""

    mcore_data: dict | None = None


@pytest.fixture
def as_0_15(monkeypatch):
    """Makes the class be pickled under megatron-core's name of it."""
    from megatron.core.dist_checkpointing.strategies import torch as theirs

    monkeypatch.setattr(theirs, "MCoreMetadata", MCoreMetadata, raising=False)
    monkeypatch.setattr(MCoreMetadata, "__module__", theirs.__name__)

    def save(directory, notes):
        old = pickle.loads((directory / ".metadata").read_bytes())
        new = MCoreMetadata({})
        vars(new).update(vars(old), mcore_data=notes)
        (directory / ".metadata").write_bytes(pickle.dumps(new))

    return save


def test_the_metadata_of_0_15_is_read_without_its_notes(torch_dist, as_0_15):
    before, _ = checkpoints.load_logits(torch_dist)
    as_0_15(data(torch_dist), {"optimizer.x": {"nd_reformulated_orig_global_shape": (3, 4)}})
    assert torch.equal(checkpoints.load_logits(torch_dist)[0], before)


@pytest.mark.parametrize("make, name", PAYLOADS.values(), ids=PAYLOADS)
def test_the_notes_of_0_15_do_not_run(torch_dist, as_0_15, marker, make, name):
    as_0_15(data(torch_dist), {"optimizer.x": make(marker)})
    refused(torch_dist, rf"\.metadata is refused: its pickle names {name}")


def save_common(checkpoint, change):
    path = data(checkpoint) / "common.pt"
    common = torch.load(path, weights_only=False)  # our own
    change(common)
    torch.save(common, path)


@pytest.mark.parametrize("make, name", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("where", ["beside the arguments", "in the arguments"])
def test_common_state_does_not_run(torch_dist, marker, make, name, where):
    def put(common):
        target = common if where == "beside the arguments" else vars(common["args"])
        target["hidden_size"] = make(marker)

    save_common(torch_dist, put)
    refused(torch_dist, rf"common\.pt is refused: its pickle names {name}")


def replace_item(checkpoint, content):
    """Puts other bytes where the item `common_state` is."""
    path = data(checkpoint) / "__9_0.distcp"
    path.write_bytes(content)

    def point(metadata):
        for index, info in metadata.storage_data.items():
            if index.fqn.startswith("common_state"):
                info.relative_path, info.offset, info.length = path.name, 0, len(content)

    checkpoints.rewrite_metadata(data(checkpoint), point)


@pytest.mark.parametrize("make, name", PAYLOADS.values(), ids=PAYLOADS)
def test_the_byte_item_does_not_run(new_layout, marker, make, name):
    stream = io.BytesIO()
    torch.save([{"args": make(marker), "checkpoint_version": 3.0}], stream)
    replace_item(new_layout, stream.getvalue())
    refused(new_layout, rf"common_state/shard_0_1 is refused: its pickle names {name}")


def test_a_plain_pickle_as_byte_item_does_not_run(new_layout, marker):
    replace_item(new_layout, pickle.dumps(system(marker)))
    refused(new_layout, "common_state/shard_0_1 is corrupt")


def test_a_tensors_data_does_not_run(torch_dist, marker):
    stream = io.BytesIO()
    torch.save(system(marker), stream)
    for path in data(torch_dist).glob("*.distcp"):
        path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"tensor .* cannot be read") as caught:
        load_language_model(torch_dist, None)
    assert "\n" not in str(caught.value)


PLACES = {
    "arguments": lambda c, p: setattr(c["args"], "rope_type", p),
    "model": lambda c, p: c["model"].update({"decoder.extra": p}),
    "extra state": lambda c, p: c["model"].update({"decoder.layers.0._extra_state": p}),
    "optimizer": lambda c, p: c["optimizer"]["state"].update({7: p}),
    "random states": lambda c, p: c["rng_state"][0].update({"np_rng_state": p}),
    "other items": lambda c, p: c.update({"rerun_state_machine": [p]}),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("put", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("payload", ["system", "eval"])
def test_rank_files_do_not_run(state, tmp_path, marker, put, rank, payload):
    make, name = PAYLOADS[payload]

    def change(content, file_rank, stage):
        if file_rank == rank:
            put(content, make(marker))

    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), tp=2, change=change)
    refused(tmp_path / "c", rf"mp_rank_0{rank}/model_optim_rng\.pt is refused: .* names {name}")


def test_a_plain_pickle_as_rank_file_does_not_run(state, tmp_path, marker):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments())
    (data(tmp_path / "c") / "mp_rank_00" / "model_optim_rng.pt").write_bytes(
        pickle.dumps(system(marker))
    )
    refused(tmp_path / "c", r"model_optim_rng\.pt is corrupt")


def test_what_others_allow_is_not_allowed_here(torch_dist, marker):
    """A process may have told torch.load to trust a function; a checkpoint cannot call it."""
    save_common(torch_dist, lambda common: common.update(args=system(marker)))
    with torch.serialization.safe_globals([(os.system, "posix.system")]):
        refused(torch_dist, r"names posix\.system")
        assert (os.system, "posix.system") in torch.serialization.get_safe_globals()


def test_enums_of_unknown_modules_are_refused_by_name(torch_dist):
    save_common(torch_dist, lambda c: setattr(c["args"], "other", argparse.ArgumentParser))
    refused(torch_dist, r"names argparse\.ArgumentParser")


# Damage.

CUTS = {"empty": 0.0, "half": 0.5, "almost whole": 0.97}


@pytest.mark.parametrize("part", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_truncated_files(torch_dist, name, part):
    path = data(torch_dist) / name
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(torch_dist, rf"{re.escape(name)} is corrupt")


@pytest.mark.parametrize("part", CUTS.values(), ids=CUTS)
def test_truncated_rank_files(state, tmp_path, part):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), tp=2)
    path = data(tmp_path / "c") / "mp_rank_01" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    refused(tmp_path / "c", r"mp_rank_01/model_optim_rng\.pt is corrupt")


@pytest.mark.parametrize("said, message", [
    (None, r"metadata\.json does not exist"),
    ("{", r"metadata\.json is corrupt"),
    ("[]", r"metadata\.json is corrupt"),
    ({"sharded_backend": "zarr", "sharded_backend_version": 1}, "format 'zarr', not torch_dist"),
    ({"sharded_backend": "torch_dist", "sharded_backend_version": 2}, "newer than the known"),
])
def test_other_layouts(torch_dist, said, message):
    path = data(torch_dist) / "metadata.json"
    path.unlink()
    if said is not None:
        path.write_text(said if isinstance(said, str) else json.dumps(said))
    refused(torch_dist, message)


def test_missing_shards(torch_dist):
    (data(torch_dist) / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"tensor .* cannot be read"):
        load_language_model(torch_dist, None)


def test_a_missing_rank_file(state, tmp_path):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), tp=2, pp=2)
    shutil.rmtree(data(tmp_path / "c") / "mp_rank_01_001")
    refused(tmp_path / "c", "lacks the file of tensor-parallel rank 1 of 2 in .* stage 1 of 2")


def pop(name):
    return lambda m: m.state_dict_metadata.pop(name)


def rename(old, new):
    def change(metadata):
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
    return change


def grow(metadata):
    metadata.state_dict_metadata["encoder.final_layernorm.weight"].size = torch.Size([17])


def malform(metadata):
    metadata.state_dict_metadata["encoder.final_layernorm.weight"] = "nothing"


@pytest.mark.parametrize("change, message", [
    (pop("pooler.dense.bias"), r"has no tensor pooler\.dense\.bias"),
    (pop("encoder.layers.mlp.linear_fc2.weight"), r"has no tensor encoder\.layers\.0\.mlp.*fc2"),
    (pop("embedding.word_embeddings.weight"), "has no tensor embedding.word_embeddings.weight"),
    (rename("pooler.dense.bias", "pooler.dense.shift"), r"has no tensor pooler\.dense\.bias"),
    (rename("lm_head.dense.bias", "encoder.layers.mlp.router.weight"), "MoE .* not supported"),
    (rename("lm_head.dense.bias", "decoder.layers.mlp.linear_fc1.bias"), "T5 models"),
    (rename("lm_head.dense.bias", "mtp.layers.0.eh_proj.weight"), "multi-token prediction"),
    (grow, r"final_layernorm\.weight .* has shape \[17\], its arguments ask for \[16\]"),
    (malform, r"\.metadata is corrupt \(ValueError: the entry of encoder\.final_layernorm"),
])
def test_other_tensors(torch_dist, change, message):
    checkpoints.rewrite_metadata(data(torch_dist), change)
    refused(torch_dist, message)


def set_nan(content, rank, stage):
    if rank == 1:
        content["model"]["decoder.layers.1.mlp.linear_fc2.weight"][0, 0] = float("nan")


def test_nan_weights(state, tmp_path):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), tp=2, change=set_nan)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.linear_fc2\.weight in .* has NaN"):
        load_language_model(tmp_path / "c", None)


LEGACY = {
    "virtual stages": (lambda c: c.update(model0=c.pop("model")), "virtual pipeline stages"),
    "legacy models": (lambda c: c.update(model={"language_model": {}}), r"legacy \(not core\)"),
    "no model": (lambda c: c.pop("model"), "holds no model"),
    "not a tensor": (lambda c: c["model"].update({"decoder.x": 3}),
                     "'decoder.x' is not a tensor's"),
    "left over": (lambda c: c["model"].update({"decoder.x": torch.ones(3)}),
                  r"has the tensor decoder\.x, which its arguments do not ask for \(1 left over"),
    "integers": (lambda c: c["model"].update(
        {"decoder.final_layernorm.bias": torch.ones(transformers.HIDDEN, dtype=torch.int64)}),
        r"stores weights in torch\.int64, which is not supported"),
    "fp8 weights": (lambda c: c["model"].update(
        {"decoder.final_layernorm.bias":
         torch.ones(transformers.HIDDEN).to(torch.float8_e4m3fn)}),
        r"stores weights in torch\.float8_e4m3fn, which is not supported"),
    "layer numbers": (lambda c: c["model"].update(
        {"decoder.layers.9.x": torch.ones(3)}), "layers are not numbered from 0"),
    "checkpoint version": (lambda c: c.update(checkpoint_version=4.0), "checkpoint_version 4.0"),
    "old QKV order": (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version 1.0"),
    "list": (lambda c: c.update(args=[1, 2]), "its arguments are malformed"),
}


@pytest.mark.parametrize("change, message", LEGACY.values(), ids=LEGACY)
def test_other_rank_files(state, tmp_path, change, message):
    checkpoints.save_legacy(
        state, tmp_path / "c", checkpoints.arguments(), change=lambda c, r, s: change(c)
    )
    refused(tmp_path / "c", message)


def test_ranks_that_differ_in_what_is_not_sharded(state, tmp_path):
    def change(content, rank, stage):
        content["model"]["decoder.final_layernorm.weight"] += rank

    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), tp=2, change=change)
    with pytest.raises(UserError, match="final_layernorm.weight .* ranks 0 and 1, though"):
        load_language_model(tmp_path / "c", None)


def test_a_tied_output_layer_that_is_not_the_embedding(state, tmp_path):
    def change(content, rank, stage):
        if stage == 1:
            content["model"]["output_layer.weight"][3] += 1

    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments(), pp=2, change=change)
    refused(tmp_path / "c", "output layer of the last pipeline stage is not the word embeddings")


def test_a_language_model_is_not_a_network(state, tmp_path):
    checkpoints.save_legacy(state, tmp_path / "c", checkpoints.arguments())
    for checkpoint in (tmp_path / "c", checkpoints.written()[0] / "bert",
                       checkpoints.written()[0] / "stacked"):
        with pytest.raises(UserError, match="does not hold a network .* model of Megatron-LM"):
            read_description(checkpoint)
