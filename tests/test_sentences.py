"""What `verify --data` asks: lines of data, tasks, options, and results that answer them."""

import json
import math

import pytest
import torch
import transformers
from vocabularies import vocabulary

from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.verify.sentences.data import Item, read_items
from lirpa_megatron.verify.sentences.options import SentenceOptions
from lirpa_megatron.verify.sentences.results import unfinished
from lirpa_megatron.verify.sentences.task import LabelTokens, make_task


def items(tmp_path, *lines, **options):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return read_items(path, **options)


def test_lines_become_items(tmp_path):
    found = items(
        tmp_path, '{"id": 7, "sentence": "a film", "label": 1, "candidates": [["the"], []]}', "",
        '{"text": "good"}', '{"ids": [3, 1]}', "not read", limit=3,
    )
    assert [item.name for item in found] == ["7", "line-3", "line-4"]
    assert found[0].text == "a film" and found[0].label == 1
    assert found[0].candidates == (("the",), ())
    assert found[1].text == "good" and found[2].ids == (3, 1)
    assert [item.error for item in found] == [None, None, None]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_separators_in_a_sentence_do_not_end_its_line(separator, tmp_path):
    line = json.dumps({"sentence": f"a{separator}b"}, ensure_ascii=False)
    (item,) = items(tmp_path, line)
    assert item.text == f"a{separator}b"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (item,) = items(tmp_path, b'\xef\xbb\xbf{"sentence": "good"}\r')
    assert item.text == "good"


BROKEN = {
    "not JSON": ("{", "it is not JSON"),
    "not an object": ("[1]", "not a JSON object"),
    "nested": ("[" * 1_000, "nested too deeply"),
    "nested in a field": ('{"sentence": ' + '{"a":' * 50_000, "nested too deeply"),
    "huge number": ('{"sentence": "a", "label": ' + "9" * 5000 + "}", "limit"),
    "not UTF-8": (b'{"sentence": "caf\xe9"}', "not text in UTF-8"),
    "half of a surrogate pair": ('{"sentence": "\\ud800"}', "the sentence is empty or not text"),
    "nothing": ('{"label": 1}', "either a 'sentence' or token 'ids'"),
    "two": ('{"sentence": "a", "ids": [1]}', "either a 'sentence' or token 'ids'"),
    "empty sentence": ('{"sentence": " "}', "the sentence is empty or not text"),
    "number as sentence": ('{"sentence": 3}', "the sentence is empty or not text"),
    "no ids": ('{"ids": []}', "ids must be a list of whole numbers"),
    "negative id": ('{"ids": [-1]}', "ids must be a list of whole numbers"),
    "true as id": ('{"ids": [true]}', "ids must be a list of whole numbers"),
    "id beyond 32 bits": ('{"ids": [2147483648]}', "ids must be a list of whole numbers"),
    "label": ('{"sentence": "a", "label": 0.5}', "label 0.5 is not a whole number"),
    "true as label": ('{"sentence": "a", "label": true}', "label True is not a whole number"),
    "blank label": ('{"sentence": "a", "label": " "}', "label ' ' is not a whole number"),
    "list as label": ('{"sentence": "a", "label": [1]}', "nor the name of a class"),
    "name": ('{"id": [1], "sentence": "a"}', "id is neither a name nor a number"),
    "name that UTF-8 lacks": ('{"id": "\\udfff", "sentence": "a"}', "id is neither a name nor"),
    "candidates": ('{"sentence": "a", "candidates": ["b"]}', "must be a list of lists of words"),
    "blank candidate": ('{"sentence": "a", "candidates": [[""]]}', "must be a list of lists"),
    "candidates of ids": ('{"ids": [1], "candidates": [["b"]]}', "candidates need a sentence"),
    "too few candidates": ('{"sentence": "a b", "candidates": [["b"]]}',
                           "1 lists of candidates for 2 words"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_an_item_that_says_so(name, tmp_path):
    line, message = BROKEN[name]
    good, broken, other = items(tmp_path, '{"sentence": "a"}', line, '{"sentence": "b"}')
    assert good.error is None and other.error is None and other.name == "line-3"
    assert broken.error.startswith("line 2: ") and message in broken.error
    assert broken.name == "line-2" and broken.text is None


def test_files_of_no_use_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_items(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_items(tmp_path)
    with pytest.raises(UserError, match="data.jsonl is empty"):
        items(tmp_path, "", " ")
    with pytest.raises(UserError, match="line 3: id '1' is already used in line 1"):
        items(tmp_path, '{"id": 1, "sentence": "a"}', "", '{"id": "1", "sentence": "b"}')


@pytest.fixture(scope="module")
def models():
    small = dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2)
    with runtime.session():
        yield {
            "gpt": transformers.gpt(**small), "bert": transformers.bert(**small),
            "headless": transformers.bert(model=dict(add_binary_head=False), **small),
        }


def test_label_tokens_are_bounded_by_the_best_token_against_each_other_one(models):
    task = LabelTokens(models["gpt"], [[1, 2], [3], [4, 5, 6]], ["x", "y", "z"])
    torch.manual_seed(0)
    logits = torch.randn(40, transformers.VOCABULARY, dtype=torch.float64)
    scores = task.scores(logits)
    for label, own in enumerate(task.tokens):
        others = [j for k, ids in enumerate(task.tokens) if k != label for j in ids]
        C = task.specification(label, logits)
        assert C.shape == (1, len(own) * len(others), transformers.VOCABULARY)
        for row in range(len(logits)):
            got = task.smallest((C @ logits[row]), label).item()
            want = min(max(float(logits[row, t] - logits[row, j]) for t in own) for j in others)
            assert got == pytest.approx(want, abs=1e-12)
            true = scores[row, label] - max(s for k, s in enumerate(scores[row]) if k != label)
            assert got == pytest.approx(float(true), abs=1e-12)


def test_nan_proves_nothing(models):
    for name, tokens in (("bert", None), ("gpt", None), ("gpt", "good|bad")):
        task = make_task(None, models[name], transformers.VOCABULARY, tokens, vocabulary())
        rows = {"classification": 1, "label-tokens": 1, "next-token": 32}[task.name]
        lower = torch.full((1, rows), math.nan)
        assert not task.smallest(lower, 0).item() > 0


@pytest.mark.parametrize("kind, name, tokens, message", [
    ("gpt", "classification", None, "classification is not for a GPT model: choose label-tokens"),
    ("bert", "next-token", None, "next-token is not for a BERT model: choose classification"),
    ("bert", None, "good|bad", "--label-tokens and --task label-tokens need each other"),
    ("gpt", "label-tokens", None, "--label-tokens and --task label-tokens need each other"),
    ("gpt", "next-token", "good|bad", "--label-tokens and --task label-tokens need each other"),
    ("headless", None, None, "no binary head"),
    ("gpt", None, "good", "give words of two or more classes"),
    ("gpt", None, "good|,", "give words of two or more classes"),
    ("gpt", None, "good|movie", "'movie' is not one token of vocab.txt"),
    ("gpt", None, "good,bad|Good", "the same token occurs twice"),
])
def test_tasks_that_do_not_fit_are_refused(models, kind, name, tokens, message):
    with pytest.raises(UserError, match=message):
        make_task(name, models[kind], transformers.VOCABULARY, tokens, vocabulary())


def test_words_need_a_tokenizer(models):
    with pytest.raises(UserError, match="--label-tokens needs --tokenizer"):
        make_task(None, models["gpt"], transformers.VOCABULARY, "good|bad", None)


@pytest.mark.parametrize("kind, tokens, name, classes", [
    ("bert", None, "classification", 2), ("gpt", None, "next-token", 32),
    ("gpt", "good|bad,film|a", "label-tokens", 3),
])
def test_tasks_have_defaults_and_check_labels(models, kind, tokens, name, classes):
    task = make_task(None, models[kind], transformers.VOCABULARY, tokens, vocabulary())
    assert task.name == name and task.classes == classes
    task.check_label(classes - 1)
    for label in (classes, -1):
        with pytest.raises(UserError, match=f"label {label} is outside of 0 to {classes - 1}"):
            task.check_label(label)


@pytest.mark.parametrize("options, message", [
    (dict(question="certify"), "give --eps"),
    (dict(question="radius", eps=0.1), "leave --eps out"),
    (dict(question="synonyms", norm="2"), "not --norm 2"),
    (dict(question="synonyms", eps=0.1), "--shape box"),
    (dict(prompt="Review:"), "has no {text}"),
    (dict(prompt="{text} {text}"), "more than once"),
])
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        SentenceOptions(**options).check()


def test_questions_that_differ_have_other_keys():
    base = SentenceOptions()
    base.check()
    other = [
        dict(method="IBP"), dict(question="certify", eps=0.1), dict(norm="1"), dict(words="each"),
        dict(question="synonyms"), dict(question="synonyms", shape="box"),
        dict(prompt="It: {text}"), dict(label_tokens="a|b"), dict(tolerance=0.1),
    ]
    keys = [json.dumps(SentenceOptions(**change).key()) for change in [{}, *other]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("change", [
    {"iteration": "20"}, {"dtype": "float64"}, {"tolerance": 0.5}, {"network": "other"},
], ids=str)
def test_results_of_other_weights_or_numbers_are_not_taken_for_these(change):
    items = [Item("a", text="w1")]
    like = {"network": "n", "task": "t", "iteration": "10", "dtype": "float32", "tolerance": 0.02}
    done = [{**like, "property": "a", "text": "w1", "label": None}]
    assert unfinished(items, done, like) == []
    assert unfinished(items, done, {**like, **change}) == items
