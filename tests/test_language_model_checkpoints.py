"""Models of Megatron-LM's checkpoints: the same function, whatever sizes wrote and read them."""

import argparse
import shutil
from pathlib import Path

import checkpoints
import pytest
import ranks
import torch
from releases import SPLITS_QUERY_GROUPS
from small_networks import save, stack
from transformers import LENGTH

from lirpa_megatron.checkpoint.arguments import read_model_config
from lirpa_megatron.checkpoint.language_model import load_language_model, read_model_description
from lirpa_megatron.checkpoint.safe_unpickle import read_inert
from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime

REAL_ARGUMENTS = Path(__file__).resolve().parents[2] / "shared" / "reference"
TOLERANCE = 1e-12

pytestmark = pytest.mark.usefixtures("unchanged_environment")


@pytest.fixture
def session():
    with runtime.session():
        yield


def same(got, want):
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


def legacy(case, out, tp=1, pp=1, state=None, **options):
    """(checkpoint of rank files, logits of the model that it holds); needs a session."""
    changes = {**checkpoints.CASES[case][2], **options.pop("arguments", {})}
    whole, expected = checkpoints.whole_state(case)
    args = checkpoints.arguments(**changes)
    tied = not args.untie_embeddings_and_output_weights
    checkpoints.save_legacy(state or whole, out, args, tp, pp, tied=tied, **options)
    return out, expected


def loaded(tp, split, *arguments):
    """What `load_logits` gives on each rank; nothing where query groups would have to be split and
    the release refuses that, in one line."""
    if split and not SPLITS_QUERY_GROUPS:
        for outcome in ranks.pool(tp).outcomes(checkpoints.load_logits, *arguments):
            assert outcome.error == "UserError" and "num_query_groups" in outcome.message
        return []
    return ranks.pool(tp).run(checkpoints.load_logits, *arguments)


@pytest.mark.parametrize("name", checkpoints.JOBS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_torch_dist_written_at_two_loads_at_any_size(name, tp):
    folder, expected = checkpoints.written()
    split = tp == 4 and "llama" in checkpoints.JOBS[name][0]  # of two query groups
    for got, description in loaded(tp, split, folder / name, torch.float64):
        same(got, expected[name])
        assert description.stored.format == "torch_dist"
        assert description.stored.dtype == ("bfloat16" if name == "bfloat16" else "float64")
        assert (description.stored.tensor_parallel, description.stored.pipeline_parallel) == (2, 1)


def test_half_precision_becomes_float32_unchanged(session):
    folder, _ = checkpoints.written()
    _, wide = load_language_model(folder / "bfloat16", runtime.tp_group(), torch.float64)
    _, model = load_language_model(folder / "bfloat16", runtime.tp_group())
    for got, want in zip(model.parameters(), wide.parameters(), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got.double(), want) and torch.equal(got, got.bfloat16().float())


@pytest.mark.parametrize("case", checkpoints.CASES)
@pytest.mark.parametrize("tp, pp, fused", [(1, 1, False), (2, 1, True), (2, 2, True)])
def test_rank_files_of_any_sizes(case, tp, pp, fused, session, tmp_path):
    """One query group cannot be split whole, and Megatron cuts its rows all the same."""
    checkpoint, expected = legacy(case, tmp_path / "c", tp, pp, fused=fused)
    got, description = checkpoints.load_logits(checkpoint)
    same(got, expected)
    assert description.stored.format == "torch"
    assert (description.stored.tensor_parallel, description.stored.pipeline_parallel) == (tp, pp)


@pytest.mark.parametrize("case, written, size", [("llama", (4, 1), 2), ("bert", (1, 2), 4),
                                                 ("one query group", (2, 1), 4)])
def test_rank_files_load_at_other_sizes(case, written, size, tmp_path):
    with runtime.session():
        checkpoint, expected = legacy(case, tmp_path / "c", *written)
    for got, _ in loaded(size, case == "one query group", checkpoint):
        same(got, expected)


def test_the_vocabulary_is_padded_with_zeros_to_divide_it(tmp_path):
    with runtime.session():
        checkpoint, expected = legacy("vocabulary of 34", tmp_path / "c")
    for got, description in ranks.pool(4).run(checkpoints.load_logits, checkpoint, rows=34):
        same(got, expected)
        assert description.padded_vocab_size == 34 and description.vocabulary_rows(4) == 36
    for got, _ in ranks.pool(4).run(checkpoints.load_logits, checkpoint, rows=36):
        assert torch.equal(got.view(-1, 36)[:, 34:], torch.zeros(got.numel() // 36, 2))


@pytest.mark.parametrize("rows", [32, 33, 40])
def test_padding_of_the_vocabulary_can_be_chosen(rows, session, tmp_path):
    checkpoint, expected = legacy("vocabulary of 34", tmp_path / "c")
    got, _ = checkpoints.load_logits(checkpoint, overrides={"padded_vocab_size": rows})
    both = min(rows, 34)
    same(got.view(-1, rows)[:, :both], expected.view(-1, 34)[:, :both])
    assert (got.view(-1, rows)[:, 34:] == 0).all()


def test_one_is_added_to_zero_centred_norms(session, tmp_path):
    whole, _ = checkpoints.whole_state("bert")
    whole = {n: p - 1 if "norm.weight" in n else p for n, p in whole.items()}
    checkpoint, expected = legacy(
        "bert", tmp_path / "c", 2, state=whole, arguments={"layernorm_zero_centered_gamma": True}
    )
    got, description = checkpoints.load_logits(checkpoint)
    same(got, expected)
    assert description.zero_centered_gamma


@pytest.mark.parametrize("old", [True, False])
def test_names_of_older_releases(old, session, tmp_path):
    """norm_epsilon decides where it is there, in the arguments and in overrides."""
    checkpoint, expected = legacy("wide heads, squared ReLU", tmp_path / "c")

    def rename(content, rank, stage):
        values = vars(content["args"])
        values["norm_epsilon"] = values.pop("layernorm_epsilon")
        values["apply_layernorm_1p"] = values.pop("layernorm_zero_centered_gamma")

    if old:
        shutil.rmtree(checkpoint)
        legacy("wide heads, squared ReLU", checkpoint, change=rename)
    same(checkpoints.load_logits(checkpoint)[0], expected)
    other = read_model_description(checkpoint, overrides={"norm_epsilon": 0.5})
    assert other.layernorm_epsilon == 0.5


def test_a_model_config_stands_in_for_missing_arguments(session, tmp_path):
    checkpoint, expected = legacy(
        "tanh GELU", tmp_path / "c", 2, change=lambda c, r, s: c.pop("args")
    )
    config = tmp_path / "model.yaml"
    config.write_text(
        "num-layers: 2\nhidden_size: 16\nffn_hidden_size: 32\nnum_attention_heads: 4\n"
        "max_position_embeddings: 8\nposition_embedding_type: learned_absolute\n"
        "normalization: LayerNorm\nnorm_epsilon: 0.00001\nadd_bias_linear: true\nswiglu: false\n"
        "bias_gelu_fusion: true\nuntie_embeddings_and_output_weights: false\n"
        "softmax_type: vanilla\nsoftmax_scale: null\nwindow_size: null\nuse_mup: false\n"
        "layernorm_zero_centered_gamma: false\nqk_l2_norm: false\nquick_geglu: false\n"
        "squared_relu: false\n"
    )
    got, description = checkpoints.load_logits(checkpoint, overrides=read_model_config(config))
    same(got, expected)
    assert description.activation == "gelu_tanh" and description.vocab_size is None
    with pytest.raises(UserError, match="would cut rows of tokens .*an unknown number are tokens"):
        read_model_description(
            checkpoint, overrides={**read_model_config(config), "padded_vocab_size": 16}
        )


def test_an_iteration_can_be_chosen(session, tmp_path):
    checkpoint, expected = legacy("gpt", tmp_path / "c")
    shutil.copytree(checkpoint / "iter_0000010", checkpoint / "iter_0000020")
    (checkpoint / "iter_0000010").rename(checkpoint / "release")
    (checkpoint / checkpoints.TRACKER).write_text("release")
    for iteration, name in ((None, "release"), (20, "20"), ("20", "20"), ("release", "release")):
        got, description = checkpoints.load_logits(checkpoint, iteration=iteration)
        same(got, expected)
        assert description.stored.iteration == name


def test_bounds_are_the_same_at_any_size():
    folder, _ = checkpoints.written()
    (alone,) = ranks.pool(1).run(checkpoints.bounds, folder / "indexed")
    for sharded in ranks.pool(2).run(checkpoints.bounds, folder / "indexed"):
        assert torch.isfinite(alone).all()
        assert (sharded - alone).abs().max() <= 1e-9 * alone.abs().max()


def test_sizes_that_do_not_fit_are_named():
    folder, _ = checkpoints.written()
    description = read_model_description(folder / "stacked")
    for size, why in ((1, None), (4, None),
                      (8, "num_attention_heads 4 is not divisible by tensor-parallel size 8")):
        assert description.misfit(size) == why
    with pytest.raises(UserError, match="size 8: choose another number of processes"):
        description.check_tensor_parallel(8)


def test_process_groups_must_be_there():
    folder, _ = checkpoints.written()
    with pytest.raises(UserError, match="call lirpa_megatron.parallel.runtime.initialize"):
        load_language_model(folder / "stacked", None)


@pytest.mark.skipif(not REAL_ARGUMENTS.is_dir(), reason="real arguments (../shared) are not here")
@pytest.mark.parametrize("name, case", [
    ("gpt_mcore0161", "tanh GELU"), ("llama_mcore0161", "llama"), ("llama_mcore0192", "llama"),
])
def test_arguments_of_megatrons_own_parser(name, case, session, tmp_path):
    path = REAL_ARGUMENTS / f"args_{name}.pt"
    real = read_inert(path, str(path))["args"].state
    known = {k: v for k, v in real.items() if "Inert" not in str(type(v).__mro__)}
    checkpoint, expected = legacy(
        case, tmp_path / "c", 2,
        change=lambda c, r, s: c.update(args=argparse.Namespace(**known)),
    )
    same(checkpoints.load_logits(checkpoint)[0], expected)


# The command line.


def test_inspect_describes_without_reading_weights(tmp_path, capfd):
    copy = shutil.copytree(checkpoints.written()[0] / "bert", tmp_path / "c")
    for path in copy.glob("*/*.distcp"):
        path.unlink()
    assert main(["inspect", str(copy), "--seq-length", "4", "--max-spec-rows", "16"]) == 0
    text = capfd.readouterr().out
    for part in ("BERT, 2 layers", "torch_dist, iteration 10", "TP=2 x PP=1", "float64", "5,794",
                 "32 rows, of which 32 are tokens", "classification by the binary head",
                 "one input of 4 tokens", "16 rows at once", "Counted from the sizes",
                 "TP=8 is not possible: num_attention_heads 4 is not divisible"):
        assert part in text, part
    rows = [line.split() for line in text.splitlines() if "KiB" in line]
    assert [row[0] for row in rows] == ["1", "2", "4", "2"]  # of TP, and of PP
    assert rows[-1][:4] == ["2", "1", "+", "1"] and rows[-1].count("KiB,") == 3  # for each TP


def test_the_estimate_counts_what_a_rank_holds(session):
    from lirpa_megatron.checkpoint.estimates import (
        estimate,
        parameter_count,
        stage_bytes,
        weight_elements,
    )

    folder, _ = checkpoints.written()
    for name in ("indexed", "bert", "stacked"):
        description, model = load_language_model(folder / name, runtime.tp_group())
        count = sum(p.numel() for p in model.parameters())
        assert parameter_count(description) == weight_elements(description, 1) == count
    four = weight_elements(description, 4)
    assert count / 4 < four < count  # biases, norms and positions are replicated
    whole, part = (estimate(description, p, LENGTH, torch.float32) for p in (1, 4))
    assert whole.a_bytes / 4 < part.a_bytes < whole.a_bytes  # norms' forms are replicated
    assert part.weight_bytes == four * 4
    assert stage_bytes(whole, 1, 1, 1) == whole.weight_bytes + whole.a_bytes
    assert stage_bytes(whole, 0.6, 0.5, 2) < 0.6 * stage_bytes(whole, 1, 1, 1)
    limited = estimate(description, 1, LENGTH, torch.float32, max_spec_rows=1)
    assert limited.a_bytes < whole.a_bytes and limited.operations == whole.operations


def test_inspect_describes_networks_too(tmp_path, capfd):
    net = save(stack([4, 8, 8, 3]), tmp_path / "net.onnx")
    assert main(["import-onnx", str(net), str(tmp_path / "c")]) == 0
    assert main(["inspect", str(tmp_path / "c")]) == 0
    text = capfd.readouterr().out
    assert "network net: 3 linear, 2 relu" in text and "4-8-8-3" in text
    with pytest.raises(UserError, match="holds a network that import-onnx wrote, not a GPT"):
        read_model_description(tmp_path / "c")


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere is not a directory"),
    (["{c}", "--iteration", "7"], "has no iteration 7; it has iter_0000010"),
    (["{c}", "--iteration", "last"], "'last' is neither a number nor 'release'"),
    (["{c}", "--model-config", "nothing.yaml"], "model config nothing.yaml cannot be read"),
    (["{c}", "--seq-length", "0"], "'0' is not a whole number of at least 1"),
])
def test_inspect_refuses_in_one_line(arguments, message, capfd):
    folder = str(checkpoints.written()[0] / "bert")
    assert main(["inspect", *(a.format(c=folder) for a in arguments)]) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_verify_refuses_a_language_model(tmp_path, capfd):
    (tmp_path / "p.vnnlib").write_text("(declare-const X_0 Real)\n")
    arguments = ["verify", "--load", str(checkpoints.written()[0] / "bert"), "--vnnlib",
                 str(tmp_path / "p.vnnlib")]
    assert main(arguments) == 2
    assert "does not hold a network that import-onnx wrote" in capfd.readouterr().err
