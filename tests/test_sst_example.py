"""The sentiment example: its training, and the checkpoint that is committed with it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from releases import WRITES_COMMON_ITEM
from torch.distributed.checkpoint import FileSystemReader

from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "sst"
DATA = ROOT.parent / "shared" / "data" / "sst"
LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
SMALL = ("--epochs 8 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --seq-length 12 "
         "--global-batch-size 16 --lr 1e-2 --decoupled-lr 5e-2 --init-method-std 0.1 "
         "--embedding-init-method-std 0.1 --adversarial-eps 0.01 --word-dropout 0").split()


def _train_on_two_ranks(*options):
    """What train.py prints under torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, *LAUNCH, str(EXAMPLE / "train.py"), *map(str, options)],
        capture_output=True, text=True, env=environment, timeout=1200,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def train_here(monkeypatch, capsys):
    """Runs train.py in this process, one rank; returns what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    module = importlib.import_module("train")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
        with runtime.session():
            module.main()
        return capsys.readouterr().out

    return run


def _losses(printed):
    return [float(loss) for loss in re.findall(r"epoch \d+: loss (\d+\.\d+)", printed)]


def _tensors(checkpoint):
    """The directory of the data, Megatron-LM's arguments, and the shape of each tensor."""
    iteration = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    directory = checkpoint / f"iter_{iteration:07d}"
    if WRITES_COMMON_ITEM:
        common = dist_checkpointing.load_common_state_dict(str(directory))
    else:
        with torch.serialization.safe_globals([Namespace]):  # plain data otherwise
            common = torch.load(directory / "common.pt", weights_only=True)
    assert common["iteration"] == iteration and common["checkpoint_version"] == 3.0
    stored = FileSystemReader(directory).read_metadata().state_dict_metadata
    shapes = {name: tuple(meta.size) for name, meta in stored.items() if hasattr(meta, "size")}
    return directory, common["args"], shapes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences whose class a single word decides."""
    folder = tmp_path_factory.mktemp("sst")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 128), ("dev", 32)):
        records = []
        for _ in range(count):
            label = int(torch.randint(2, (), generator=generator))
            words = ["A", ("bad", "good")[label], "film", "."]
            order = torch.randperm(4, generator=generator).tolist()
            records.append({"sentence": " ".join(words[i] for i in order), "label": label})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_learns_and_saves_a_checkpoint_in_megatrons_layout(
    train_here, data, tmp_path, size
):
    train = train_here if size == 1 else _train_on_two_ranks
    losses = _losses(train("--data", data, "--save", tmp_path / "out", *SMALL))
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0], losses
    words = (tmp_path / "vocab.txt").read_text().splitlines()
    assert words[:3] == ["[PAD]", "[UNK]", "[CLS]"] and set(words[3:]) == {
        "a", "good", "bad", "film", "."}

    directory, args, shapes = _tensors(tmp_path / "out")
    for name in ("metadata.json", ".metadata", *(f"__{rank}_0.distcp" for rank in range(size))):
        assert (directory / name).is_file(), name
    assert (args.num_layers, args.hidden_size, args.tensor_model_parallel_size) == (2, 16, size)
    assert args.bert_binary_head and not args.untie_embeddings_and_output_weights
    assert (args.vocab_size, args.padded_vocab_size) == (8, 128 * size)
    assert not any(isinstance(value, Path) for value in vars(args).values())
    assert shapes["embedding.word_embeddings.weight"] == (128 * size, 16)
    assert shapes["encoder.layers.mlp.linear_fc1.weight"] == (2, 32, 16)  # both layers in one
    assert shapes["encoder.layers.self_attention.linear_qkv.layer_norm_weight"] == (2, 16)
    assert shapes["binary_head.weight"] == (2, 16)


def test_missing_data_are_one_clear_line(train_here, tmp_path):
    with pytest.raises(UserError, match="train.jsonl .*--data") as caught:
        train_here("--data", tmp_path / "nothing", "--save", tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_bad_options_are_refused_before_training(train_here, data, tmp_path):
    with pytest.raises(UserError, match="exists already.*--save"):
        train_here("--data", data, "--save", tmp_path)
    with pytest.raises(UserError, match="--hidden-size 10 .* --num-attention-heads 4"):
        train_here("--data", data, "--save", tmp_path / "out", "--hidden-size", 10)
    assert not list(tmp_path.iterdir())


def test_the_committed_checkpoint_and_sentences_go_together():
    words = (EXAMPLE / "vocab.txt").read_text(encoding="utf-8").splitlines()
    _, args, shapes = _tensors(EXAMPLE / "checkpoint")
    assert args.vocab_size == len(words) == len(set(words)) and words[0] == "[PAD]"
    assert args.tensor_model_parallel_size == 2
    assert shapes["embedding.word_embeddings.weight"] == (args.padded_vocab_size, args.hidden_size)
    records = [json.loads(line) for line in (EXAMPLE / "sentences.jsonl").open()]
    assert len({record["id"] for record in records}) == len(records) >= 30
    assert sum(record["label"] for record in records) == len(records) / 2
    for record in records:
        spoken = record["sentence"].lower().split()
        assert len(spoken) == len(record["candidates"]) and 4 <= len(spoken) <= 9
        for word, candidates in zip(spoken, record["candidates"], strict=True):
            assert not candidates or (word in candidates and set(candidates) <= set(words))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the SST sentences are not in ../shared/data/sst")
def test_training_on_sst_reaches_78_percent_on_two_ranks(tmp_path):
    printed = _train_on_two_ranks("--save", tmp_path / "out")
    (dev,) = re.findall(r"accuracy train [\d.]+, dev ([\d.]+)", printed)
    assert float(dev) >= 0.78
    assert (tmp_path / "vocab.txt").read_bytes() == (EXAMPLE / "vocab.txt").read_bytes()
