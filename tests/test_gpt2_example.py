"""The example of GPT-2: certified from a folder with the files that a user has."""

import argparse
import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
from ranks import pool

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "gpt2"
SIZES = dict(layers=2, hidden=32, heads=4, words=600, positions=32)


def program(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small folder with the files of GPT-2's."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    program("random_gpt2").write(folder, argparse.Namespace(**SIZES))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    return folder


def printed(folder, **changes):
    """What the demo prints (runs on a rank)."""
    settings = dict(folder=folder, prompt="e t a", layers="2", eps=[1e-4, 1e-2, 3.0], rivals=4)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program("demo").certify(argparse.Namespace(**{**settings, **changes}))
    return out.getvalue()


@pytest.mark.parametrize("layers", [pytest.param("1", marks=pytest.mark.slow), "all"])
def test_gpt2_is_certified_and_two_ranks_say_the_same(gpt2, layers):
    (alone,) = pool(1).run(printed, gpt2, layers=layers)
    first, second = pool(2).run(printed, gpt2, layers=layers)
    assert alone.startswith("GPT, 2 layers of width 32; TP=1") and second == ""
    margins, others = (
        [float(m) for m in re.findall(r"^\| [\d.]+ \| (?:at least )?(\S+) \|", text, re.MULTILINE)]
        for text in (alone, first)
    )
    assert others == pytest.approx(margins, rel=1e-3)  # four digits are printed, of float32
    clean, near, far, too_far = margins
    assert clean > near > far > 0 > too_far
    assert re.findall(r"(?:not )?certified", alone) == ["certified"] * 2 + ["not certified"]


def test_a_folder_without_a_tokenizer_is_one_line(gpt2, tmp_path):
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    (outcome,) = pool(1).outcomes(printed, tmp_path)
    assert outcome.error == "UserError"
    assert outcome.message.endswith("has no tokenizer.json, nor vocab.json and merges.txt")
