"""tokenizer.model: ids, words and their places, tokens around a text, and files that are none."""

import io
import json
import sys

import checkpoints
import hugging_face
import pytest

from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.tokenizer import read_tokenizer, substitutes_of
from lirpa_megatron.verify.sentences.tokenizer_files import check_around, find_tokenizer, said_of

WORDS = ("good", "film", "bad", "a")
NEEDS = "reads tokenizer.model: pip install sentencepiece"


@pytest.fixture(scope="module")
def sentencepiece():
    return pytest.importorskip("sentencepiece", reason=NEEDS)


@pytest.fixture(scope="module")
def model(sentencepiece):
    """The bytes of a small Unigram model."""
    return trained(sentencepiece)


def trained(package, vocab_size=24, **settings):
    text = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    written = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=vocab_size,
        hard_vocab_limit=False, minloglevel=2, **settings,
    )
    return written.getvalue()


def saved(folder, model, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.model"


def test_ids_are_those_of_sentencepiece(tmp_path, model, sentencepiece):
    tokenizer = read_tokenizer(saved(tmp_path, model))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("good film", "  a  bad good ", "bad\tfilm", "goodbad", "caf\u00e9 film", ""):
        assert tokenizer.encode(text).ids == theirs.encode(text)
    assert tokenizer.size == theirs.get_piece_size()


def test_pieces_belong_to_words_and_blanks_go_with_the_next_one(tmp_path, model):
    tokenizer = read_tokenizer(saved(tmp_path, model))
    encoded = tokenizer.encode("good  xyz bad")
    assert "".join(encoded.tokens) == "\u2581good\u2581xyz\u2581bad"
    letters = ["".join(encoded.tokens[p] for p in word) for word in encoded.words]
    assert letters[0] == "\u2581good" and letters[1].endswith("xyz") and letters[2] == "\u2581bad"
    assert encoded.positions == list(range(len(encoded.ids)))  # all are of the text
    assert encoded.missing == [encoded.tokens[p] for p in encoded.unknown] and encoded.missing


def test_letters_of_several_bytes_keep_their_places(tmp_path, sentencepiece):
    model = trained(sentencepiece, 400, byte_fallback=True, character_coverage=1.0)
    tokenizer = read_tokenizer(saved(tmp_path, model))
    encoded = tokenizer.encode("\u00e9\U0001f600 good")
    assert not encoded.unknown and not encoded.missing
    assert encoded.tokens[encoded.words[1][-1]] == "\u2581good"
    own = [encoded.part(w, 1).positions for w in (0, 1)]
    assert sorted(own[0] + own[1]) == list(range(len(encoded.ids))) and len(own[0]) >= 6


@pytest.mark.parametrize("config, begins, ends", [
    ({}, False, False), (dict(add_bos_token=True), True, False),
    (dict(add_bos_token=None, add_eos_token=True), False, True),
    (dict(tokenizer_class="LlamaTokenizer"), True, False),
    (dict(tokenizer_class="LlamaTokenizerFast", add_bos_token=False, legacy=False), False, False),
])
def test_what_stands_around_a_text_is_what_the_settings_say(config, begins, ends, tmp_path, model):
    encoded = read_tokenizer(saved(tmp_path, model, **config)).encode("good")
    tokens = ["<s>"] * begins + ["\u2581good"] + ["</s>"] * ends
    assert encoded.tokens == tokens
    assert encoded.words == [[int(begins)]] and encoded.positions == [int(begins)]


def test_words_are_one_token_or_none_and_have_substitutes(tmp_path, model):
    tokenizer = read_tokenizer(saved(tmp_path, model, add_bos_token=True))
    good, bad = (tokenizer.encode(word).ids[1] for word in ("good", "bad"))
    assert tokenizer.id_of("bad") == bad and tokenizer.id_of("goodbad") is None
    assert tokenizer.id_of("xyz") is None
    text = "a good film"
    found = substitutes_of(tokenizer, text, tokenizer.encode(text), [[], ["bad", "xyz"], []])
    assert found.ids == {2: [bad]} and found.dropped == ["xyz"]
    assert good != bad


@pytest.mark.parametrize("config, message", [
    (dict(tokenizer_class="T5Tokenizer"), r"sentencepiece's alone \(T5Tokenizer\): give the tok"),
    (dict(add_prefix_space=False), "sentencepiece's alone"),
    (dict(add_bos_token="yes"), "must be text, true or false"),
])
def test_settings_that_are_not_known_are_refused(config, message, tmp_path, model):
    with pytest.raises(UserError, match=message):
        read_tokenizer(saved(tmp_path, model, **config))


def test_added_tokens_and_a_missing_bos_are_refused(tmp_path, model, sentencepiece):
    path = saved(tmp_path / "a", model)
    (tmp_path / "a" / "added_tokens.json").write_text('{"<|im_start|>": 24}')
    with pytest.raises(UserError, match="added to sentencepiece's are not supported"):
        read_tokenizer(path)
    without = trained(sentencepiece, bos_id=-1)
    with pytest.raises(UserError, match="has no bos token, which tokenizer_config.json asks for"):
        read_tokenizer(saved(tmp_path / "b", without, add_bos_token=True))


@pytest.mark.parametrize("content", [
    b"", b"\x0a\x00", b"IQ== 0\nIg== 1\n", b"\xff" * 100, "cut", "turned",
])
def test_files_that_are_none_are_one_line(content, tmp_path, model):
    if content == "cut":
        content = model[: len(model) // 2]
    elif content == "turned":
        content = model[::-1]
    path = saved(tmp_path, content)
    with pytest.raises(UserError, match="is not a model of sentencepiece") as caught:
        read_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    saved(tmp_path, b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the sentencepiece package: pip install sentencep"):
        read_tokenizer(tmp_path / "tokenizer.model")


def test_a_run_says_which_was_used_and_settings_tell_files_apart(tmp_path, capfd, model):
    folder = hugging_face.save(tmp_path / "hf", "llama")
    path = saved(folder, model, tokenizer_class="LlamaTokenizer")
    assert find_tokenizer(folder) == path
    (tmp_path / "d.jsonl").write_text('{"sentence": "good film"}\n')
    assert main(["verify", "--load", str(folder), "--data", str(tmp_path / "d.jsonl"),
                 "--question", "certify", "--eps", "1e-6", "--attack-steps", "0"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["tokenizer"].startswith("tokenizer.model (sha256 ")
    assert result["tokens"] == ["<s>", "\u2581good", "\u2581film"]
    said = said_of(path, folder)
    (folder / "tokenizer").mkdir()
    saved(folder / "tokenizer", model)
    assert said_of(folder / "tokenizer" / "tokenizer.model", folder) != said
    with pytest.raises(UserError, match="different tokenizers in .* choose one with --tokenizer"):
        find_tokenizer(folder)


@pytest.mark.usefixtures("session")
def test_settings_are_asked_for_where_releases_of_megatron_differ(tmp_path, capfd, model):
    state, _ = checkpoints.whole_state("gpt")
    asked, plain = tmp_path / "asked", tmp_path / "plain"
    for folder, kind in ((asked, "Llama2Tokenizer"), (plain, "SentencePieceTokenizer")):
        checkpoints.save_legacy(state, folder, checkpoints.arguments(tokenizer_type=kind))
        saved(folder / "tokenizer", model)
    check_around(plain / "tokenizer" / "tokenizer.model", plain)
    (tmp_path / "d.jsonl").write_text('{"sentence": "good film", "label": 0}\n')
    assert main(["verify", "--load", str(asked), "--data", str(tmp_path / "d.jsonl")]) == 2
    assert 'beside it, {"add_bos_token": true} or false' in capfd.readouterr().err
    check_around(saved(asked / "tokenizer", model, add_bos_token=True), asked)
