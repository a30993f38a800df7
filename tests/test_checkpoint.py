"""Checkpoints: written whole or not at all, read back exactly, and never trusted."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from releases import WRITES_COMMON_ITEM
from small_networks import save, stack

from lirpa_megatron.checkpoint.reader import load_network, read_description
from lirpa_megatron.checkpoint.tensors import TensorFile
from lirpa_megatron.checkpoint.writer import save_network
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import Network
from lirpa_megatron.networks.onnx_import import read_onnx
from lirpa_megatron.parallel import runtime

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return read_onnx(save(stack([4, 8, 8, 3]), tmp_path_factory.mktemp("onnx") / "net.onnx"))


@pytest.fixture(scope="module")
def written(imported, tmp_path_factory):
    """A checkpoint written by one process."""
    out = tmp_path_factory.mktemp("checkpoint") / "net"
    network = Network.from_weights(imported.description, imported.weights)
    with runtime.session():
        save_network(imported.description, network, out)
    return out


@pytest.fixture
def checkpoint(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "net")


def rewrite_metadata(checkpoint, change):
    path = checkpoint / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def refused(checkpoint, message):
    with pytest.raises(UserError, match=message) as caught:
        load_network(checkpoint, None)
    assert "\n" not in str(caught.value)


def test_layout_is_megatrons(written):
    assert (written / TRACKER).read_text().strip() == "release"
    names = {path.name for path in (written / "release").iterdir()}
    assert {".metadata", "metadata.json", "common.pt", "__0_0.distcp"} <= names
    assert not [p for p in written.parent.iterdir() if p != written]  # no leftovers


def test_weights_come_back_bit_by_bit(imported, written):
    description, model = load_network(written, None)
    assert description == imported.description
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, imported.weights[name])
        assert not parameter.requires_grad


def test_the_dtype_can_be_chosen(written):
    _, model = load_network(written, None, torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_any_block_of_a_tensor_can_be_read(imported, written):
    full = imported.weights["layers.fc2.weight"]
    block = TensorFile(written / "release").read(
        "layers.fc2.weight", (3, 2), (4, 5), torch.float32
    )
    assert torch.equal(block, full[3:7, 2:7])


def test_an_existing_checkpoint_is_replaced_only_by_force(imported, checkpoint):
    network = Network.from_weights(imported.description, imported.weights)
    with runtime.session():
        with pytest.raises(UserError, match="exists already.*--force"):
            save_network(imported.description, network, checkpoint)
        save_network(imported.description, network, checkpoint, force=True)
    assert read_description(checkpoint) == imported.description


def test_force_does_not_replace_what_is_not_a_checkpoint(imported, tmp_path):
    network = Network.from_weights(imported.description, imported.weights)
    (tmp_path / "thesis.txt").write_text("precious")
    with runtime.session(), pytest.raises(UserError, match="not a checkpoint"):
        save_network(imported.description, network, tmp_path, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_write_leaves_nothing(imported, tmp_path, monkeypatch):
    network = Network.from_weights(imported.description, imported.weights)
    monkeypatch.setattr(
        ShardedTensor, "from_rank_offsets", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    with runtime.session(), pytest.raises(UserError, match="cannot write .*: full"):
        save_network(imported.description, network, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


# Hostile files: a pickle that calls os.system when it is loaded the usual way.


class Hostile:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_hostile_metadata_does_not_run(checkpoint, tmp_path):
    marker = tmp_path / "it ran".replace(" ", "_")
    payload = pickle.dumps(Hostile(marker))
    pickle.loads(payload)
    assert marker.exists()  # the payload works
    marker.unlink()
    (checkpoint / "release" / ".metadata").write_bytes(payload)
    refused(checkpoint, r"\.metadata is refused: its pickle names posix\.system")
    assert not marker.exists()


def test_hostile_metadata_inside_an_allowed_class_does_not_run(checkpoint, tmp_path):
    marker = tmp_path / "it_ran"
    rewrite_metadata(checkpoint, lambda m: setattr(m, "planner_data", Hostile(marker)))
    refused(checkpoint, r"names posix\.system")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_no_builtin_is_allowed_in_metadata(checkpoint, name):
    path = checkpoint / "release" / ".metadata"
    path.write_bytes(b"cbuiltins\n" + name.encode() + b"\n.")
    refused(checkpoint, rf"names builtins\.{name}")


def test_hostile_common_state_does_not_run(checkpoint, tmp_path):
    marker = tmp_path / "it_ran"
    path = checkpoint / "release" / "common.pt"
    torch.save({"network": Hostile(marker)}, path)
    refused(checkpoint, r"common\.pt is refused: its pickle names posix\.system")
    assert not marker.exists()


def test_hostile_data_file_does_not_run(checkpoint, tmp_path):
    marker = tmp_path / "it_ran"
    payload = tmp_path / "payload.pt"
    torch.save(Hostile(marker), payload)
    for path in (checkpoint / "release").glob("*.distcp"):
        path.write_bytes(payload.read_bytes())
    refused(checkpoint, "cannot be read")
    assert not marker.exists()


def test_a_data_file_outside_the_checkpoint_is_refused(checkpoint):
    def redirect(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../../__0_0.distcp"

    rewrite_metadata(checkpoint, redirect)
    refused(checkpoint, "is not a data file of the checkpoint")


# Damage.


def test_no_directory(tmp_path):
    refused(tmp_path / "nothing", "nothing is not a directory")


def test_no_tracker(checkpoint):
    (checkpoint / TRACKER).unlink()
    refused(checkpoint, f"not a Megatron checkpoint: it has no {TRACKER}")


@pytest.mark.parametrize("word", ["", "../elsewhere", "10"])
def test_tracker_that_names_nothing(checkpoint, word):
    (checkpoint / TRACKER).write_text(word)
    refused(checkpoint, "tracker")


def test_missing_metadata(checkpoint):
    (checkpoint / "release" / ".metadata").unlink()
    refused(checkpoint, r"\.metadata does not exist")


def test_missing_common_file(checkpoint):
    """Releases from 0.19 on store what it says a second time, in an item."""
    expected = read_description(checkpoint)
    (checkpoint / "release" / "common.pt").unlink()
    if WRITES_COMMON_ITEM:
        assert read_description(checkpoint) == expected
    else:
        refused(checkpoint, r"common\.pt does not exist")


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_truncated_file(checkpoint, name, part):
    path = checkpoint / "release" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    refused(checkpoint, f"{name} is corrupt")


def test_truncated_data_file(checkpoint):
    for path in (checkpoint / "release").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    refused(checkpoint, "tensor layers.fc1.weight in .* cannot be read")


def test_missing_tensor(checkpoint):
    rewrite_metadata(checkpoint, lambda m: m.state_dict_metadata.pop("layers.fc2.bias"))
    refused(checkpoint, "has no tensor layers.fc2.bias")


def test_other_shape(checkpoint):
    def grow(metadata):
        metadata.state_dict_metadata["layers.fc2.weight"].size = torch.Size([9, 8])

    rewrite_metadata(checkpoint, grow)
    refused(checkpoint, r"layers.fc2.weight .* has shape \[9, 8\], its network needs \[8, 8\]")


def test_part_of_a_tensor_that_is_not_stored(checkpoint):
    def shrink(metadata):
        metadata.state_dict_metadata["layers.fc2.weight"].chunks[0].sizes = torch.Size([7, 8])

    rewrite_metadata(checkpoint, shrink)
    refused(checkpoint, "layers.fc2.weight .* is incomplete")


def test_nan_weights_are_named(imported, tmp_path):
    weights = {name: value.clone() for name, value in imported.weights.items()}
    weights["layers.fc3.weight"][1, 2] = float("nan")
    with runtime.session():
        network = Network.from_weights(imported.description, weights)
        save_network(imported.description, network, tmp_path / "net")
    refused(tmp_path / "net", "layers.fc3.weight in .* has NaN")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="other"), "no lirpa_megatron network description"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d.update(layers=[]), "no layers"),
        (lambda d: d["layers"][0].update(n_in="4"), "malformed"),
        (lambda d: d["layers"][0].update(name="keys"), "'keys' .* is malformed"),
        (lambda d: d["layers"][1].update(inputs=["fc3"]), "'relu1' .* is malformed"),
        (lambda d: d["layers"][0].update(n_in=10**30), "'fc1' .* is malformed"),
    ],
)
def test_malformed_descriptions_are_refused(checkpoint, change, message):
    path = checkpoint / "release" / "common.pt"
    common = torch.load(path, weights_only=True)
    change(common["network"])
    torch.save(common, path)
    refused(checkpoint, message)


def test_common_state_is_plain_data(written):
    with zipfile.ZipFile(written / "release" / "common.pt") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"lirpa_megatron.network" in archive.read(name)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(
        written / "release" / "common.pt"
    ) == []
