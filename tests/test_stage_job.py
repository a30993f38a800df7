"""verify --data over pipeline stages: the results of one stage, from the same checkpoints."""

from __future__ import annotations

import checkpoints
import commands
import pytest
import sentences
import torch
from ranks import pool

from lirpa_megatron.cli.commands import main

LAYERS = 3
_VARYING = ("seconds", "peak_memory_mib", "tensor_parallel", "pipeline_parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session):
    """bert and gpt of three layers, and sentences."""
    found = tmp_path_factory.mktemp("stages")
    for kind in ("bert", "gpt"):
        sentences.save_checkpoint(kind, found / kind, layers=LAYERS)
    sentences.write_lines(
        found / "data.jsonl", {"id": "first", "sentence": "w3 W7 unheard"}, {"text": "w4 w5"},
        {"ids": [7, 3, 20, 11]}, {"sentence": "not one word of it"},
    )
    (found / "vector.json").write_text(str([1.0, -1.0] * 4))
    sentences.write_lines(
        found / "words.jsonl",
        {"id": "swap", "sentence": "w3 w7", "candidates": [["w4", "w5"], ["w6"]]},
    )
    return found


def arguments(folder, model, *extra, data="data.jsonl", output=None):
    return ["verify", "--load", folder / model, "--data", folder / data, "--output", output, *extra]


def compare(folder, tmp_path, model, tp, pp, *extra, data="data.jsonl", replicas=1):
    """Results over stages against those of one process; returns the latter."""
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    given = arguments(folder, model, *extra, data=data, output=one)
    status = main([str(a) for a in given if not str(a).startswith("--pipeline-layers")])
    given = arguments(folder, model, "--pipeline-parallel-size", pp, "--tensor-parallel-size", tp,
                      *extra, data=data, output=many)
    found = commands.on_ranks(tp * pp * replicas, *given)
    assert found.returncode == status, found.stderr
    expected, results = sentences.read(one), sentences.read(many)
    results.sort(key=lambda r: [e["property"] for e in expected].index(r["property"]))
    for want, got in zip(expected, results, strict=True):
        assert (got["tensor_parallel"], got["pipeline_parallel"]) == (tp, pp)
        assert got.keys() - {"pipeline_parallel"} == want.keys()
        for name in want.keys() - set(_VARYING):
            pairs = [(got[name], want[name])]
            if name == "positions" and want[name]:
                pairs = [(of[field], like[field]) for of, like in
                         zip(got[name], want[name], strict=True) for field in like]
            for have, expects in pairs:  # radii are of a search that compares bounds: 1e-10 of them
                assert have == expects or have == pytest.approx(expects, rel=1e-9), name
    return expected


@pytest.mark.parametrize(("model", "tp", "pp", "extra"), [
    pytest.param("bert", 1, 2, ("--tolerance", "0.3", "--attack-steps", "5"),
                 marks=pytest.mark.slow),
    ("gpt", 1, 3, ("--question", "certify", "--eps", "0.001", "--task", "next-token", "--outward",
                   "--dtype", "float64")),
    pytest.param("gpt", 2, 2, ("--label-tokens", "w3|w4,w5"), marks=pytest.mark.slow),
    pytest.param("bert", 1, 2, ("--words", "each", "--norm", "2"), marks=pytest.mark.slow),
    pytest.param("bert", 1, 2, ("--question", "certify", "--eps", "0.002", "--method", "auto"),
                 marks=pytest.mark.slow),
    pytest.param("bert", 1, 2, ("--pipeline-layers=2,1",), marks=pytest.mark.slow),
])
def test_results_are_those_of_one_stage(folder, tmp_path, model, tp, pp, extra):
    results = compare(folder, tmp_path, model, tp, pp, *extra)
    assert {r["result"] for r in results} >= {"error"}  # a sentence of unknown words is in both
    assert any(r["result"] != "error" for r in results)


def test_substitutes_too(folder, tmp_path):
    (result,) = compare(folder, tmp_path, "bert", 1, 2, "--question", "synonyms",
                        data="words.jsonl")
    assert result["result"] in ("unsat", "sat", "unknown")


@pytest.mark.slow
def test_replicas_of_several_stages_share_the_sentences(folder, tmp_path):
    compare(folder, tmp_path, "bert", 1, 2, "--question", "certify", "--eps", "0.001", replicas=2)


def _stage(checkpoint, layers=None):
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    _, model = load_language_model(checkpoint, runtime.tp_group(), pipeline_layers=layers)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_each_rank_reads_its_own_stage(folder):
    first, last = pool(2, 1, 2).run(_stage, folder / "gpt", [1, 2])
    whole = pool(1).run(_stage, folder / "gpt")[0]
    layer = {name for name in whole if ".layers.0." in name}
    assert {name for name in first if ".layers." in name} == layer
    assert len([name for name in last if ".layers." in name]) == 2 * len(layer)
    assert "embedding.word_embeddings.weight" in first and "output_layer.weight" not in first
    assert "output_layer.weight" in last and "embedding.word_embeddings.weight" not in last  # tied


def _values(checkpoint, layers=None):
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    _, model = load_language_model(checkpoint, runtime.tp_group(), pipeline_layers=layers)
    return {name: p.tolist() for name, p in model.named_parameters()}


def test_a_checkpoint_of_another_split_is_read_for_the_stages_that_are_asked_for(folder, tmp_path):
    whole = pool(1).run(_values, folder / "gpt")[0]
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in whole.items()}
    arguments = checkpoints.arguments(**{**sentences.SMALL, "kv_channels": 4, "num_layers": LAYERS})
    checkpoints.save_legacy(state, tmp_path / "split", arguments, tp=2, pp=3)  # one layer each
    stages = pool(2, 1, 2).run(_values, tmp_path / "split", [1, 2])
    seen = 0
    for before, stage in zip((0, 1), stages, strict=True):
        for name, value in stage.items():
            head, layers, rest = name.partition(".layers.")
            if layers:
                index, _, rest = rest.partition(".")
                name = f"{head}.layers.{int(index) + before}.{rest}"
            if name == "output_layer.weight":  # tied
                name = "embedding.word_embeddings.weight"
            assert value == whole[name], name
            seen += 1
    assert seen == len(whole) + 1


@pytest.mark.parametrize(("extra", "message"), [
    (("--pipeline-parallel-size", 4), "4 is more than the model's 3 layers"),
    (("--pipeline-parallel-size", 2, "--pipeline-layers", "1,1"), "adds up to 2"),
    (("--pipeline-parallel-size", 2, "--pipeline-layers", "3"), "has 1 numbers"),
    (("--pipeline-parallel-size", 2, "--pipeline-layers", "2,x"), "'x' is not a whole number"),
    (("--pipeline-parallel-size", 3, "--tensor-parallel-size", 2), "does not divide"),
    (("--pipeline-parallel-size", 2, "--question", "direction", "--vectors", "vector.json",
      "--layer", 1), "layer 1: over pipeline stages"),
])
def test_pipelines_that_cannot_be_are_refused_in_one_line(folder, tmp_path, extra, message):
    size = 4 if extra[1] == 4 else 2
    output = tmp_path / "r.jsonl"
    extra = [folder / value if value == "vector.json" else value for value in extra]
    found = commands.on_ranks(size, *arguments(folder, "gpt", *extra, output=output))
    assert found.returncode == 2 and not found.stdout
    (line,) = found.stderr.strip().splitlines()
    assert message in line
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("model, tp", [("bert", 1), ("gpt", 2)])
def test_pieces_of_a_direction_are_those_of_one_stage(folder, tmp_path, model, tp):
    found = compare(
        folder, tmp_path, model, tp, 2, "--question", "direction", "--vectors",
        folder / "vector.json", "--eps", 0.4, "--splits", 6, "--method", "forward", "--order", 2,
        "--attack-steps", 0,
    )
    assert max(result["pieces"] for result in found if "pieces" in result) > 2
