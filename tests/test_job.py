"""`lirpa-megatron verify --data` end to end, in this process (TP=1)."""

import json

import pytest
import torch
import transformers
from sentences import CERTIFY, QUICK, WORDS, read, save_checkpoint, verify, write_job, write_lines

from lirpa_megatron.cli.commands import main
from lirpa_megatron.report.reader import read_lines
from lirpa_megatron.report.summary import summarise

FIELDS = {
    "network", "property", "result", "task", "method", "question", "norm", "eps", "words", "text",
    "tokens", "label", "predicted", "label_name", "predicted_name", "clean_margin", "margin",
    "lower_bounds", "certified_radius", "attacked_radius", "positions", "counterexample",
    "tensor_parallel", "seconds", "peak_memory_mib", "tolerance", "iteration", "dtype",
    "stored_dtype", "unknown_tokens", "unknown_text", "fixed", "tokenizer",
}

pytestmark = pytest.mark.usefixtures("unchanged_environment", "session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session):
    return write_job(tmp_path_factory.mktemp("job"))


def test_each_sentence_has_one_result_with_all_fields(folder, tmp_path, capsys):
    status, results = verify(folder, *QUICK, "--limit", 3, output=tmp_path / "r.jsonl")
    captured = capsys.readouterr()
    assert status == 0
    assert [r["property"] for r in results] == ["first", "line-2", "line-3"]
    for result in results:
        assert set(result) == FIELDS
        assert result["result"] == "unsat" and 0 < result["certified_radius"]
        assert result["certified_radius"] <= (result["attacked_radius"] or 1e9)
        assert result["network"] == "bert" and result["tensor_parallel"] == 1
        assert (result["task"], result["question"]) == ("classification", "radius")
        assert result["predicted_name"] == str(result["predicted"]) and result["label"] is None
        assert result["clean_margin"] > 0 and result["seconds"] > 0
    assert results[0]["tokens"] == ["w3", "w7", "unheard"]
    assert results[2]["tokens"] == ["7", "3", "20", "11"] and results[2]["text"] is None
    table = captured.out
    radius = min(r["certified_radius"] for r in results)
    assert "min certified radius" in table and f"{radius:.3g}"[:4] in table
    assert "certified" in captured.err  # the bar


def test_results_say_so_where_the_model_itself_was_not_run_beside_its_bounds(folder, tmp_path):
    arguments = (*CERTIFY, "--limit", 1)
    _, (checked,) = verify(folder, *arguments, output=tmp_path / "checked.jsonl")
    _, (alone,) = verify(folder, *arguments, "--no-live-check", output=tmp_path / "alone.jsonl")
    assert "live_check" not in checked and alone["live_check"] is False
    assert checked["margin"] == alone["margin"]


def test_bfloat16_weights_are_verified_as_float32_and_that_is_said(folder, tmp_path, capsys):
    save_checkpoint("bert", tmp_path / "bert", dtype=torch.bfloat16)
    arguments = ["--data", folder / "data.jsonl", "--limit", 1, "--output", tmp_path / "r.jsonl"]
    arguments = ["verify", "--load", tmp_path / "bert", *CERTIFY, *arguments]
    assert main(list(map(str, arguments))) == 0
    (result,) = read(tmp_path / "r.jsonl")
    assert (result["stored_dtype"], result["dtype"]) == ("bfloat16", "float32")
    captured = capsys.readouterr()
    assert "weights stored as bfloat16, verified as float32" in captured.err
    assert "stored as bfloat16, verified as float32" in captured.out


def test_the_summary_and_the_report_are_of_the_results(folder, tmp_path, capsys):
    verify(folder, *CERTIFY, "--limit", 2, output=tmp_path / "r.jsonl")
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(summarise(read_lines(tmp_path / "r.jsonl"))))
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "r.jsonl"), "--output", str(page)]) == 0
    assert "unheard" in page.read_text() and "</html>" in page.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "r.jsonl", "report.html", "summary.json"
    ]


def test_without_an_output_results_go_to_standard_output(folder, capsys):
    assert verify(folder, *CERTIFY, "--limit", 2)[0] == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["property"] for line in captured.out.splitlines()] == [
        "first", "line-2"
    ]
    assert "seconds per input" in captured.err


def test_a_time_limit(folder, tmp_path):
    status, results = verify(
        folder, *QUICK, "--timeout", 1e-9, "--limit", 2, output=tmp_path / "r.jsonl"
    )
    assert status == 0 and [r["result"] for r in results] == ["timeout"] * 2
    assert all(r["certified_radius"] is None for r in results)


def test_each_word_alone(folder, tmp_path):
    _, (result,) = verify(
        folder, *QUICK, "--words", "each", "--limit", 1, output=tmp_path / "r.jsonl"
    )
    assert result["words"] == "each" and result["certified_radius"] is None
    assert [p["position"] for p in result["positions"]] == [0, 1, 2]
    assert all(p["result"] == "unsat" and p["certified_radius"] > 0 for p in result["positions"])


def test_synonyms(folder, tmp_path):
    data = write_lines(
        tmp_path / "d.jsonl",
        {"sentence": "w3 w7", "candidates": [["w3"], ["W7", "unheard"]]},  # nothing else
        {"sentence": "w3 w7", "candidates": [WORDS[1:], WORDS[1:]]},
    )
    _, (certain, tried) = verify(
        folder, "--question", "synonyms", data=data, output=tmp_path / "r.jsonl"
    )
    assert certain["result"] == "unsat" and certain["shape"] == "hull" and certain["margin"] > 0
    assert certain["substitutes"] == [] and certain["dropped_candidates"] == ["unheard"]
    assert [len(s["words"]) for s in tried["substitutes"]] == [len(WORDS) - 2] * 2
    assert tried["result"] == "sat" and len(tried["counterexample"]) == 2
    assert all(0 < token < len(WORDS) for token in tried["counterexample"])


def test_label_words_in_a_prompt(folder, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", {"sentence": "w9 w8"}, {"sentence": "w9 w8 w7"})
    arguments = ("--label-tokens", "w1,w2|w3", "--prompt", "w5 {text} w6", "--words", "each")
    status, results = verify(
        folder, *CERTIFY, *arguments, model="gpt", data=data, output=tmp_path / "r.jsonl"
    )
    assert status == 0
    for result, count in zip(results, (2, 3), strict=True):
        assert result["task"] == "label-tokens" and result["predicted_name"] in ("w1", "w3")
        assert len(result["tokens"]) == count + 2  # of the sentence's words alone is it asked
        assert [p["position"] for p in result["positions"]] == list(range(1, count + 1))


@pytest.mark.parametrize("prompt, places", [
    ("w5 {text}", [1, 2]), ("w5{text}", [0, 1]), ("{text}w6 w7", [0, 1]), (" {text} ", [0, 1]),
])
def test_words_of_the_prompt_may_touch_the_sentence(folder, tmp_path, prompt, places):
    data = write_lines(tmp_path / "d.jsonl", {"sentence": " w9 w8 "})
    _, (result,) = verify(
        folder, *CERTIFY, "--prompt", prompt, "--words", "each", data=data,
        output=tmp_path / "r.jsonl",
    )
    assert [p["position"] for p in result["positions"]] == places


def test_labels_decide_what_is_misclassified(folder, tmp_path):
    data = write_lines(
        tmp_path / "d.jsonl",
        *({"id": label, "sentence": "w9", "label": label} for label in (0, 1)),
    )
    status, results = verify(folder, *CERTIFY, data=data, output=tmp_path / "r.jsonl")
    assert status == 0 and sorted(r["result"] for r in results) == ["misclassified", "unsat"]
    for result in results:
        assert (result["result"] == "unsat") == (result["predicted"] == result["label"])
        assert (result["clean_margin"] > 0) == (result["result"] == "unsat")


def test_labels_may_be_names_and_numbers_in_any_spelling(folder, tmp_path):
    labels = ["positive", " Negative", "1", 1.0, 1, "neutral", True]
    data = write_lines(
        tmp_path / "d.jsonl",
        *({"id": str(i), "sentence": "w9", "label": label} for i, label in enumerate(labels)),
    )
    arguments = (*CERTIFY, "--labels", "negative", "positive")
    status, results = verify(folder, *arguments, data=data, output=tmp_path / "r.jsonl")
    assert status == 1 and [r["label"] for r in results] == [1, 0, 1, 1, 1, None, None]
    assert results[0]["label_name"] == "positive" and results[1]["label_name"] == "negative"
    known = "the classes are negative, positive"
    assert f"label 'neutral' is not a class: {known}" in results[5]["error"]
    assert "label True is not a whole number" in results[6]["error"]
    assert results[0]["predicted_name"] in ("negative", "positive")
    config = tmp_path / "run.yaml"
    config.write_text("labels: [negative, positive]\n")
    again = ("--config", config, *CERTIFY, "--resume")
    assert verify(folder, *again, data=data, output=tmp_path / "r.jsonl")[1] == results
    status, (first, *_) = verify(folder, *CERTIFY, data=data, output=tmp_path / "other.jsonl")
    assert "label 'positive' is not a class: name the classes with --labels" in first["error"]


def test_unknown_tokens_and_fixed_ones_are_in_the_result_the_table_and_the_report(
    folder, tmp_path, capsys
):
    data = write_lines(
        tmp_path / "d.jsonl", {"sentence": "w3 unheard w7 oh"}, {"sentence": "w1"}, {"ids": [3]},
    )
    arguments = (*CERTIFY, "--prompt", "w5 {text} w6")
    _, results = verify(folder, *arguments, data=data, output=tmp_path / "r.jsonl", model="gpt")
    assert [r["unknown_tokens"] for r in results] == [2, 0, None]  # ids and a prompt: an error
    assert results[0]["unknown_text"] == ["unheard", "oh"] and results[0]["fixed"] == [0, 5]
    row = next(line for line in capsys.readouterr().out.splitlines() if "unknown tokens" in line)
    assert row.split()[2:] == ["2", "in", "1", "of", "3", "inputs"]
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "r.jsonl"), "--output", str(page)]) == 0
    assert "2 in 1 of 3 inputs" in page.read_text() and "unknown: unheard, oh" in page.read_text()


def test_words_in_pieces_are_verified_as_pieces_and_trimming_changes_nothing(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="reads pieces: pip install tokenizers")
    words = ["[UNK]", "w3", "w7", "w", "##9", *(f"other{i}" for i in range(27))]
    (tmp_path / "pieces.txt").write_text("".join(f"{word}\n" for word in words))
    data = write_lines(tmp_path / "d.jsonl", {"sentence": "w9x W9 w3"}, {"sentence": "w9w3"})
    arguments = (*CERTIFY, "--tokenizer", tmp_path / "pieces.txt")
    _, results = verify(folder, *arguments, data=data, output=tmp_path / "r.jsonl")
    assert results[0]["tokens"] == ["[UNK]", "w", "##9", "w3"]
    assert results[0]["unknown_text"] == ["w9x"] and results[0]["unknown_tokens"] == 1
    assert results[1]["result"] == "error" and "none of the 1 tokens" in results[1]["error"]
    radii = []
    for trim in (True, False):
        ids = {token: index for index, token in enumerate(["\u0120", *"abcdefghij"])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
        made.save(str(tmp_path / f"{trim}.json"))
        data = write_lines(tmp_path / "d.jsonl", {"sentence": "ab cd  e"})
        arguments = (*QUICK, "--tokenizer", tmp_path / f"{trim}.json")
        output = tmp_path / f"{trim}.jsonl"
        _, (result,) = verify(folder, *arguments, data=data, output=output)
        assert result["fixed"] == [] and len(result["tokens"]) == 8
        radii.append(result["certified_radius"])
    assert radii[0] == radii[1] > 0


def test_an_iteration_may_be_given_as_its_directory(folder, tmp_path):
    for path in ("bert/iter_0000010", "bert/iter_0000010/mp_rank_00"):
        output = tmp_path / "r.jsonl"
        _, (result,) = verify(folder, *CERTIFY, "--limit", 1, model=path, output=output)
        assert (result["network"], result["iteration"]) == ("bert", "10")
        assert result["result"] == "unsat"  # with the vocabulary beside the tracker


LINES = {
    "not JSON": ("{not JSON", "line 2: it is not JSON"),
    "nested": ("[" * 1_000, "line 2: it is nested too deeply"),
    "no sentence": ({"id": "x"}, "line 2: give either a 'sentence' or token 'ids'"),
    "empty": ({"sentence": " "}, "line 2: the sentence is empty"),
    "too long": ({"sentence": " ".join(["w1"] * 9)}, "has 9 tokens, the model 8 positions"),
    "ids too long": ({"ids": [1] * 9}, "has 9 tokens, the model 8 positions"),
    "unknown words": ({"sentence": "never heard"}, "none of the 2 tokens is in the vocabulary of"),
    "label": ({"sentence": "w1", "label": 2}, "label 2 is outside of 0 to 1"),
    "token id": ({"ids": [32]}, "token id 32 is not in the vocabulary of 32 tokens"),
    "candidates": ({"sentence": "w1", "candidates": [[], []]}, "2 lists of candidates for 1 words"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_wrong_is_an_error_and_the_others_go_on(folder, tmp_path, name):
    line, message = LINES[name]
    data = write_lines(tmp_path / "d.jsonl", {"sentence": "w1"}, line, {"sentence": "w2"})
    output = tmp_path / "r.jsonl"
    status, results = verify(folder, *CERTIFY, data=data, output=output)
    assert status == 1 and [r["result"] for r in results] == ["unsat", "error", "unsat"]
    assert message in results[1]["error"] and "\n" not in results[1]["error"]
    assert results[1]["predicted"] is None and results[1]["margin"] is None
    # It stays an error for those who look at the exit status of the second run alone.
    assert verify(folder, *CERTIFY, "--resume", data=data, output=output) == (1, results)


@pytest.mark.parametrize("line, arguments, message", [
    ({"sentence": "w1"}, ("--question", "synonyms"), "there are no candidates"),
    ({"sentence": "w1", "candidates": [["w2"]]},
     ("--question", "synonyms", "--prompt", "w3 {text}"), "candidates and --prompt do not go"),
    ({"ids": [1]}, (*CERTIFY, "--prompt", "w3 {text}"), "token ids and --prompt do not go"),
    ({"sentence": "w1", "label": 32}, (*CERTIFY, "model=gpt"), "label 32 is outside of 0 to 31"),
    ({"sentence": "w1", "label": 2}, (*CERTIFY, "model=gpt", "--label-tokens", "w1|w2"),
     "label 2 is outside of 0 to 1"),
])
def test_a_line_that_does_not_fit_the_question(folder, tmp_path, line, arguments, message):
    data = write_lines(tmp_path / "d.jsonl", line)
    model = "gpt" if "model=gpt" in arguments else "bert"
    arguments = [a for a in arguments if a != "model=gpt"]
    status, (result,) = verify(
        folder, *arguments, model=model, data=data, output=tmp_path / "r.jsonl"
    )
    assert status == 1 and result["result"] == "error" and message in result["error"]


def test_the_position_table_is_as_long_as_the_tests_say():
    assert transformers.LENGTH == 8 and transformers.VOCABULARY == len(WORDS) == 32
