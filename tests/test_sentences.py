"""The parts of `verify --data`: tokens, lines of data, searches, attacks, tasks, options."""

import json
import math

import pytest
import torch
import transformers

from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.verify.sentences import attack, search
from lirpa_megatron.verify.sentences.data import Item, read_items
from lirpa_megatron.verify.sentences.options import SentenceOptions
from lirpa_megatron.verify.sentences.results import unfinished
from lirpa_megatron.verify.sentences.task import LabelTokens, make_task
from lirpa_megatron.verify.sentences.tokenizer import Vocabulary, read_tokenizer, substitutes_of

NEEDS_TOKENIZERS = "reads tokenizer.json: pip install tokenizers"
WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]


def vocabulary(*tokens):
    return Vocabulary("vocab.txt", "".join(f"{token}\n" for token in tokens or WORDS))


# Tokenizers.


def test_a_vocabulary_lowers_words_and_adds_begin_and_end():
    encoded = vocabulary().encode("A  Good\tmovie ")
    assert encoded.ids == [1, 3, 4, 0, 2]
    assert encoded.tokens == ["[CLS]", "a", "good", "movie", "[SEP]"]
    assert encoded.words == [[1], [2], [3]] and encoded.unknown == [3]
    assert encoded.positions == [1, 2, 3]
    assert vocabulary().id_of("Film") == 6 and vocabulary().id_of("movie") is None
    assert vocabulary().size == len(WORDS)


def test_a_vocabulary_with_capitals_keeps_them_and_needs_no_begin_or_end():
    words = vocabulary("[UNK]", "Good", "good")
    assert words.encode("Good good GOOD").ids == [1, 2, 0]
    assert words.encode("").ids == [] and words.encode("").positions == []


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85", "\u00a0"])
def test_only_a_line_feed_ends_a_token(separator):
    assert vocabulary("[UNK]", f"x{separator}y", "z").id_of("z") == 2


def test_lines_may_end_as_in_dos(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\r\ngood\r\n")
    assert read_tokenizer(tmp_path / "vocab.txt").encode("good bad").ids == [1, 0]


@pytest.mark.parametrize("text, message", [
    ("", "vocab.txt is empty"), ("\n\n", "vocab.txt is empty"),
    ("[UNK]\ngood\nbad\ngood\n", "vocab.txt, line 2: 'good' occurs twice"),
    ("good\nbad\n", r"vocab.txt has no \[UNK\]"),
])
def test_a_vocabulary_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Vocabulary("vocab.txt", text)


PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "act", "##ing", "##s", "good", "!", "caf", "##e"]


def test_a_vocabulary_with_pieces_is_one_of_wordpiece(tmp_path):
    pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    tokenizer = read_tokenizer(path)
    encoded = tokenizer.encode("Acting  good! Café zzz [MASK] \u200bacts")
    assert encoded.tokens == ["[CLS]", "act", "##ing", "good", "!", "caf", "##e", "[UNK]",
                              "[MASK]", "act", "##s", "[SEP]"]
    assert encoded.ids == [PIECES.index(token) for token in encoded.tokens]
    assert encoded.words == [[1, 2], [3, 4], [5, 6], [7], [8], [9, 10]]
    assert encoded.unknown == [7] and "zzz" in encoded.missing and tokenizer.size == len(PIECES)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(path).encode("Good").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json, beside tokenizer .* is not JSON"):
        read_tokenizer(path)


def test_pieces_without_the_package_are_refused_and_never_words(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="has pieces of words .##ing.*pip install tokenizers"):
        read_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[UNK]\n#\n##\n###\n")  # words of a text about headings
    assert read_tokenizer(tmp_path / "vocab.txt").encode("# ##").ids == [1, 2]


@pytest.mark.parametrize(
    "piece", ["\u2581good", "\u0120good", "good</w>", "go@@", "\u2581go\t-3.2"]
)
def test_pieces_of_another_kind_need_their_tokenizer_file(piece, tmp_path):
    (tmp_path / "vocab.txt").write_text(f"[UNK]\nbad\n{piece}\n</s>\n")
    with pytest.raises(UserError, match="pieces of words .*give the tokenizer.json"):
        read_tokenizer(tmp_path / "vocab.txt")


def test_what_a_vocabulary_lacks_is_named():
    encoded = vocabulary().encode("a Movie film")
    assert encoded.unknown == [2] and encoded.missing == ["movie"]


def byte_level(path, trim, merges=()):
    """Byte-level BPE; a blank is a token of its own unless merged with the next letter."""
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate([*alphabet, "<s>", "</s>"])}
    for pair in merges:
        ids["".join(pair)] = len(ids)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, list(merges)))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = level
    made.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=trim, add_prefix_space=False
    )
    made.save(str(path))
    return read_tokenizer(path)


@pytest.mark.parametrize("merges", [(), (("g", "o"), ("\u0120", "go"))], ids=["letters", "words"])
def test_blanks_are_tokens_of_the_text_whatever_offsets_are_trimmed(merges, tmp_path):
    text = "go é  go \U0001f600 x"
    trimmed, whole = (byte_level(tmp_path / f"{t}.json", t, merges) for t in (True, False))
    a, b = trimmed.encode(text), whole.encode(text)
    assert a.ids == b.ids and a.positions == b.positions == list(range(1, len(a.ids) - 1))
    assert a.words == b.words and a.blanks == b.blanks and a.blanks
    for first in range(5):  # each word with the blank before it
        own = a.part(first, 1).positions
        assert own == list(range(own[0], own[-1] + 1))
        assert (a.tokens[own[0]][0] == "\u0120") == (first > 0)
    assert sorted(p for w in range(5) for p in a.part(w, 1).positions) == a.positions


def test_blanks_of_unigram_are_tokens_of_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    pieces = [("<unk>", -9.0), ("\u2581", -3.0), ("ab", -2.0), ("\u2581c", -2.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.save(str(tmp_path / "tokenizer.json"))
    encoded = read_tokenizer(tmp_path / "tokenizer.json").encode("ab c zz ab")
    assert encoded.tokens[:3] == ["\u2581", "ab", "\u2581c"] and 0 in encoded.ids
    assert encoded.positions == list(range(len(encoded.ids)))
    assert len(encoded.unknown) == len(encoded.missing) > 0


def test_words_with_letters_that_a_tokenizer_drops_are_named(tmp_path):
    """BPE without an unknown token leaves out what it does not have."""
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    encoded = read_tokenizer(tmp_path / "tokenizer.json").encode("ab axyb zz")
    assert encoded.ids == [0, 1, 0, 1] and encoded.missing == ["axyb", "zz"]


def word_level(path):
    """A tokenizer.json: lower case, words and punctuation apart, [CLS] and [SEP] around."""
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    ids = {token: index for index, token in enumerate([*WORDS, "!", "mo", "##vie"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=12)
    made.enable_truncation(3)
    made.save(str(path))
    return read_tokenizer(path)


def test_a_tokenizer_file_splits_words_and_knows_their_places(tmp_path):
    tokenizer = word_level(tmp_path / "tokenizer.json")
    encoded = tokenizer.encode("A good  movie! Xyz")  # neither padded nor truncated
    assert encoded.ids == [1, 3, 4, 8, 9, 7, 0, 2]
    assert encoded.words == [[1], [2], [3, 4, 5], [6]] and encoded.unknown == [6]
    assert tokenizer.size == 10
    assert tokenizer.id_of("good") == 4
    assert tokenizer.id_of("movie") is None and tokenizer.id_of("xyz") is None


def test_words_of_a_byte_level_tokenizer_begin_with_a_blank(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate(alphabet)}
    for token in ("go", "Ġgo"):
        ids[token] = len(ids)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("g", "o"), ("Ġ", "go")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.id_of("go") == ids["Ġgo"]  # as it comes after another word
    encoded = tokenizer.encode("go go é")
    assert encoded.ids[:2] == [ids["go"], ids["Ġgo"]]
    assert encoded.words == [[0], [1], [3, 4]] and encoded.unknown == []  # 2 is the blank


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', "[" * 100_000])
def test_a_tokenizer_file_that_is_none_is_refused(text, tmp_path):
    pytest.importorskip("tokenizers", reason=NEEDS_TOKENIZERS)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer.json") as caught:
        read_tokenizer(tmp_path / "tokenizer.json")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_missing_is_said_where_the_package_is(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="pip install tokenizers"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_substitutes_are_the_candidates_that_change_one_position():
    words = vocabulary()
    encoded = words.encode("a good film")
    candidates = [["a"], ["Bad", "bad", "good", "unheard", "very good"], []]
    found = substitutes_of(words, "a good film", encoded, candidates)
    assert found.ids == {2: [5]} and found.words == {2: ["Bad"]}
    assert found.dropped == ["unheard", "very good"]


def test_words_of_several_tokens_have_no_substitutes(tmp_path):
    tokenizer = word_level(tmp_path / "tokenizer.json")
    encoded = tokenizer.encode("good movie")
    found = substitutes_of(tokenizer, "good movie", encoded, [["bad", "movie"], ["film"]])
    assert found.ids == {1: [5]} and found.dropped == ["movie", "film"]


# Lines of data.


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
    "nested": ("[" * 100_000, "nested too deeply"),
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


def test_the_radius_is_doubled_until_an_attack_succeeds():
    assert search.smallest_attacked(lambda r: 0.7 if r >= 0.7 else None, 0.1) == 0.7
    assert search.smallest_attacked(lambda r: 0.7, 64.0) == 0.7
    assert search.smallest_attacked(lambda r: None, 0.1) is None


# Attacks.

NORMS = {"inf": math.inf, "2": 2.0, "1": 1.0}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("radius", [0.0, 0.3, 5.0])
def test_projections_are_the_nearest_points_of_the_ball(norm, radius):
    torch.manual_seed(3)
    points = torch.randn(50, 3, 4, dtype=torch.float64)
    near = attack._project(points, norm, radius)
    assert (attack._size(near, norm) <= radius * (1 + 1e-12)).all()
    inside = attack._size(points, norm) <= radius
    assert torch.equal(near[inside], points[inside])
    # Of no other point of the ball is the given one nearer: <p - near, q - near> <= 0.
    others = attack._project(torch.randn(50, 1, 3, 4, dtype=torch.float64)[:, 0], norm, radius)
    outward, along = (points - near).flatten(1), (others - near).flatten(1)
    assert ((outward * along).sum(1) <= 1e-9).all()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [(2, 3), (6, 32)])
def test_a_linear_margin_is_attacked_at_the_radius_of_the_dual_norm(norm, shape):
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64)
    hidden = torch.randn(1, *shape, dtype=torch.float64)
    where = torch.ones(shape[0], dtype=torch.bool)
    where[0] = False
    dual = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}[norm]
    want = 1 / torch.linalg.vector_norm(weight[1:].flatten(), ord=dual).item()

    def margin(points):
        assert torch.equal(points[:, 0], hidden[:, 0].expand(len(points), -1))  # does not move
        return ((points - hidden) * weight).flatten(1).sum(1) + 1

    def find(radius):
        return attack.smallest_success(margin, hidden, where, norm, radius, 40, 4, 0, None)

    assert find(0.99 * want) is None
    found = search.smallest_attacked(find, want / 3)
    assert want * (1 - 1e-9) <= found <= 1.05 * want


def test_a_tolerance_finer_than_numbers_ends():
    hidden, where = torch.zeros(1, 1, 2).double(), torch.ones(1, dtype=torch.bool)
    found = attack.smallest_success(
        lambda points: 1 - points.flatten(1).sum(1), hidden, where, 2.0, 1.0, 20, 3, 0, None,
        smaller=1e-30,
    )
    assert found == pytest.approx(0.5**0.5, rel=0.05)


def test_a_margin_that_is_nan_is_no_success():
    hidden, where = torch.zeros(1, 2, 2), torch.ones(2, dtype=torch.bool)

    def margin(points):
        return points.flatten(1).sum(1) * math.nan

    assert attack.smallest_success(margin, hidden, where, 2.0, 1.0, 3, 2, 0, None) is None


def embedded(ids):
    return ids.double().unsqueeze(-1)


def words_margin(bad):
    """At most 0 at the given sentences only, smaller the more of a bad sentence's words match."""
    def margin(points):
        values = [(points[..., 0] == torch.tensor(b).double()).sum(1) for b in bad]
        return len(bad[0]) - 0.5 - torch.stack(values).amax(0).double()
    return margin


def test_few_sentences_are_all_tried():
    ids, substitutes = torch.tensor([[1, 2, 3]]), {0: [4, 5], 2: [6]}
    found = attack.find_words(words_margin([[5, 2, 6]]), embedded, ids, substitutes, None)
    assert found == [5, 2, 6]
    for bad in ([5, 4, 6], [7, 2, 3]):  # not made of substitutes
        assert attack.find_words(words_margin([bad]), embedded, ids, substitutes, None) is None


def test_of_many_sentences_one_word_after_the_other_is_exchanged():
    ids, bad = torch.arange(10).unsqueeze(0), [p + 10 * (p % 4) for p in range(10)]
    substitutes = {p: [p + 10, p + 20, p + 30] for p in range(10)}  # 4^10 sentences
    found = attack.find_words(words_margin([bad]), embedded, ids, substitutes, None)
    assert found == bad
    assert attack.find_words(words_margin([[99] * 10]), embedded, ids, substitutes, None) is None


def test_without_substitutes_there_is_the_sentence_itself():
    ids = torch.tensor([[1, 2]])
    assert attack.find_words(words_margin([[1, 2]]), embedded, ids, {}, None) == [1, 2]
    assert attack.find_words(words_margin([[1, 3]]), embedded, ids, {}, None) is None


# Tasks.


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


# Options.


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
