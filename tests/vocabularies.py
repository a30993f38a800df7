"""A vocabulary of a few words."""

from lirpa_megatron.verify.sentences.tokenizer import Vocabulary

WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]


def vocabulary(*tokens):
    return Vocabulary("vocab.txt", "".join(f"{token}\n" for token in tokens or WORDS))
