"""Tokenizers: ids, words and their places, and vocabularies that are none."""

import pytest
from vocabularies import WORDS, vocabulary

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.sentences.tokenizer import Vocabulary, read_tokenizer, substitutes_of

NEEDS_TOKENIZERS = "reads tokenizer.json: pip install tokenizers"


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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3}', "[" * 1_000])
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
