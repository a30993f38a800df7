"""Bad input to `verify --data`: one clear line, exit status 2, nothing half-written.

66 cases here end the run, 15 of test_job.py are the error of one line of the data. About 40 cases
of test_checkpoint_arguments.py and 80 of test_hostile_checkpoints.py are checkpoints.
"""

import json
import re

import pytest
from sentences import WORDS, save_checkpoint, write_lines

from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties.results import read_results

pytestmark = pytest.mark.usefixtures("unchanged_environment", "session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session):
    """Good files, and one bad file of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    for kind in ("bert", "gpt"):
        save_checkpoint(kind, folder / kind)
    save_checkpoint("gpt", folder / "no_words")
    save_checkpoint("gpt", folder / "experts", num_experts=8)
    save_checkpoint("bert", folder / "no_head", bert_binary_head=False, change=drop_head)
    save_checkpoint("gpt", folder / "no_args", change=lambda content: content.pop("args"))
    save_checkpoint("bert", folder / "nan", change=spoil)
    (folder / "no_words" / "vocab.txt").unlink()
    (folder / "no_iteration").mkdir()
    write_lines(folder / "good.jsonl", {"sentence": "w1 w2"})
    write_lines(folder / "twice.jsonl", *[{"id": "x", "sentence": "w1"}] * 2)
    write_lines(folder / "r.jsonl.1", {"half": "of a run"})
    words = "".join(f"{word}\n" for word in WORDS)
    files = {
        "empty.jsonl": "\n \n", "empty.txt": "", "twice.txt": f"{words}w7\n",
        "pieces.txt": "[UNK]\n\u2581w1\n",
        "more.txt": f"{words}w32\n", "unknown.txt": "w1\nw2\n", "tokenizer.json": "{",
        "foreign.jsonl": '{"some": "thing"}\n', "text.jsonl": "a diary\n",
        "nested.jsonl": "[" * 1_000 + "\n", "property.jsonl": property_result() + "\n",
        "unhashable.jsonl": sentence_result(shape=[]) + "\n",
        "types.jsonl": sentence_result(seconds="long") + "\n",
        "layers.yaml": "num_layers: 7\n", "wrong.yaml": "num_layer: 1\n", "broken.yaml": "a: [\n",
        "options.yaml": "norm: 3\n", "summary.json": "{}\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "binary.txt").write_bytes(b"\xff\xfe[UNK]")
    return folder


def drop_head(content):
    for name in [n for n in content["model"] if n.startswith(("binary_head", "pooler"))]:
        del content["model"][name]


def spoil(content):
    content["model"]["binary_head.weight"][0, 0] = float("nan")


def property_result():
    return json.dumps({
        "network": "n", "property": "p", "result": "unsat", "method": "CROWN", "seconds": 1.0,
        "lower_bounds": [1.0], "tensor_parallel": 1,
    })


def sentence_result(**changes):
    return json.dumps({**json.loads(property_result()), "task": "classification",
                       "question": "radius", "norm": "inf", **changes})


B = ["verify", "--load", "bert", "--data", "good.jsonl"]
G = ["verify", "--load", "gpt", "--data", "good.jsonl"]
# name: (arguments, with file names relative to the folder; what the line says)
CASES = {
    # options
    "no model": (["verify", "--data", "good.jsonl"], "--data needs the language model: give"),
    "network": (["verify", "--data", "good.jsonl", "--onnx", "net.onnx"], "give --load DIR"),
    "property": ([*B, "--vnnlib", "p.vnnlib"], "--data and --vnnlib exclude each other"),
    "instances": ([*B, "--instances", "i.csv"], "--data and --instances exclude each other"),
    "eps without data": (["verify", "--load", "bert", "--eps", "0.1"],
                         "--eps needs sentences: give --data too"),
    "question without data": (["verify", "--onnx", "net.onnx", "--question", "radius"],
                              "--question needs sentences: give --data too"),
    "certify without eps": ([*B, "--question", "certify"], "give --eps"),
    "radius with eps": ([*B, "--eps", "0.1"], "leave --eps out, or ask certify"),
    "negative eps": ([*B, "--question", "certify", "--eps", "-1"], "'-1' is not a number of at"),
    "NaN as eps": ([*B, "--question", "certify", "--eps", "nan"], "'nan' is not a number of at"),
    "synonyms in a ball": ([*B, "--question", "synonyms", "--norm", "2"], "not --norm 2"),
    "synonyms with eps": ([*B, "--question", "synonyms", "--eps", "0.1"], "needs --shape box"),
    "unknown norm": ([*B, "--norm", "3"], "--norm: invalid choice: '3'"),
    "unknown question": ([*B, "--question", "why"], "--question: invalid choice: 'why'"),
    "no tolerance": ([*B, "--tolerance", "0"], "'0' is not a number above 0"),
    "no lines": ([*B, "--limit", "0"], "'0' is not a whole number of at least 1"),
    "prompt without place": ([*B, "--prompt", "Review:"], r"'Review:' has no \{text\}"),
    "prompt with two places": ([*B, "--prompt", "{text}{text}"], "more than once"),
    "configured norm": ([*B, "--config", "options.yaml"], "options.yaml: .*--norm: invalid choice"),
    # task
    "task of a GPT": ([*B, "--task", "next-token"], "not for a BERT model: choose classification"),
    "task of a BERT": ([*G, "--task", "classification"], "not for a GPT model: choose label"),
    "label words of a BERT": ([*B, "--label-tokens", "w1|w2"], "need each other"),
    "no label words": ([*G, "--task", "label-tokens"], "need each other"),
    "one class": ([*G, "--label-tokens", "w1,w2"], "words of two or more classes"),
    "label word that is unknown": ([*G, "--label-tokens", "w1|good"], "'good' is not one token"),
    "label word of two classes": ([*G, "--label-tokens", "w1|w1"], "same token occurs twice"),
    "too few names": ([*B, "--labels", "good"], "--labels has 1 names, but there are 2 classes"),
    "the same name twice": ([*B, "--labels", "good", "Good"], "the same name occurs twice"),
    "names of tokens": ([*G, "--labels", "a", "b"], "the task next-token has none"),
    # data and tokenizer
    "missing data": (["verify", "--load", "bert", "--data", "no.jsonl"],
                     "data no.jsonl cannot be read: No such file"),
    "folder as data": (["verify", "--load", "bert", "--data", "bert"], "data bert cannot be read"),
    "empty data": (["verify", "--load", "bert", "--data", "empty.jsonl"], "empty.jsonl is empty"),
    "name that occurs twice": (["verify", "--load", "bert", "--data", "twice.jsonl"],
                               "line 2: id 'x' is already used in line 1"),
    "pieces of words": ([*B, "--tokenizer", "pieces.txt"], "pieces.txt has pieces of words"),
    "text without tokenizer": (["verify", "--load", "no_words", "--data", "good.jsonl"],
                               "has sentences as text: give the --tokenizer"),
    "missing tokenizer": ([*B, "--tokenizer", "no.txt"], "tokenizer no.txt cannot be read"),
    "empty tokenizer": ([*B, "--tokenizer", "empty.txt"], "tokenizer empty.txt is empty"),
    "token twice": ([*B, "--tokenizer", "twice.txt"], "twice.txt, line 8: 'w7' occurs twice"),
    "no unknown token": ([*B, "--tokenizer", "unknown.txt"], r"unknown.txt has no \[UNK\]"),
    "binary tokenizer": ([*B, "--tokenizer", "binary.txt"], "binary.txt is not a text file"),
    "broken tokenizer": ([*B, "--tokenizer", "tokenizer.json"],
                         "tokenizer.json (is not a tokenizer.json|needs the tokenizers package)"),
    "tokenizer of another model": ([*B, "--tokenizer", "more.txt"],
                                   "more.txt has 33 tokens, the checkpoint's vocabulary 32"),
    # checkpoint
    "missing checkpoint": (["verify", "--load", "no", "--data", "good.jsonl"],
                           "no is not a directory"),
    "no tracker": (["verify", "--load", "no_iteration", "--data", "good.jsonl"],
                   "it has no latest_checkpointed_iteration.txt"),
    "missing iteration": ([*B, "--iteration", "7"], "has no iteration 7; it has iter_0000010"),
    "experts": (["verify", "--load", "experts", "--data", "good.jsonl"], "MoE"),
    "no arguments": (["verify", "--load", "no_args", "--data", "good.jsonl"], "--model-config"),
    "no classes": (["verify", "--load", "no_head", "--data", "good.jsonl"], "no binary head"),
    "NaN weights": (["verify", "--load", "nan", "--data", "good.jsonl"],
                    "binary_head.weight .* has NaN"),
    "model config of another": ([*B, "--model-config", "layers.yaml"], r"layers\.\d"),
    "unknown model argument": ([*B, "--model-config", "wrong.yaml"],
                               "unknown model argument 'num_layer'"),
    "broken model config": ([*B, "--model-config", "broken.yaml"], "broken.yaml.* not valid YAML"),
    # output
    "output in no folder": ([*B, "--output", "no/r.jsonl"], "r.jsonl cannot be written: folder no"),
    "output is a folder": ([*B, "--output", "gpt"], "output gpt is a directory"),
    "output is the data": ([*B, "--output", "good.jsonl"], "good.jsonl is an input"),
    "output is the tokenizer": ([*B, "--tokenizer", "more.txt", "--output", "more.txt"],
                                "more.txt is an input, and more.txt would overwrite it"),
    "output is the summary": ([*B, "--output", "summary.json"], "name of the summary: choose"),
    "data is the summary": (["verify", "--load", "bert", "--data", "summary.json", "--output",
                             "new.jsonl"],
                            "summary.json is an input, and summary.json would overwrite"),
    "output of an unfinished run": ([*B, "--output", "r.jsonl"], "r.jsonl.1 has results of a run"),
    "resume without output": ([*B, "--resume"], "--resume needs --output"),
    **{
        f"resume of {name}": ([*B, "--resume", "--output", f"{name}.jsonl"],
                              f"line 1 of {name}.jsonl is not a result of verify --data: remove it")
        for name in ("foreign", "text", "nested", "property", "unhashable", "types")
    },
}


def snapshot(folder):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_clear_line(name, folder, monkeypatch, capsys):
    arguments, message = CASES[name]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lirpa-megatron: error: ")
    assert re.search(message, line), line
    assert snapshot(folder) == before


@pytest.mark.parametrize("line", ["[" * 1_000, '{"a":' * 1_000], ids=["lists", "objects"])
def test_deeply_nested_results_of_properties_are_one_line_too(line, tmp_path,):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 of .*r.jsonl is not a result of verify: remove"):
        read_results(tmp_path / "r.jsonl")
