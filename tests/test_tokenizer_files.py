"""Tokenizers where the writers of checkpoints leave them."""

import json

import hugging_face
import pytest

from lirpa_megatron import UserError
from lirpa_megatron.cli.commands import main
from lirpa_megatron.verify.sentences.tokenizer import Vocabulary, read_tokenizer
from lirpa_megatron.verify.sentences.tokenizer_files import check_forms, find_tokenizer, said_of

tokenizers = pytest.importorskip("tokenizers")

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def checkpoint(folder):
    (folder / "iter_0000010").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def byte_level(folder, words=("ab", "abc"), **config):
    """GPT-2's two files, with merges that make `words`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*ALPHABET, *words, "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = [f"{word[:-1]} {word[-1]}" for word in words]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "vocab.json"


@pytest.mark.parametrize("place", [
    ".", "tokenizer", "context", "context/nemo_tokenizer", "iter_0000010",
    "iter_0000010/tokenizer", "iter_0000010/context",
])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer.model"])
def test_a_tokenizer_is_found_where_writers_leave_it(place, name, tmp_path):
    folder = checkpoint(tmp_path / "c")
    path = folder / place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    assert find_tokenizer(folder).samefile(path)
    assert find_tokenizer(folder / "iter_0000010").samefile(path)
    assert said_of(path, folder).startswith(f"{path.relative_to(folder)} (sha256 2d711642b726)")


def test_no_tokenizer_is_none(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "vocab.json").write_text("{}")  # without merges.txt it says nothing
    assert find_tokenizer(folder) is None and find_tokenizer(tmp_path / "nowhere") is None


def test_copies_are_one_and_others_are_asked_about(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / "tokenizer").mkdir()
    for place, text in ((folder, "x"), (folder / "tokenizer", "x")):
        (place / "vocab.txt").write_text(text)
    assert find_tokenizer(folder) == folder / "vocab.txt"
    (folder / "tokenizer" / "vocab.txt").write_text("y")
    with pytest.raises(UserError, match="different tokenizers in .* choose one with --tokenizer"):
        find_tokenizer(folder)


def test_byte_level_bpe_is_that_of_the_tokenizers_package(tmp_path):
    path = byte_level(tmp_path)
    made = read_tokenizer(path)
    theirs = tokenizers.ByteLevelBPETokenizer(str(path), str(tmp_path / "merges.txt"))
    for text in ("abc ab x", " abc", "caf\u00e9 \U0001f600", "it's 3 abcs\n"):
        assert made.encode(text).ids == theirs.encode(text).ids
    encoded = made.encode("abc ab")
    assert encoded.words == [[0], [2]] and encoded.blanks == {1: 1} and not encoded.unknown
    assert made.size == len(ALPHABET) + 3


@pytest.mark.parametrize("config, message", [
    (dict(tokenizer_class="Qwen2Tokenizer"), r"is not GPT-2's \(Qwen2Tokenizer\)"),
    (dict(add_bos_token=True), "is not GPT-2's"),
    (dict(tokenizer_class=3), "must be text, true or false"),
])
def test_other_tokenizers_of_the_same_names_are_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_tokenizer(byte_level(tmp_path, **config))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', "[" * 1_000])
def test_damaged_vocabularies_are_one_line(content, tmp_path):
    path = byte_level(tmp_path)
    path.write_text(content)
    with pytest.raises(UserError, match="no byte-level BPE") as caught:
        read_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_result_says_which_tokenizer_was_used(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "gpt2")
    words = "\n".join(["[UNK]", *(f"w{i}" for i in range(31))])
    (folder / "vocab.txt").write_text(words)
    (tmp_path / "d.jsonl").write_text('{"sentence": "w3 w4 w5"}\n')
    arguments = ["verify", "--load", str(folder), "--data", str(tmp_path / "d.jsonl"),
                 "--question", "certify", "--eps", "1e-6", "--attack-steps", "0"]
    assert main(arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["tokenizer"].startswith("vocab.txt (sha256 ")
    assert result["tokens"] == ["w3", "w4", "w5"]


def test_a_tokenizer_that_is_too_large_for_the_vocabulary_is_refused(tmp_path, capfd):
    folder = hugging_face.save(tmp_path / "hf", "gpt2")
    byte_level(folder)
    (tmp_path / "d.jsonl").write_text('{"sentence": "abc"}\n')
    assert main(["verify", "--load", str(folder), "--data", str(tmp_path / "d.jsonl")]) == 2
    assert "vocab.json has 259 tokens, the checkpoint's vocabulary 32" in capfd.readouterr().err


IDS = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 32)}}


@pytest.fixture
def folder(tmp_path):
    """With a tokenizer.json of 31 tokens, and one that was added."""
    folder = hugging_face.save(tmp_path / "hf", "gpt2")
    own = {token: index for token, index in IDS.items() if token != "w31"}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(own, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_tokens(["w31"])
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("tokens, said", [
    ([*IDS], None),
    ([*IDS][:-1], None),  # the last was added
    ([*IDS][:-2], "gives 'w30' the id 30, vocab.txt beside it has no token 'w30'"),
    ([*IDS, "more"], "has no token 'more', vocab.txt beside it gives 'more' the id 32"),
    ([*IDS][:-2] + ["w31", "w30"], "gives 'w31' the id 31, vocab.txt beside it gives 'w31' the id "
                                   "30: they are not forms of one tokenizer"),
    (["[UNK]", "[UNK]"], None),  # not readable, and never used
])
def test_forms_of_one_tokenizer_agree_on_tokens_and_ids(folder, tokens, said):
    path = folder / "tokenizer.json"
    (folder / "vocab.txt").write_text("\n".join(tokens))
    if said is None:
        check_forms(path, read_tokenizer(path))
        return
    with pytest.raises(UserError, match=said) as caught:
        check_forms(path, read_tokenizer(path))
    assert "\n" not in str(caught.value)


def test_the_byte_of_a_tab_is_the_letter_in_another_form(tmp_path):
    class Bytes(Vocabulary):
        def vocabulary(self, added=True):
            return {"<0x09>" if token == "tab" else token: id for token, id in self.ids.items()}

    (tmp_path / "vocab.txt").write_text("[UNK]\nx\n\t\n")
    check_forms(tmp_path / "tokenizer.json", Bytes("tokenizer.model", "[UNK]\nx\ntab\n"))


def test_a_run_asks_which_of_two_tokenizers_is_the_models(folder, tmp_path, capfd):
    (folder / "vocab.txt").write_text("\n".join([*IDS, "more"]))
    (tmp_path / "d.jsonl").write_text('{"sentence": "w3 w4 w5"}\n')
    arguments = ["verify", "--load", str(folder), "--data", str(tmp_path / "d.jsonl"),
                 "--question", "certify", "--eps", "1e-6", "--attack-steps", "0"]
    assert main(arguments) == 2
    assert "not forms of one tokenizer: choose one with --tokenizer" in capfd.readouterr().err
    assert main([*arguments, "--tokenizer", str(folder / "tokenizer.json")]) == 0
